"""The commands, one file each; `aim_cli.main` imports the one that is asked for."""
