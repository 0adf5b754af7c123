from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedge.edge
from fedge.edge.backends.device import cpu_name
from fedge.edge.cli import COMMANDS, main
from fedge.shared.bundle.manifest_privacy import Privacy

Capture = pytest.CaptureFixture[str]
ONLY = "model.onnx on CPU: the bundle's only artefact\n"
ALLOWED = ("numpy", "onnxruntime", "cryptography", "cffi", "_cffi_backend", "fedge")


def _json(capsys: Capture, *argv: object) -> Any:
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == (ONLY if argv[0] == "predict" else "")
    return json.loads(out)


def _error(capsys: Capture, status: int, *argv: object) -> str:
    assert main([str(word) for word in argv]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_verify_shows_the_contents_of_the_bundle(
    capsys: Capture, image_bundle: Path, trust: Path
) -> None:
    assert main(["verify", str(image_bundle), "--trust", str(trust)]) == 0
    out = capsys.readouterr().out
    for text in (
        "r-1",
        "FedAvg, 3 rounds",
        "2: a, b",
        "model.onnx",
        "x, y, z",
        "1e-07",
        "0.9 pooled",
    ):
        assert text in out
    assert len(out.splitlines()) <= 24

    found = _json(capsys, "verify", image_bundle, "--trust", trust, "--json")
    assert found["verified"] is True
    assert found["manifest"]["input"] == {"shape": [2, 3], "dtype": "float32", "features": []}
    assert found["manifest"]["output"]["labels"] == ["x", "y", "z"]
    assert [p["name"] for p in found["parts"]] == [
        "statement.dsse.json",
        "manifest.json",
        "model.onnx",
    ]
    assert found["statement"]["subject"][1]["digest"]["sha256"] == found["parts"][2]["sha256"]
    assert found["key_id"] in out


def test_verify_says_whether_a_site_must_bring_its_statistics(
    capsys: Capture, table_bundle: Path, site_bundle: Path, trust: Path
) -> None:
    for bundle, shown in ((table_bundle, False), (site_bundle, True)):
        found = _json(capsys, "verify", bundle, "--trust", trust, "--json")
        assert found["site_statistics"] is shown
        assert main(["verify", str(bundle), "--trust", str(trust)]) == 0
        lines_shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        line = ["statistics", "each site's own: pass --statistics to predict and bench"]
        assert (line in lines_shown) is shown
        assert ("statistics" in {key for key, _ in lines_shown}) is shown


def test_verify_shows_what_protects_the_examples_and_what_does_not(
    capsys: Capture, bundle_of: Callable[..., Path], image_bundle: Path, trust: Path
) -> None:
    def privacy_line(bundle: Path) -> str:
        assert main(["verify", str(bundle), "--trust", str(trust)]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        return lines["privacy"]

    assert privacy_line(image_bundle) == "none"
    record = Privacy("example", 1.0, 1.0, {"a": "d" * 64}, unit="example", metrics="unprotected")
    bundle = bundle_of(task="private", privacy=record)
    assert (
        privacy_line(bundle) == "example, noise multiplier 1, clipping bound 1; metrics unprotected"
    )
    found = _json(capsys, "verify", bundle, "--trust", trust, "--json")
    assert found["statement"]["predicate"]["privacy"] == record.to_json()
    assert found["manifest"]["privacy"] == record.to_json()


def test_verify_shows_the_schema_of_a_table(
    capsys: Capture, table_bundle: Path, trust: Path
) -> None:
    found = _json(capsys, "verify", table_bundle, "--trust", trust, "--json")
    features = found["manifest"]["input"]["features"]
    assert [(f["name"], f["unit"], f["categories"]) for f in features][:2] == [
        ("age", "years", []),
        ("pain", "", [1.0, 2.0, 3.0]),
    ]


def test_predict_prints_a_json_object_a_row(
    capsys: Capture, image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).random((2050, 2, 3))
    np.save(tmp_path / "x.npy", x)
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(x.reshape(len(x), -1).tolist())
    outputs = []
    for name in ("x.npy", "x.csv"):
        argv = [
            "predict",
            str(image_bundle),
            "--trust",
            str(trust),
            "--input",
            str(tmp_path / name),
        ]
        assert main(argv) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["row"] for row in rows] == list(range(2050))
    logits = x.reshape(-1, 6) * 0.5 @ (np.arange(18).reshape(6, 3) / 6)
    for row, expected in zip(
        rows, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), strict=True
    ):
        assert list(row["probabilities"]) == ["x", "y", "z"]
        np.testing.assert_allclose(list(row["probabilities"].values()), expected, rtol=1e-5)
        assert row["index"] == int(expected.argmax())
        assert row["label"] == "xyz"[row["index"]]
        assert row["probability"] == row["probabilities"][row["label"]]


