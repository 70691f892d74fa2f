"""The entry point: the `aim` group, and where every failure leaves the program."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import click

from aim_cli.errors import debugging, report, silence_stdout
from aim_cli.lazy import LazyCommand, LazyGroup
from aim_cli.terminal import prepare_streams


class AimGroup(LazyGroup):
    """The top group; its `main` turns exceptions into one sentence and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and leave by `SystemExit`: 0, 1 (a bug), 2 or 130."""
        kwargs["standalone_mode"] = False
        prepare_streams()
        try:
            result = super().main(*args, **kwargs)
            # Here and not at interpreter exit: a full disk behind a redirection is an error too.
            sys.stdout.flush()
        except Exception as error:
            code = report(error)
            silence_stdout()
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)


@click.command(
    cls=AimGroup,
    commands=[
        LazyCommand("generate", "Draw images. Start here.", "aim_cli.commands.generate"),
        LazyCommand("info", "What a bundle is, holds and needs.", "aim_cli.commands.info"),
        LazyCommand("serve", "Serve a bundle to many, over HTTP.", "aim_cli.commands.serve"),
        LazyCommand("web", "Make a web site that draws in browsers.", "aim_cli.commands.web"),
        LazyCommand("sample", "Draw a data set for FID, restartable.", "aim_cli.commands.sample"),
        LazyCommand("eval", "Measure pictures and models.", "aim_cli.commands.eval"),
        LazyCommand("bench", "Measure seconds an image and memory.", "aim_cli.commands.bench"),
        LazyCommand("export", "Turn a checkpoint into a bundle.", "aim_cli.commands.export"),
        LazyCommand("train", "Train on pictures of your own.", "aim_cli.commands.train"),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'aim COMMAND --help' explains a command. Exit codes: 0 done, 2 a problem that the "
    "message names, 130 interrupted, 1 a bug in aim (AIM_DEBUG=1 shows the traceback).",
)
@click.version_option(package_name="aim-runtime", prog_name="aim")
def aim() -> None:
    """Draw images with AiM, the Mamba-2 image generator, from a small ONNX bundle.

    'aim generate' needs nothing else: a model comes in the box.
    """


def main() -> None:
    """The command line of this process, whose signals `aim_cli.interrupts` hears."""
    if not sys.warnoptions and not debugging():
        # Notes of one library to another's authors would bury our one sentence.
        warnings.simplefilter("ignore")
    aim(prog_name="aim")
