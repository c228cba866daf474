"""The command line: what is shared by all commands."""
