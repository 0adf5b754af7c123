"""Tasks by name, from the entry-point group ``fedge.tasks``: any installed package can add one."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from fedge.shared.errors import DataError
from fedge.shared.tasks.task import Task

GROUP = "fedge.tasks"


def task_names() -> list[str]:
    """Names of all installed tasks, sorted; imports none of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: 304, no installed package has such a task, or what it has is not a task.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        names = task_names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(304, f"task.name: must be one of {', '.join(names)}, got {name!r}{hint}")
    task = found[0].load()
    if not isinstance(task, Task):
        raise DataError(304, f"{found[0].value}: must be a Task, got {type(task).__name__}")
    return task
