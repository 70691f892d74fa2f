"""The `aim` command: draw images, look into bundles, export, train and measure.

One module a command, imported when that command runs, so that `aim --help` is immediate and
works without PyTorch. Errors become one sentence and an exit code in `aim_cli.errors` alone.
"""
