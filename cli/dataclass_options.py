"""Command-line options made from a frozen dataclass, so that its fields are described once.

Names and types come from the fields, defaults from their defaults, the help texts from
`metadata["help"]`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def options_from(
    options_class: type[Any], *, skip: Collection[str] = ()
) -> Callable[[Function], Function]:
    """A decorator that gives a command one option for every field of `options_class`.

    A field without a default is required. Fields in `skip` are left to the command itself.
    """
    hints = typing.get_type_hints(options_class)

    def decorate(function: Function) -> Function:
        for field in reversed(dataclasses.fields(options_class)):
            if field.name not in skip:
                function = _option(field, hints[field.name])(function)
        return function

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Function], Function]:
    flag = "--" + field.name.replace("_", "-")
    text, default = field.metadata["help"], field.default
    if default is dataclasses.MISSING:
        return click.option(flag, field.name, type=_type(hint), required=True, help=text)
    if hint is bool:
        flag = f"{flag}/--no-{flag[2:]}"
        return click.option(flag, field.name, default=default, show_default=True, help=text)
    if default == ():  # words: `--freeze tables,mixers`, or one at a time
        return click.option(
            flag, field.name, type=_type(hint), multiple=True, help=text, callback=_joined
        )
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return click.option(
        flag,
        field.name,
        type=_type(hint),
        default=default,
        show_default=default is not None,
        help=text,
    )


def _joined(
    ctx: click.Context, param: click.Parameter, value: tuple[tuple[Any, ...], ...]
) -> tuple[Any, ...]:
    """The words of all lists, each once, in their order; none for no list."""
    return tuple(dict.fromkeys(word for words in value for word in words))


def _type(hint: Any) -> click.ParamType | type[Any]:
    """The click type of a field's annotation; `X | None` is X."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (argument for argument in get_args(hint) if argument is not type(None))
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if get_origin(item) is Literal:
            return CommaSeparated(str, get_args(item))
        return CommaSeparated(item)
    if hint is Path:
        return click.Path(path_type=Path)
    if hint in (int, float, str):
        return typing.cast("type[Any]", hint)
    raise TypeError(f"there is no command-line form of the annotation {hint!r}")


class CommaSeparated(click.ParamType):
    """`1,4,16` as a tuple."""

    def __init__(self, item: type[Any], choices: Collection[str] = ()) -> None:
        self.item = item
        self.choices = choices
        self.name = "|".join(choices) if choices else f"{item.__name__},..."

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        """The words as they are typed."""
        return f"[{self.name}],..." if self.choices else None

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Split and convert; click reports what does not convert."""
        if isinstance(value, tuple):
            return value
        try:
            parts = tuple(self.item(part) for part in str(value).split(","))
            if self.choices and (other := next((p for p in parts if p not in self.choices), None)):
                self.fail(f"{other!r} is none of {', '.join(self.choices)}", param, ctx)
            return parts
        except ValueError:
            self.fail(f"'{value}' is not a list like 1,4,16", param, ctx)