def test_predict_of_one_logit_gives_both_labels(
    capsys: Capture, table_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("pain,age,pulse\n2,50,90\n")
    row = _json(capsys, "predict", table_bundle, "--trust", trust, "--input", tmp_path / "x.csv")
    assert list(row["probabilities"]) == ["no", "yes"]
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert row["label"] == ("yes" if row["probabilities"]["yes"] >= 0.25 else "no")


def test_predict_with_a_sites_own_statistics(
    capsys: Capture, site_bundle: Path, table_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("50,2,90\n")
    argv = ["predict", site_bundle, "--trust", trust, "--input", tmp_path / "x.csv"]
    assert "FE-807" in _error(capsys, 1, *argv)
    found = []
    for mean in (90.0, 40.0):
        text = json.dumps({"mean": [50, mean, 0.25, 0.25], "std": [10, 20, 0.5, 0.5]})
        (tmp_path / "s.json").write_text(text)
        found.append(_json(capsys, *argv, "--statistics", tmp_path / "s.json")["probabilities"])
    assert found[0] != found[1]
    (tmp_path / "s.json").write_text('{"mean": [1], "std": [1]}')
    assert "FE-807" in _error(capsys, 1, *argv, "--statistics", tmp_path / "s.json")


def test_statistics_for_a_model_that_holds_its_own_are_refused(
    capsys: Capture, table_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("50,2,90\n")
    text = json.dumps({"mean": [50, 40, 0.25, 0.25], "std": [10, 20, 0.5, 0.5]})
    (tmp_path / "s.json").write_text(text)
    own = ["--trust", trust, "--statistics", tmp_path / "s.json"]
    for argv in (
        ["predict", table_bundle, *own, "--input", tmp_path / "x.csv"],
        ["bench", table_bundle, *own],
    ):
        error = _error(capsys, 1, *argv)
        assert error.startswith(
            "FE-807 this model was trained with one mean and standard deviation"
        )
        assert "leave --statistics out" in error


def test_predict_names_the_columns_outside_the_schema(
    capsys: Capture, table_bundle: Path, image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("20,1,220\n19.99,2,90\n50,3,221\n1e30,1,-1\n100,3,30\n")
    argv = ["predict", table_bundle, "--trust", trust, "--input", tmp_path / "x.csv"]
    assert main([str(word) for word in argv]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [row.get("outside") for row in rows]
    assert found == [None, ["age"], ["pulse"], ["age", "pulse"], None]

    np.save(tmp_path / "x.npy", np.full((1, 6), 1e6))
    row = _json(capsys, "predict", image_bundle, "--trust", trust, "--input", tmp_path / "x.npy")
    assert "outside" not in row  # there is no feature that could say


def test_bench_measures(capsys: Capture, table_bundle: Path, trust: Path) -> None:
    argv = ["bench", table_bundle, "--trust", trust, "--runs", 20, "--batch", 3, "--threads", 2]
    found = _json(capsys, *argv, "--json")
    assert (found["runs"], found["batch"], found["threads"]) == (20, 3, 2)
    assert (found["artefact"], found["backend"]) == ("model.onnx", "model.onnx on CPU")
    assert found["device"] == cpu_name()
    assert "agreement" not in found
    assert 0 < found["p50_ms"] <= found["p99_ms"] < 60_000
    assert found["p50_ms"] <= found["predict_p99_ms"]
    assert found["items_per_second"] > 0
    assert 10 < found["peak_rss_mb"] < 10_000
    assert found["load_ms"] > 0
    assert main([str(word) for word in argv]) == 0
    assert "p99" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        (lambda data: data[:-1530] + b"\x01" + data[-1529:], "FE-704 model.onnx: "),
        (lambda data: data[:520] + b"\x01" + data[521:], "FE-702 statement.dsse.json: "),
        (lambda data: data + b"\0", "FE-702 archive end: "),
        (lambda data: b"", "FE-702 archive header of statement.dsse.json: "),
        (lambda data: os.urandom(5000), "FE-702 archive header of statement.dsse.json: "),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_bundle_is_refused_by_every_command(
    capsys: Capture,
    image_bundle: Path,
    trust: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[bytes], bytes],
    label: str,
) -> None:
    bad = tmp_path / "bad.fedge"
    bad.write_bytes(damage(image_bundle.read_bytes()))
    np.save(tmp_path / "x.npy", np.zeros((1, 6)))
    more = {"predict": ["--input", tmp_path / "x.npy"], "install": ["--into", tmp_path / "d"]}
    more = more.get(command, [])
    assert _error(capsys, 1, command, bad, "--trust", trust, *more).startswith(label)


def test_errors_of_files(capsys: Capture, image_bundle: Path, trust: Path, tmp_path: Path) -> None:
    assert "FE-701" in _error(capsys, 1, "verify", tmp_path, "--trust", trust)
    assert "FE-701" in _error(capsys, 1, "verify", tmp_path / "a\nb", "--trust", trust)
    assert "FE-707" in _error(capsys, 1, "verify", image_bundle, "--trust", image_bundle)
    assert "FE-707" in _error(capsys, 1, "verify", image_bundle, "--trust", tmp_path)
    predict = ["predict", image_bundle, "--trust", trust, "--input"]
    assert "FE-801" in _error(capsys, 1, *predict, tmp_path / "missing.npy")
    assert "FE-801" in _error(capsys, 1, *predict, image_bundle)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["destroy"],
        ["verify"],
        ["verify", "x"],
        ["verify", "x", "--trust", "y", "--more"],
        ["predict", "x", "--trust", "y"],
        ["bench", "x", "--trust", "y", "--threads", "0"],
        ["bench", "x", "--trust", "y", "--threads", "many"],
        ["bench", "x", "--trust", "y", "--batch", "-1"],
    ],
)
def test_wrong_usage_exits_with_2(capsys: Capture, argv: list[str]) -> None:
    assert "FE-102 fedge-edge" in _error(capsys, 2, *argv)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_shows_an_example(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"] if command else ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # With as many options as a server has, help may scroll.
    assert len(lines) <= {"serve": 53, "bench": 31, "install": 28}.get(command, 24)
    assert max(map(len, lines)) <= 80
    assert "example:" in lines
    assert lines[lines.index("example:") + 1].startswith("  fedge-edge ")


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    name, number = capsys.readouterr().out.split()
    assert name == "fedge-edge"
    assert number[0].isdigit()


def _child(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedge.edge", *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )


@pytest.mark.slow
def test_as_a_process(image_bundle: Path, trust: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 6)))
    argv = ["predict", image_bundle, "--trust", trust, "--input", tmp_path / "x.npy"]
    done = _child(*argv)
    assert (done.returncode, done.stderr) == (0, ONLY)
    assert json.loads(done.stdout)["label"] in "xyz"
    np.save(tmp_path / "x.npy", np.full((1, 6), np.nan))
    done = _child(*argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("FE-804 row 0, column 0: must be finite")
    assert done.stderr.count("\n") == 1
    assert _child("verify").returncode == 2


@pytest.mark.slow
def test_onnx_runtime_leaves_nothing_behind(
    image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    """Its telemetry would write a device's number below the user's home."""
    np.save(tmp_path / "x.npy", np.zeros((1, 6)))
    (home := tmp_path / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    for argv in (
        ["predict", image_bundle, "--trust", trust, "--input", tmp_path / "x.npy"],
        ["bench", image_bundle, "--trust", trust, "--runs", "5"],
    ):
        done = _child(*argv, env={**kept, "HOME": str(home)})
        assert (done.returncode, done.stderr.replace(ONLY, "")) == (0, "")
        assert list(home.rglob("*")) == []


def test_onnx_runtime_is_loaded_in_one_place_only() -> None:
    """Its tools may be imported elsewhere, but not before that place has loaded it."""
    root = Path(fedge.edge.__file__).parents[1]
    loads = re.compile(r"^\s*(?:import|from) onnxruntime", re.MULTILINE)
    found = set()
    for component in ("client", "edge", "server", "shared", "simulations"):
        for path in (root / component).rglob("*.py"):
            text = path.read_text()
            for match in loads.finditer(text):
                function = text[text.rfind("\ndef ", 0, match.start()) : match.start()]
                if "load_onnxruntime()" not in function:
                    found.add(path.relative_to(root).as_posix())
    assert found == set()


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_no_room_for_the_output_is_one_line(
    image_bundle: Path, trust: Path, unbuffered: str
) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "fedge.edge", "verify", image_bundle, "--trust", trust]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=env, timeout=300, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "FE-107 fedge-edge: cannot write its output (No space left on device)."
        " Remedy: Make room, or write elsewhere.\n"
    )


def test_an_output_that_holds_ascii_only(bundle_of: Callable[..., Path], trust: Path) -> None:
    sites = tuple(f"site-{n}" for n in range(9))
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = _child("verify", bundle_of(sites=sites), "--trust", trust, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "site-7, \\u2026" in done.stdout


def test_csv_from_a_pipe(table_bundle: Path, trust: Path) -> None:
    argv = ["predict", table_bundle, "--trust", trust, "--input", "-"]
    done = _child(*argv, input="age,pain,pulse\n50,1,90\n60,2,100\n")
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == [0, 1]


@pytest.mark.slow
def test_only_the_packages_of_its_extra_are_imported(
    image_bundle: Path, trust: Path, tmp_path: Path
) -> None:
    """Everything beyond the extra's packages and the standard library is made impossible to import."""
    np.save(tmp_path / "x.npy", np.zeros((1, 6)))
    program = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {ALLOWED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if top == "onnxruntime" and sys.argv[1] == "verify":
            raise AssertionError("verify must not need onnxruntime")
        if name.startswith(("fedge.server", "fedge.client", "fedge.simulations")):
            raise AssertionError(name)
sys.meta_path.insert(0, Wall())
from fedge.edge.cli import main
sys.exit(main())
"""
    for argv in (
        ["verify", image_bundle, "--trust", trust],
        ["predict", image_bundle, "--trust", trust, "--input", tmp_path / "x.npy"],
        ["bench", image_bundle, "--trust", trust, "--runs", "5"],
    ):
        command = [sys.executable, "-c", program, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stderr.replace(ONLY, "")) == (0, ""), argv


def test_a_missing_package_names_the_extra(
    capsys: Capture, image_bundle: Path, trust: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = _error(capsys, 1, "bench", image_bundle, "--trust", trust)
    assert error.startswith(
        "FE-101 fedge-edge bench needs fedge with its extra `edge` (onnxruntime"
    )
    assert main(["verify", str(image_bundle), "--trust", str(trust)]) == 0


def _start(*argv: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedge.edge", *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(table_bundle: Path, trust: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.tile([50.0, 1.0, 90.0], (50_000, 1)))
    argv = ["predict", table_bundle, "--trust", trust, "--input", tmp_path / "x.npy"]
    process = _start(*argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.slow
def test_an_interrupt_is_one_line(table_bundle: Path, trust: Path) -> None:
    argv = ["predict", table_bundle, "--trust", trust, "--input", "-"]
    process = _start(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    # More rows than a chunk, so that the first output shows that it is at work.
    process.stdin.write(b"50,1,90\n" * 1025)
    process.stdin.flush()
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.startswith(b"FE-103 fedge-edge: interrupted.")
    assert err.count(b"\n") == 1
