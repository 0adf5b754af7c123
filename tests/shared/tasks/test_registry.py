import re
import subprocess
import sys
from importlib import metadata

import pytest

from fedge.shared.cli.main import main
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


def test_a_task_that_names_modules_as_they_were_called_loads(monkeypatch):
    for name in ("fedge.shared.preprocess", "fedge.shared.schema"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    get_task("digits")
    from fedge.shared.preprocess import Standardise
    from fedge.shared.preprocessing import schema, steps
    from fedge.shared.schema import InputSchema

    assert Standardise is steps.Standardise
    assert InputSchema is schema.InputSchema


def test_an_entry_point_must_hold_a_task(monkeypatch):
    entry = metadata.EntryPoint("mine", "fedge.shared.tasks.digits:SIDE", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(DataError, match="must be a Task, got int") as caught:
        get_task("mine")
    assert caught.value.code == 304


@pytest.mark.slow
def test_declaring_tasks_does_not_import_scikit_learn():
    code = (
        "import sys; from fedge.shared.tasks.registry import get_task, task_names;"
        "[get_task(n) for n in ('breast-cancer', 'digits', 'heart')];"
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "False"


BROKEN = {
    "syntax": ("def f(:\n", "SyntaxError: invalid syntax"),
    "needs": ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere"),
    "raises": ("raise ValueError('a' * 999 + '\\nb')\n", "ValueError: aaa"),
    "leaves": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "empty": ("", "AttributeError: .*TASK"),
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Plug-ins that do not load, beside one task that does."""
    monkeypatch.syspath_prepend(tmp_path)
    entries = [metadata.EntryPoint("fine", "fedge.shared.tasks.digits:TASK", registry.GROUP)]
    for name, (text, _) in BROKEN.items():
        (tmp_path / f"broken_{name}.py").write_text(text)
        entries.append(metadata.EntryPoint(name, f"broken_{name}:TASK", registry.GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


@pytest.mark.parametrize("name", sorted(BROKEN))
@pytest.mark.usefixtures("broken")
def test_a_task_that_does_not_load_says_why_in_one_line(name):
    with pytest.raises(DataError) as caught:
        get_task(name)
    assert caught.value.code == 304
    assert re.match(f"task {name} does not load: {BROKEN[name][1]}", caught.value.message)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300


@pytest.mark.usefixtures("broken")
def test_the_list_of_tasks_survives_broken_ones(capsys):
    assert main(["config", "tasks"]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.keys() == {"fine", *BROKEN} and not err
    assert lines["fine"].startswith("handwritten digits")
    for name, (_, said) in BROKEN.items():
        assert re.match(f"does not load: {said}", lines[name])


def check_in_new_process(tmp_path, task):
    file = tmp_path / "config.toml"
    file.write_text(f'[task]\nname = "{task}"\n')
    code = (
        "import sys; from fedge.shared.cli.main import main;"
        f"status = main(['config', 'check', {str(file)!r}]);"
        "print(status, 'torch' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )


def test_config_check_knows_the_names_without_torch(tmp_path):
    done = check_in_new_process(tmp_path, "digits")
    assert done.stdout.endswith("\n0 False\n") and not done.stderr


def test_config_check_refuses_a_task_that_is_not_installed(tmp_path):
    done = check_in_new_process(tmp_path, "digit")
    assert done.stdout == "1 False\n"
    assert done.stderr.startswith("FE-304 task.name: must be one of ")
    assert "got 'digit' (did you mean digits?)" in done.stderr
