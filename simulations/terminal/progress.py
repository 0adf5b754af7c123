"""Progress of a running federation: one bar on a terminal, a few plain lines elsewhere.

Everything goes to standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from fedge.simulations.terminal.text import clock, printable, round_facts, waiting_text

#: Most plain lines of a whole run: one for each of so many parts of it.
PLAIN_LINES: Final = 5
#: Width in characters up to which the bar takes the whole line.
NARROW: Final = 80


class Progress:
    """The progress of one run, as a context manager.

    Args:
        quiet: print nothing.
        file: where to print, standard error where not given.
        terminal: force or forbid the bar; detected from ``file`` where not given.
    """

    def __init__(
        self, *, quiet: bool = False, file: IO[str] | None = None, terminal: bool | None = None
    ) -> None:
        self._file = file if file is not None else sys.stderr
        self._quiet = quiet
        self._console = Console(file=self._file, force_terminal=terminal, highlight=False)
        self._live = not quiet and self._console.is_terminal
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._begun = 0.0
        self._done = 0
        self._facts = ""
        self._last_part = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands, also where the run failed or was interrupted."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def start(self, total_rounds: int, done: int = 0) -> None:
        """Begin a run of ``total_rounds`` rounds, or continue after ``done`` of them."""
        self._total, self._done = max(1, total_rounds), done
        self._begun = time.monotonic()
        if not self._live:
            return
        narrow = self._console.width <= NARROW
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None if narrow else 40),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            expand=narrow,
            refresh_per_second=8,
        )
        self._task = self._bar.add_task(
            f"round {done}/{self._total}", total=self._total, completed=done, facts="waiting"
        )
        self._bar.start()

    def site(self, server_round: int, site: str, done: int, total: int) -> None:  # noqa: ARG002
        """Note that ``done`` of ``total`` sites have answered in a round, ``site`` the last of them."""
        if self._bar is None or self._task is None:
            return
        share = min(done / total, 1.0) if total > 0 else 0.0
        facts = f"site {done}/{total}" + (f"  {self._facts}" if self._facts else "")
        self._bar.update(
            self._task,
            description=f"round {server_round}/{self._total}",
            completed=server_round - 1 + share,
            facts=facts,
        )

    def round(self, line: Mapping[str, Any]) -> None:
        """Show the round that just closed.

        Args:
            line: as written to rounds.jsonl.
        """
        number = int(line["round"])
        elapsed = time.monotonic() - self._begun
        left = (self._total - number) * elapsed / max(1, number - self._done)
        self._facts = round_facts(line)
        spent = f"{clock(elapsed)} left {clock(left)}" if number < self._total else clock(elapsed)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=f"round {number}/{self._total}",
                completed=number,
                facts=f"{self._facts}  {spent}",
            )
        elif not self._quiet:
            self._plain(number, spent)

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        """Show how many requests are out, where they go one by one."""
        if done < total:
            self._note(server_round, f"sent {done}/{total}, {nbytes / 1e6:.0f} MB", plain=False)

    def waiting(self, server_round: int, phase: str, sites: Sequence[str], seconds: float) -> None:
        """Show the sites, or the phase, for which the run waits."""
        self._note(server_round, waiting_text(phase, sites, seconds))

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:  # noqa: ARG002
        """Name a site that is no longer connected."""
        self._note(server_round, f"{printable(site)} is not connected")

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        """Name a site that is connected again."""
        self._note(server_round, f"{printable(site)} is back after {clock(seconds)}")

    def _note(self, server_round: int, text: str, *, plain: bool = True) -> None:
        where = f"round {server_round}/{self._total}" if self._total else "start"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=where, facts=text)
        elif plain and not self._quiet:
            self._file.write(f"{where}  {text}\n")
            self._file.flush()

    def _plain(self, number: int, spent: str) -> None:
        """One line for each fifth of the run, at its end."""
        part = number * PLAIN_LINES // self._total
        if part > self._last_part:
            self._last_part = part
            self._file.write(f"round {number}/{self._total}  {self._facts}  {spent}\n")
            self._file.flush()
