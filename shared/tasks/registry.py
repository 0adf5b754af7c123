"""Tasks by name, from the entry-point group ``fedge.tasks``: any installed package can add one."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final

from fedge.shared.errors import DataError, brief

if TYPE_CHECKING:
    from fedge.shared.tasks.task import Task

GROUP = "fedge.tasks"
#: Modules that tasks import, by the names that they had.
_MOVED: Final = {
    "fedge.shared.preprocess": "fedge.shared.preprocessing.steps",
    "fedge.shared.schema": "fedge.shared.preprocessing.schema",
}


def task_names() -> list[str]:
    """Names of all installed tasks, sorted; imports none of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def require_task(name: str) -> None:
    """Check that a task of this name is installed, without importing it.

    Raises:
        DataError: 304, no installed package has such a task.
    """
    _entry(name)


def is_shipped(name: str) -> bool:
    """Whether a task of this name is fedge's own.

    Raises:
        DataError: 304, no installed package has such a task.
    """
    return _entry(name).value.startswith("fedge.")


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: 304, no installed package has such a task, or it does not load or is
            not a Task.
    """
    entry = _entry(name)
    # Tasks are their users' code, which names modules as they were called when it was written.
    for before, now in _MOVED.items():
        sys.modules.setdefault(before, import_module(now))
    # Imported here, as it needs torch. If torch is missing, the error is not reported as the task's.
    from fedge.shared.tasks.task import Task

    try:
        task = entry.load()
    except (Exception, SystemExit) as error:
        raise DataError(304, f"task {name} does not load: {brief(error)}") from error
    if not isinstance(task, Task):
        raise DataError(
            304,
            f"task {name} does not load: {entry.value}: must be a Task, got {type(task).__name__}",
        )
    return task


def _entry(name: str) -> EntryPoint:
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not entries:
        names = task_names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(304, f"task.name: must be one of {', '.join(names)}, got {name!r}{hint}")
    return entries[0]
