"""The command ``rl-ebm``: its flags, what they make, what it says and exits with."""

from rl_ebm.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
