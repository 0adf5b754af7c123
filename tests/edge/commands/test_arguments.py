"""What a device asks of a bundle besides its signature: the task, and that it is no older one that was signed once."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.edge.cli import main
from fedge.shared.bundle.manifest import Manifest


@pytest.fixture
def run(bundle_of, trust, tmp_path, capsys):
    """Runs a command on a bundle with this serial; gives its status, stdout and stderr."""
    rows = tmp_path / "rows.npy"

    def call(command, serial, *words):
        path = bundle_of(serial=serial)
        name = [str(path), "--trust", str(trust), *words]
        if command == "predict":
            np.save(rows, np.zeros((2, 3), np.float32))
            name += ["--input", str(rows)]
        if command == "install":
            name += ["--into", str(tmp_path / "installed")]
        if command == "bench":
            name += ["--runs", "1"]
        status = main([command, *name])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.mark.parametrize("command", ["verify", "predict", "bench", "install"])
def test_a_bundle_of_another_task_or_an_older_one_is_refused(run, command, tmp_path):
    status, out, err = run(command, 7, "--task", "other")
    assert (status, out) == (1, "")
    assert err.startswith("FE-712 task: must be 'other', got ")
    status, out, err = run(command, 7, "--not-older-than", "8")
    assert (status, out) == (1, "")
    assert err.startswith("FE-713 serial: must be 8 or more, got 7")
    assert not (tmp_path / "installed" / "installed.json").exists()


def test_the_same_or_a_newer_one_is_taken_and_its_serial_is_printed(run):
    for serial in (7, 8):
        status, out, _ = run("verify", serial, "--not-older-than", "7")
        assert status == 0
        assert f"serial      {serial}\n" in out or f"serial {serial}" in " ".join(out.split())
    # One of an earlier fedge has none, and is older than all that have.
    status, out, _ = run("verify", 0)
    assert status == 0
    assert "serial" not in out
    assert run("verify", 0, "--not-older-than", "1")[2].startswith("FE-713")


def test_a_manifest_without_a_serial_keeps_its_bytes(bundle_of, trust):
    from fedge.shared.bundle.bundle import open_bundle
    from fedge.shared.crypto.dsse import load_public

    plain = open_bundle(bundle_of(), load_public(trust)).manifest
    assert b"serial" not in plain.to_bytes()
    newer = open_bundle(bundle_of(serial=9), load_public(trust)).manifest
    assert Manifest.from_bytes(newer.to_bytes()) == newer
    assert newer.serial == 9
