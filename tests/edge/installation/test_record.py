from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedge.edge.backends import open_artefact
from fedge.edge.backends.backend import CPU, RTX
from fedge.edge.backends.device import cpu_name, runtime_versions
from fedge.edge.installation.folder import open_installed, source, watched
from fedge.edge.installation.record import BUNDLE, FILE, DeviceRecord, Entry, read_record
from fedge.edge.runtime import choice
from fedge.edge.runtime.model import EdgeModel
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.bundle.manifest_artefacts import Engine
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import BundleError

FIGURES = (0.1, 0.2, 30.0, 0.01, 0.1, 1.0)
ENGINE = Engine("tensorrt-rtx", "1.7.1", (89,))


@pytest.fixture
def installation(
    compiled: Any, extra: Any, graphs: dict[str, bytes], trust: Path, tmp_path: Path
) -> tuple[Path, DeviceRecord]:
    """A folder as `install` leaves it: int8, then an engine that was built here, then fp32."""
    directory = tmp_path / "installed"
    folder = directory / "000001"
    folder.mkdir(parents=True)
    int8 = extra("model.int8.onnx", "onnx-int8", graphs["int8"])
    compiled(int8).rename(folder / BUNDLE)
    bundle = open_bundle(folder / BUNDLE, load_public(trust))
    engine = extra("rtx.engine", "tensorrt-rtx-fp16", b"built here", None, ENGINE).artefact
    (folder / engine.name).write_bytes(b"built here")
    record = DeviceRecord(
        folder,
        "a" * 64,
        bundle.parts[1].sha256,
        cpu_name(),
        "",
        runtime_versions(),
        1,
        (
            Entry(int8.artefact, CPU, False, True, "serves", *FIGURES),
            Entry(engine, RTX, True, False, "slow", None),
            Entry(bundle.manifest.artefacts[0], CPU, False, True, "stands by", *FIGURES),
        ),
    )
    write(directory, record.to_json())
    return directory, record


def write(directory: Path, value: Any) -> None:
    (directory / FILE).write_text(json.dumps(value))
    (directory / FILE).chmod(0o644)


def test_a_record_comes_back_as_it_was_written(
    installation: tuple[Path, DeviceRecord], trust: Path
) -> None:
    directory, record = installation
    found = read_record(directory)
    assert found.to_json() == record.to_json()
    assert found.entries[0].p50_ms == 0.1
    assert found.entries[1].artefact.engine == ENGINE
    bundle, same = open_installed(directory, load_public(trust))
    assert same == found
    assert bundle.manifest.task == "compiled"
    assert watched(directory) == directory / FILE
    assert source(directory) == record.folder / BUNDLE
    assert watched(record.folder / BUNDLE) == source(record.folder / BUNDLE)


