"""A click group that knows its commands' names and summaries but imports them only to run them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class LazyCommand:
    """A command not imported yet.

    Attributes:
        name: what the user types.
        summary: the line beside it in the group's help.
        module: where it lives, as the attribute `command`.
    """

    name: str
    summary: str
    module: str


class LazyGroup(click.Group):
    """A group of `LazyCommand`; a mistyped name is answered with the nearest one."""

    def __init__(self, *args: Any, commands: Iterable[LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = {command.name: command for command in commands}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order given."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None when there is none of that name."""
        if cmd_name not in self.lazy:
            return None
        command = importlib.import_module(self.lazy[cmd_name].module).command
        assert isinstance(command, click.Command)
        return command

    def nearest(self, name: str) -> str | None:
        """The command that a mistyped or shortened name is likely to stand for."""
        near = [known for known in self.lazy if known.startswith(name)]
        near = near or difflib.get_close_matches(name, self.lazy, n=1)
        return near[0] if near else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one may have been meant."""
        name = args[0]
        if name not in self.lazy and not name.startswith("-"):
            near = self.nearest(name)
            hint = f"did you mean '{near}'?" if near else "there are " + ", ".join(self.lazy)
            ctx.fail(f"there is no command '{name}'; {hint}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help, successfully, when no command is given."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by their summaries, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.summary) for command in self.lazy.values()])
