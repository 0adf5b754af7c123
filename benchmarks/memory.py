"""Memory of process trees, from /proc (Linux)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

MIB = 1024.0


def children() -> dict[int, list[int]]:
    """Every process's children, by id."""
    by_parent: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # ended since the folder was listed
            continue
        # The command's name, in parentheses, may itself hold spaces and parentheses.
        parent = int(text.rpartition(")")[2].split()[1])
        by_parent.setdefault(parent, []).append(int(stat.parent.name))
    return by_parent


def tree(roots: Iterable[int]) -> list[int]:
    """The processes and all their descendants."""
    below = children()
    waiting, seen = list(roots), set[int]()
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            waiting.extend(below.get(pid, []))
    return sorted(seen)


def parse_rollup(text: str) -> dict[str, int]:
    """The fields of a smaps_rollup file, KiB."""
    fields = {}
    for line in text.splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0])
    return fields


def pss(pid: int) -> float:
    """A process's proportional set size, MiB: shared pages count by their number of users. 0 when it has ended."""
    try:
        return parse_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text())["Pss"] / MIB
    except (OSError, KeyError):  # ended, or a zombie, whose file is empty
        return 0.0


def command(pid: int) -> str:
    """The name of what a process runs, for a table: the script's name where Python runs one."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    # A process that gave itself a title has one word, with spaces in it.
    names = [Path(word.decode(errors="replace").split(" ")[0]).name for word in words if word]
    if names and names[0].startswith("python"):
        names = names[1:]
        if names[:1] == ["-m"]:
            names = names[1:]
    return names[0] if names else "gone"


def by_command(roots: Iterable[int]) -> dict[str, float]:
    """PSS of a process tree, MiB, by command."""
    sizes: dict[str, float] = {}
    for pid in tree(roots):
        name = command(pid)
        sizes[name] = sizes.get(name, 0.0) + pss(pid)
    return sizes


def split(root: int, name: str, inner: int | None) -> dict[str, float]:
    """PSS of a process tree, MiB, one part of it separately.

    Args:
        root: of the tree.
        name: of the part.
        inner: the part's own root, None where there is none now.
    """
    part = set(tree([inner])) if inner else set()
    rest = set(tree([root])) - part
    return {"relay": sum(map(pss, rest)), name: sum(map(pss, part))}


class Peak:
    """Samples in a thread and keeps the sample with the largest sum.

    Args:
        sample: measures, MiB by part; costs a few milliseconds a process.
        interval: between samples, seconds; short ones cost the rounds that are timed.
    """

    def __init__(self, sample: Callable[[], dict[str, float]], interval: float = 1.0) -> None:
        self._sample, self._interval = sample, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.largest: dict[str, float] = {}

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            now = self._sample()
            if sum(now.values()) > sum(self.largest.values()):
                self.largest = now

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