def test_what_was_installed_serves_without_a_trial(
    installation: tuple[Path, DeviceRecord], trust: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    directory, record = installation
    bundle, found = open_installed(directory, load_public(trust))
    model = EdgeModel.from_bundle(bundle, record=found)
    assert (model.backend, model.fallbacks) == ("model.int8.onnx on CPU", ())
    first, *others = record.entries
    slower = replace(record, entries=(*reversed(others), first))
    assert EdgeModel.from_bundle(bundle, record=slower).backend == "model.onnx on CPU"


def _built_first(record: DeviceRecord) -> DeviceRecord:
    first, engine, last = record.entries
    return replace(record, entries=(replace(engine, qualified=True), first, last))


@pytest.mark.usefixtures("patient", "no_gpu")
def test_an_engine_that_does_not_open_leaves_the_rest_of_the_record_in_use(
    installation: tuple[Path, DeviceRecord], trust: Path
) -> None:
    directory, record = installation
    bundle, _ = open_installed(directory, load_public(trust))
    model = EdgeModel.from_bundle(bundle, record=_built_first(record))
    assert model.backend == "model.int8.onnx on CPU"
    assert model.fallbacks == ("FE-710 device: has no CUDA driver",)


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_that_was_built_here_can_be_named(
    installation: tuple[Path, DeviceRecord], trust: Path
) -> None:
    directory, record = installation
    bundle, _ = open_installed(directory, load_public(trust))
    for change, code in ((b"built here", 710), (b"built herf", 711)):
        (record.folder / "rtx.engine").write_bytes(change)
        with pytest.raises(BundleError) as error:
            EdgeModel.from_bundle(bundle, record=record, artefact="rtx.engine")
        assert error.value.code == code
    with pytest.raises(BundleError) as error:
        EdgeModel.from_bundle(bundle, record=record, artefact="other")
    assert error.value.message.endswith("model.int8.onnx, rtx.engine, got 'other'")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_another_gpu_than_the_recorded_one_puts_the_record_aside(
    installation: tuple[Path, DeviceRecord], trust: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend says what it computes on; that of this test lies."""
    directory, record = installation
    bundle, _ = open_installed(directory, load_public(trust))

    def elsewhere(*arguments: Any, **more: Any) -> Any:
        backend = open_artefact.open_artefact(*arguments, **more)
        backend.device = "Another GPU"  # type: ignore[misc]
        return backend

    monkeypatch.setattr(choice, "open_artefact", elsewhere)
    model = EdgeModel.from_bundle(bundle, record=replace(record, gpu="One GPU"))
    reason = f"FE-711 {FILE}: must be of this device, got none for its Another GPU"
    assert model.fallbacks == (reason,)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "gone"])
@pytest.mark.usefixtures("patient")
def test_a_changed_engine_puts_the_record_aside(
    installation: tuple[Path, DeviceRecord], trust: Path, damage: str
) -> None:
    directory, record = installation
    path = record.folder / "rtx.engine"
    changed = {"flipped": b"built herf", "shorter": b"built", "longer": b"built here!"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    bundle, _ = open_installed(directory, load_public(trust))
    model = EdgeModel.from_bundle(bundle, record=_built_first(record))
    assert model.fallbacks[0].startswith("FE-711 rtx.engine: ")
    # As without a record: what was executed at the release is tried and serves.
    assert model.backend == "model.int8.onnx on CPU"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"manifest_sha256": "b" * 64}, "must be of this bundle"),
        ({"cpu": "another"}, "must be of this device, got that of another"),
        ({"versions": {"onnxruntime": "1.0"}}, "must be made with onnxruntime "),
    ],
)
@pytest.mark.usefixtures("patient")
def test_a_record_of_something_else_is_reported_and_ignored(
    installation: tuple[Path, DeviceRecord],
    trust: Path,
    change: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory, record = installation
    bundle, _ = open_installed(directory, load_public(trust))
    model = EdgeModel.from_bundle(bundle, record=replace(record, **change))
    assert model.fallbacks[0].startswith(f"FE-711 {FILE}: {reason}")
    assert reason in caplog.text
    assert model.backend == "model.int8.onnx on CPU"


def _no_format(value: Any) -> Any:
    return {**value, "format": "fedge.installed/2"}


@pytest.mark.parametrize(
    "change",
    [
        _no_format,
        lambda value: [],
        lambda value: {k: v for k, v in value.items() if k != "artefacts"},
        lambda value: {**value, "folder": "../000001"},
        lambda value: {**value, "folder": "/etc"},
        lambda value: {**value, "manifest_sha256": "A" * 64},
        lambda value: {**value, "threads": True},
        lambda value: {**value, "artefacts": [{**value["artefacts"][0], "place": "elsewhere"}]},
        lambda value: {**value, "artefacts": [{**value["artefacts"][0], "qualified": 1}]},
        lambda value: {
            **value,
            "artefacts": [
                {
                    **value["artefacts"][1],
                    "artefact": {**value["artefacts"][1]["artefact"], "name": "../engine"},
                }
            ],
        },
    ],
)
def test_a_record_that_does_not_parse_is_left_aside(
    installation: tuple[Path, DeviceRecord],
    trust: Path,
    change: Callable[[Any], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory, record = installation
    write(directory, change(record.to_json()))
    with pytest.raises(BundleError) as error:
        read_record(directory)
    assert error.value.code == 711
    bundle, found = open_installed(directory, load_public(trust))
    assert found is None
    assert bundle.manifest.task == "compiled"
    assert "FE-711" in caplog.text


def test_a_record_that_others_may_write_is_left_aside(
    installation: tuple[Path, DeviceRecord], trust: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _ = installation
    for mode in (0o664, 0o646):
        (directory / FILE).chmod(mode)
        assert open_installed(directory, load_public(trust))[1] is None
    assert "must be writable by its owner only" in caplog.text
    if os.geteuid() == 0:
        (directory / FILE).chmod(0o644)
        os.chown(directory / FILE, 12345, 12345)
        assert open_installed(directory, load_public(trust))[1] is None
        assert "must belong to this user or root" in caplog.text


def test_garbage_in_place_of_everything_is_refused(
    installation: tuple[Path, DeviceRecord], trust: Path
) -> None:
    directory, record = installation
    for data in (b"", b"\xff", b"[" * 100_000, b" " * (2**20 + 1)):
        (directory / FILE).write_bytes(data)
        assert open_installed(directory, load_public(trust))[1] is None
    (record.folder / BUNDLE).write_bytes(b"nothing")
    with pytest.raises(BundleError) as error:
        open_installed(directory, load_public(trust))
    assert error.value.code == 711


def test_the_newest_bundle_that_verifies_is_taken(
    installation: tuple[Path, DeviceRecord], trust: Path, compiled: Any
) -> None:
    directory, _ = installation
    (directory / "000002").mkdir()
    compiled().rename(directory / "000002" / BUNDLE)
    (directory / "000003").mkdir()
    (directory / "000003" / BUNDLE).write_bytes(b"half of it")
    (directory / FILE).unlink()
    bundle, record = open_installed(directory, load_public(trust))
    assert record is None
    assert len(bundle.artefacts) == 1


def test_an_empty_folder_is_no_installation(tmp_path: Path, trust: Path) -> None:
    with pytest.raises(BundleError) as error:
        open_installed(tmp_path, load_public(trust))
    assert error.value.code == 701


def test_an_order_that_was_timed_with_other_threads_is_reported(
    installation: tuple[Path, DeviceRecord], trust: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bundle, record = open_installed(installation[0], load_public(trust))
    for threads, reason in ((1, False), (2, True)):
        caplog.clear()
        model = EdgeModel.from_bundle(bundle, record=record, threads=threads)
        assert model.backend == "model.int8.onnx on CPU"
        assert ("timed with --threads 1, and this runs with 2" in caplog.text) is reason
