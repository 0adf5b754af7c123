import subprocess
import sys
from importlib import metadata

import pytest

from fedge.shared.errors import DataError
from fedge.shared.tasks import registry
from fedge.shared.tasks.registry import get_task, task_names


def test_fedges_own_tasks_are_there():
    assert {"breast-cancer", "digits", "heart"} <= set(task_names())
    for name in ("breast-cancer", "digits", "heart"):
        assert get_task(name).name == name


def test_an_unknown_task_lists_the_known_and_the_nearest():
    with pytest.raises(DataError, match="task.name: must be one of .*digits.*did you mean") as e:
        get_task("digit")
    assert e.value.code == 304
    with pytest.raises(DataError) as far:
        get_task("zzzzzz")
    assert "did you mean" not in str(far.value)


def test_another_package_can_add_a_task(monkeypatch):
    entry = metadata.EntryPoint("mine", "fedge.shared.tasks.digits:TASK", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert task_names() == ["mine"]
    assert get_task("mine").input.shape == (8, 8)


def test_an_entry_point_must_hold_a_task(monkeypatch):
    entry = metadata.EntryPoint("mine", "fedge.shared.tasks.digits:SIDE", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(DataError, match="must be a Task, got int") as caught:
        get_task("mine")
    assert caught.value.code == 304


def test_declaring_tasks_does_not_import_scikit_learn():
    code = (
        "import sys; from fedge.shared.tasks.registry import get_task, task_names;"
        "[get_task(n) for n in ('breast-cancer', 'digits', 'heart')];"
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
