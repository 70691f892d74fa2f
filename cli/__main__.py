"""`python -m aim_cli` is `aim`."""

from aim_cli.main import main

main()
