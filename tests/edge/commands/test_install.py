from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge.backends.backend import CPU, RTX, Shapes
from fedge.edge.backends.candidates import Candidate
from fedge.edge.backends.cuda import Gpu
from fedge.edge.backends.device import Device
from fedge.edge.backends.engine import load_wheel
from fedge.edge.backends.trial import Timing
from fedge.edge.cli import main
from fedge.edge.installation import engines, writer
from fedge.edge.installation.qualification import Subject, Terms, qualify, ranked
from fedge.edge.installation.record import FILE, Entry, read_record
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.bundle.manifest_artefacts import Engine, Qualification
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import ReleaseError
from fedge.shared.preprocessing.schema import OutputSchema

Capture = pytest.CaptureFixture[str]
NOT_EXECUTED = Qualification(False, "needs a GPU")


@pytest.fixture
def path(compiled: Any, extra: Any, graphs: dict[str, bytes]) -> Path:
    """A bundle with one artefact of each sort, one of which kills its process."""
    engine = Engine("tensorrt-rtx", "1.0", (89,))
    found: Path = compiled(
        extra("model.int8.onnx", "onnx-int8", graphs["int8"], NOT_EXECUTED),
        extra("killer.onnx", "onnx-int8", graphs["killer"], NOT_EXECUTED),
        extra("model.fp16.onnx", "onnx-fp16", graphs["fp16"], NOT_EXECUTED),
        extra("model.s8.onnx", "onnx-int8-symmetric", graphs["int8"], NOT_EXECUTED),
        extra("model.engine", "tensorrt-rtx-fp16", b"engine", NOT_EXECUTED, engine),
    )
    return found


