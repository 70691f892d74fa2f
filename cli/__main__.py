"""`aim` and `python -m aim_cli`: signals are heard before anything else is imported."""

import sys


def main() -> None:
    """The console script `aim`."""
    try:
        from aim_cli import interrupts

        interrupts.listen()
        from aim_cli.main import main as run

        run()
    except KeyboardInterrupt:  # in no command: those hear it themselves
        if sys.stderr is not None:
            print("Error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
