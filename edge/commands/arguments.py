"""Arguments that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from fedge.shared.errors import BundleError

if TYPE_CHECKING:
    from fedge.edge.installation.record import DeviceRecord
    from fedge.shared.bundle.bundle import Bundle

MAX_THREADS: Final = 256

_Number = TypeVar("_Number", int, float)


def add_bundle(parser: ArgumentParser) -> None:
    """Add the arguments that every command on a bundle has."""
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="a .fedge file, or a folder that `install` made",
    )
    parser.add_argument(
        "--trust",
        type=Path,
        required=True,
        metavar="KEY.pub",
        help="public key that must have signed it",
    )
    parser.add_argument("--task", metavar="NAME", help="refuse a bundle of another task")
    parser.add_argument(
        "--not-older-than",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="refuse one with a lower serial",
    )


def require_expected(bundle: Bundle, arguments: Namespace) -> None:
    """Hold a verified bundle against what the arguments say it must be: signed once, an old one stays signed.

    Raises:
        BundleError: 712, it is of another task; 713, its serial is lower.
    """
    manifest = bundle.manifest
    if arguments.task not in (None, manifest.task):
        raise BundleError(712, f"task: must be {arguments.task!r}, got {manifest.task!r}")
    if manifest.serial < arguments.not_older_than:
        raise BundleError(
            713, f"serial: must be {arguments.not_older_than} or more, got {manifest.serial}"
        )


def open_trusted(arguments: Namespace) -> tuple[Bundle, DeviceRecord | None]:
    """Open the bundle that the arguments name, with the record of its installation where it has one.

    Raises:
        BundleError: 701 to 707, 711 to 713.
    """
    from fedge.edge.installation.folder import open_installed
    from fedge.shared.crypto.dsse import load_public

    bundle, record = open_installed(arguments.bundle, load_public(arguments.trust))
    require_expected(bundle, arguments)
    return bundle, record


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``."""
    return _within(int, low, high)


def real(low: float, high: float) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` to ``high``."""
    return _within(float, low, high)


def _within(
    read: Callable[[str], _Number], low: _Number, high: _Number
) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            value = read(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ArgumentTypeError(f"must be {low} to {high}, got {text!r}")
        return value

    return parse


def add_threads(parser: ArgumentParser) -> None:
    """Add the option --threads."""
    parser.add_argument(
        "--threads",
        type=whole(1, MAX_THREADS),
        default=1,
        metavar="N",
        help=f"CPU threads of one inference, 1 to {MAX_THREADS} (default 1)",
    )


def add_artifact(parser: ArgumentParser) -> None:
    """Add the option --artifact."""
    parser.add_argument(
        "--artifact",
        metavar="NAME",
        help="run this artefact alone (default: the fastest here)",
    )


def add_statistics(parser: ArgumentParser) -> None:
    """Add the option --statistics."""
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="JSON of the site's own mean and std, if verify says so",
    )
