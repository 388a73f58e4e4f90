"""The command line: parse, call one library function, print. Nothing here imports torch at load."""

from respike.cli.main import main

__all__ = ["main"]
