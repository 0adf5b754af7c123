"""Every error that fedge raises on purpose: numbered, typed, with one line of remedy.

The tree is split by the part at fault, so that a caller can catch what it can handle::

    FedgeError
    ├── UsageError      1xx  the command line, or an extra that is not installed
    ├── ConfigError     2xx  the configuration or the run directory
    ├── DataError       3xx  a data file or a task's declaration of it
    ├── SiteError       4xx  a site's reply, or a site that did not answer
    ├── RunError        5xx  the run as a whole: quorum, journal, resume
    ├── ReleaseError    6xx  export, parity, keys, signing
    ├── BundleError     7xx  a bundle that the edge refuses
    ├── InputError      8xx  an input that the edge refuses
    └── DeployError     9xx  a server or site daemon, its home, keys and processes

A code names one situation permanently; ``CATALOGUE`` holds its title and remedy, and
docs/reference/errors.md is generated from it.
"""

from __future__ import annotations

from typing import Final

from fedge.shared.error_catalogue import CATALOGUE

#: Longest message that ``one_line`` prints, in characters.
MAX_MESSAGE: Final = 1000
#: Longest text of a foreign exception that ``brief`` returns, in characters.
MAX_BRIEF: Final = 200


class FedgeError(Exception):
    """A failure with a number, a message and a remedy.

    Args:
        code: a key of ``CATALOGUE``.
        message: what happened, in one line, with the name of the part at fault.
        remedy: what to do about it, where the catalogue's remedy does not apply.

    Raises:
        KeyError: ``code`` is not in the catalogue (a defect in fedge).
    """

    def __init__(self, code: int, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy or CATALOGUE[code].remedy

    @property
    def label(self) -> str:
        """The number as people read it, for example ``FE-206``."""
        return f"FE-{self.code}"

    def __str__(self) -> str:
        return f"{self.label} {self.message}"


class UsageError(FedgeError):
    """The command line is at fault."""


class ConfigError(FedgeError):
    """The configuration or the run directory is at fault."""


class DataError(FedgeError):
    """A data file, or the requested partition of it, is at fault."""


class SiteError(FedgeError):
    """A site, or its reply, is at fault."""


class RunError(FedgeError):
    """The run cannot go on."""


class ReleaseError(FedgeError):
    """The model cannot be released."""


class BundleError(FedgeError):
    """The bundle is refused."""


class InputError(FedgeError):
    """The input is refused."""


class DeployError(FedgeError):
    """A server or site cannot run as a daemon."""


def one_line(error: FedgeError) -> str:
    """The error as both command lines print it: number, message and remedy on one line.

    Line ends become spaces, other characters that do not print are escaped (a message may quote a
    file's name or content), and a message beyond ``MAX_MESSAGE`` characters is cut.
    """
    text = _printable(error.message, MAX_MESSAGE)
    stop = "" if text.endswith((".", "…", "?", "!")) else "."
    return f"{error.label} {text}{stop} Remedy: {error.remedy}"


def brief(error: BaseException) -> str:
    """The text of a foreign exception, as a message quotes it: its type and the first line of its text.

    Printable, and cut beyond ``MAX_BRIEF`` characters.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    name = type(error).__name__
    return _printable(f"{name}: {first}" if first else name, MAX_BRIEF)


def _printable(text: str, longest: int) -> str:
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(text.split())
    )
    return text if len(text) <= longest else text[: longest - 1] + "…"


__all__ = [
    "BundleError",
    "ConfigError",
    "DataError",
    "DeployError",
    "FedgeError",
    "InputError",
    "ReleaseError",
    "RunError",
    "SiteError",
    "UsageError",
    "brief",
    "one_line",
]
