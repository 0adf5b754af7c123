"""Arguments that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fedge.shared.bundle import Bundle

MAX_THREADS: Final = 256


def add_bundle(parser: ArgumentParser) -> None:
    """The arguments that every command on a bundle has."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .fedge file")
    parser.add_argument(
        "--trust",
        type=Path,
        required=True,
        metavar="KEY.pub",
        help="public key that must have signed it",
    )


def open_trusted(arguments: Namespace) -> Bundle:
    """Open the bundle that the arguments name.

    Raises:
        BundleError: 701 to 707.
    """
    from fedge.shared.bundle import open_bundle
    from fedge.shared.signing import load_public

    return open_bundle(arguments.bundle, load_public(arguments.trust))


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ArgumentTypeError(f"must be {low} to {high}, got {text!r}")
        return value

    return parse


def add_threads(parser: ArgumentParser) -> None:
    """The option --threads."""
    parser.add_argument(
        "--threads",
        type=whole(1, MAX_THREADS),
        default=1,
        metavar="N",
        help=f"CPU threads of one inference, 1 to {MAX_THREADS} (default 1)",
    )


def add_statistics(parser: ArgumentParser) -> None:
    """The option --statistics."""
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE.json",
        help="the site's own mean and std, where verify says so",
    )
