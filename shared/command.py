"""What a sub-command is: three plain functions, found through the entry-point group ``fedge.commands``.

A command module imports nothing heavy at its top, so that ``fedge --help`` is quick and works without any
extra; ``run`` imports what it needs.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command of ``fedge``.

    Attributes:
        summary: one line for ``fedge --help``.
        extra: the pip extra that brings what ``run`` imports, for example ``"simulation"``.
        arguments: adds the command's arguments to its parser.
        run: does the work and returns the exit status; raises ``FedgeError``.
        epilog: lines shown under the options, an example at the least.
    """

    summary: str
    extra: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    epilog: str = ""