def install(bundle: Path, trust: Path, into: Path, *more: str) -> int:
    argv = ["install", str(bundle), "--trust", str(trust), "--into", str(into), "--seconds", "1"]
    return main([*argv, *more])


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
def test_install_qualifies_everything_and_each_command_takes_the_folder(
    path: Path, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    into = tmp_path / "installed"
    assert install(path, trust, into, "--json") == 0
    out, err = capsys.readouterr()
    assert "trying model.int8.onnx on CPU" in err
    value = json.loads(out)
    record = read_record(into)
    assert record.to_json() == value
    found = {e["artefact"]["name"]: e for e in value["artefacts"]}
    assert (found["model.onnx"]["qualified"], found["model.onnx"]["max_abs_difference"]) == (
        True,
        0,
    )
    int8 = found["model.int8.onnx"]
    assert 0 < int8["max_abs_difference"] <= int8["tolerance"]
    assert 0.9 < int8["agreement"] <= 1
    assert int8["reason"] in ("serves", "right, but no faster than model.onnx on CPU")
    assert int8["p50_ms"] > 0
    assert found["killer.onnx"]["reason"] == "FE-710 killer.onnx on CPU: crashed (SIGFPE)"
    assert found["model.fp16.onnx"]["reason"] == "needs CUDA"
    assert found["model.engine"]["reason"].startswith("needs a GPU (")
    assert found["model.s8.onnx"]["reason"] == "is what engines are built of"
    assert sorted(p.name for p in into.iterdir()) == [".lock", "000001", FILE]
    assert (record.folder / "model.fedge").read_bytes() == path.read_bytes()

    best = record.entries[0].candidate.name
    argv = [str(into), "--trust", str(trust)]
    assert main(["bench", *argv, "--runs", "10", "--parity", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backend"] == best
    assert 0.9 < result["agreement"] <= 1 and result["largest_logit"] > 0
    np.save(tmp_path / "x.npy", np.zeros((2, 6)))
    assert main(["predict", *argv, "--input", str(tmp_path / "x.npy")]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.startswith(
        f"{best}: the fastest of what `fedge-edge install` timed on this device (p50 "
    )
    assert (
        main(["predict", *argv, "--artifact", "model.onnx", "--input", str(tmp_path / "x.npy")])
        == 0
    )
    assert capsys.readouterr().err == "model.onnx on CPU: named by --artifact\n"
    assert main(["verify", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines].count("runs") == 6
    assert any(line.endswith("killer.onnx on CPU: crashed (SIGFPE)") for line in lines)
    assert main(["verify", *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["installed"] == value


@pytest.mark.slow
def test_an_older_bundle_replaces_a_newer_one_only_where_that_is_allowed(
    compiled: Any, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    into = tmp_path / "installed"
    for serial, more, code in ((8, (), 0), (7, (), 1), (8, (), 0), (7, ("--allow-older",), 0)):
        assert install(compiled(serial=serial), trust, into, *more) == code
        assert ("FE-713 serial: must be 8 or more, got 7" in capsys.readouterr().err) == bool(code)


@pytest.mark.slow
def test_a_new_installation_takes_over_and_one_that_fails_changes_nothing(
    compiled: Any, graphs: dict[str, bytes], trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    into = tmp_path / "installed"
    assert install(compiled(), trust, into) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[:3] == ["artefact", "bytes", "p50"]
    assert table.splitlines()[1].endswith("serves")
    before = (into / FILE).read_bytes()
    bad = tmp_path / "bad.fedge"
    bad.write_bytes(compiled().read_bytes()[:-1])
    assert install(bad, trust, into) == 1
    assert install(tmp_path / "missing.fedge", trust, into) == 1
    assert install(compiled(graph=graphs["garbage"]), trust, into) == 1
    err = capsys.readouterr().err
    assert [n in err for n in ("FE-702", "FE-701", "FE-710")] == [True] * 3
    assert (into / FILE).read_bytes() == before
    assert sorted(p.name for p in into.iterdir()) == [".lock", "000001", FILE]
    # From the folder itself; what served last is kept, what served before that goes.
    for number in (2, 3):
        assert install(into, trust, into) == 0
        names = [f"{number - 1:06}", f"{number:06}"]
        assert sorted(p.name for p in into.iterdir()) == [".lock", *names, FILE]
    assert read_record(into).folder.name == "000003"


@pytest.mark.slow
def test_what_a_killed_installation_left_is_swept_away(
    compiled: Any, trust: Path, tmp_path: Path
) -> None:
    into = tmp_path / "installed"
    (into / "000007.partial").mkdir(parents=True)
    (into / "000007.partial" / "model.fedge").write_bytes(b"half")
    mask = os.umask(0o002)
    try:
        assert install(compiled(), trust, into) == 0
    finally:
        os.umask(mask)
    assert sorted(p.name for p in into.iterdir()) == [".lock", "000001", FILE]
    assert read_record(into).folder.name == "000001"


def test_two_installations_do_not_mix(
    compiled: Any, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    into = tmp_path / "installed"
    into.mkdir()
    with (into / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert install(compiled(), trust, into) == 1
    assert "another installation is under way" in capsys.readouterr().err
    assert install(compiled(), trust, tmp_path / "no" / "folder") == 1
    assert "FE-107" in capsys.readouterr().err


def _tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and contents of all that is in a folder, and of itself."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize(
    "held",
    ["notes.txt", ".bashrc", "202401/photo.jpg", "a.partial/half", FILE, "model.fedge", "bin/x"],
)
def test_a_folder_of_something_else_is_left_as_it_was(
    held: str, compiled: Any, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    into = tmp_path / "home"
    (into / held).parent.mkdir(parents=True)
    (into / held).write_bytes(b"mine")
    before = _tree(into)
    assert install(compiled(), trust, into) == 1
    err = capsys.readouterr().err
    assert f"FE-206 {into}: must be new, empty or an earlier installation" in err
    assert f"got {held.split('/')[0]!r} in it" in err and "--into" in err
    assert _tree(into) == before


@pytest.mark.slow
def test_an_installation_is_known_by_its_bundles_or_its_record(
    compiled: Any, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    """So that installing again repairs it, and files beside it stay."""
    into = tmp_path / "installed"
    into.mkdir()
    assert install(compiled(), trust, into) == 0
    (into / "statistics.json").write_text("{}")
    (into / "a.partial").mkdir()
    (into / FILE).write_text("damaged")
    assert install(compiled(), trust, into) == 0
    (into / "000002" / "model.fedge").unlink()
    assert install(compiled(), trust, into) == 0
    names = sorted(p.name for p in into.iterdir())
    assert names == [".lock", "000002", "000003", "a.partial", FILE, "statistics.json"]
    # Of a first one that failed nothing but this is left.
    failed = tmp_path / "failed"
    assert install(tmp_path / "missing.fedge", trust, failed) == 1
    assert [p.name for p in failed.iterdir()] == [".lock"]
    (failed / "tensorrt.timing-cache").write_bytes(b"timings")
    assert install(compiled(), trust, failed) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_a_sites_own_statistics_are_stood_in_for(
    site_bundle: Path, trust: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert install(site_bundle, trust, tmp_path / "installed", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["artefacts"]
    assert (entry["qualified"], entry["agreement"]) == (True, 1.0)


def test_what_is_right_but_slow_does_not_serve(extra: Any) -> None:
    def entry(name: str, p50: float | None, qualified: bool = True) -> Entry:
        kind = "onnx-fp32" if name == "fp32" else "onnx-int8"
        return Entry(extra(name, kind, b"x").artefact, CPU, False, qualified, "why", p50)

    found = ranked(
        [
            entry("fp32", 1.0),
            entry("slow", 1.0),
            entry("wrong", 0.1, False),
            entry("a", 0.5),
            entry("b", 0.2),
        ]
    )
    assert [(e.artefact.name, e.qualified, e.reason) for e in found] == [
        ("b", True, "serves"),
        ("a", True, "stands by"),
        ("fp32", True, "stands by"),
        ("slow", False, "right, but no faster than fp32 on CPU"),
        ("wrong", False, "why"),
    ]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ReleaseError(611, "engine: no kernel"), "FE-611 engine: no kernel"),
        (ValueError("sizes: no such axis"), "ValueError: sizes: no such axis"),
    ],
)
def test_engines_are_built_of_the_graphs_for_this_gpu(
    path: Path,
    trust: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    message: str,
) -> None:
    requests: list[tuple[bytes, Engine]] = []

    def build(onnx: bytes, engine: Engine, directory: Path, progress: Any) -> bytes:
        requests.append((onnx, engine))
        if len(requests) == 2:
            raise failure
        return b"engine"

    monkeypatch.setattr(engines, "_build", build)
    bundle = open_bundle(path, load_public(trust))
    device = Device("cpu", (CPU,), Gpu("GPU", 89), "", {"tensorrt-rtx": "1.7.1"})
    fp16, int8 = engines.build_all(bundle, device, tmp_path, lambda text: None)
    graph = bundle.artefacts["model.fp16.onnx"]
    assert requests[0] == (graph, Engine("tensorrt-rtx", "1.7.1", (89,)))
    assert (fp16.candidate.artefact.name, fp16.candidate.place) == (
        "tensorrt-rtx-fp16.sm89.engine",
        RTX,
    )
    assert (fp16.data, fp16.built, fp16.candidate.refused) == (b"engine", True, "")
    assert int8.candidate.refused == message
    # Nothing to do without a GPU, or where the bundle's own engine fits.
    assert list(engines.build_all(bundle, Device("cpu"), tmp_path, lambda text: None)) == []
    requests.clear()
    fits = Device("cpu", (CPU,), Gpu("GPU", 89), "", {"tensorrt-rtx": "1.0"})
    built = engines.build_all(bundle, fits, tmp_path, lambda text: None)
    assert [s.candidate.artefact.kind for s in built] == ["tensorrt-rtx-int8"]


@pytest.mark.slow
def test_an_engine_is_really_built_where_the_wheel_is(
    graphs: dict[str, bytes], tmp_path: Path
) -> None:
    """TensorRT for RTX builds without a GPU; what is built here cannot be run here."""
    wheel = load_wheel("tensorrt-rtx")
    if wheel is None:
        pytest.skip("needs tensorrt_rtx")
    result: list[str] = []
    engine = Engine("tensorrt-rtx", str(wheel.__version__), (89,))
    data = engines._build(graphs["fp16"], engine, tmp_path, result.append)
    assert len(data) > 1000
    assert result == sorted(result, key=lambda text: int(text.strip(" %")))
    with pytest.raises(ReleaseError) as error:
        engines._build(graphs["garbage"], engine, tmp_path, result.append)
    assert error.value.code == 611


def test_timings_that_others_could_have_written_are_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tensorrt.timing-cache"
    tmp_path.chmod(0o755)
    assert engines._timings(path) is None
    writer.write_replacing(path, b"timings")
    assert engines._timings(path) == b"timings"
    assert not caplog.text
    for changed, mode, usual in (
        (path, 0o664, 0o644),
        (path, 0o646, 0o644),
        (tmp_path, 0o777, 0o755),
    ):
        caplog.clear()
        changed.chmod(mode)
        assert engines._timings(path) is None
        assert f"{changed}: must be writable by its owner only (chmod go-w)" in caplog.text
        assert "tensorrt.timing-cache is left aside" in caplog.text
        changed.chmod(usual)
    assert engines._timings(path) == b"timings"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_timings_of_another_user_are_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "tensorrt.timing-cache"
    writer.write_replacing(path, b"timings")
    tmp_path.chmod(0o755)
    os.chown(path, 12345, 12345)
    assert engines._timings(path) is None


@pytest.mark.slow
def test_int8_that_contradicts_fp32_does_not_serve(extra: Any, graph_of: Any) -> None:
    """Its logits are within a quarter of the largest; its labels are others."""
    weights = np.asarray([[1.0, 0.9, 0.8]] * 6)
    graphs = [graph_of((1, 2, 3), w) for w in (weights, weights[:, ::-1])]
    kinds = ("onnx-fp32", "onnx-int8")
    graph, int8 = (
        Subject(Candidate(extra(k, k, g).artefact, CPU), g)
        for k, g in zip(kinds, graphs, strict=True)
    )
    output = OutputSchema(labels=("x", "y", "z"), activation="softmax")
    batches = [np.random.default_rng(0).random((10, 1, 2, 3)).astype(np.float32)]
    terms = Terms(batches, Shapes((1, 2, 3), 3), output, 1, Timing(1, 1.0))
    serves, refused = qualify(graph, [int8], terms, lambda _: None)
    assert (serves.artefact.kind, serves.qualified) == ("onnx-fp32", True)
    assert not refused.qualified
    assert refused.reason == (
        "must agree with the fp32 graph's labels on 90% of the inputs, got 0%"
    )
    assert refused.max_abs_difference is not None and refused.tolerance is not None
    assert refused.max_abs_difference < refused.tolerance
