"""`fedge compile` as a whole: children really run, a real engine is built, and what is of another model is refused."""

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fedge.server.release import artefacts as artefact_builds
from fedge.server.release import compile_record
from fedge.server.release.artefacts import Builder
from fedge.server.runs import trained_model
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.cli import main
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Calibration, Counted
from fedge.shared.compile.candidates import CANDIDATES, derived
from fedge.shared.compile.onnx_export import export_onnx, opset_of
from fedge.shared.compile.quantisation import activations
from fedge.shared.compile.targets import parse
from fedge.shared.config import reader
from fedge.shared.crypto.dsse import load_public, new_key
from fedge.shared.errors import ReleaseError, UsageError
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import tensors

pytestmark = pytest.mark.slow
SHAPE = (1, 8, 8)


def write_run(path, seed=0):
    """A finished run of an untrained network, as `fedge simulate` leaves it."""
    task = get_task("digits")
    torch.manual_seed(seed)
    network = task.network().eval()
    data = tensors.encode({key: t.numpy() for key, t in network.state_dict().items()})
    path.mkdir()
    (path / "model.safetensors").write_bytes(data)
    config = reader.from_tree({"task": {"name": "digits"}})
    (path / "config.toml").write_text(reader.dump(config))
    run = {
        "run": "r-1", "state": "finished", "task": "digits", "strategy": "FedAvg", "rounds": 2,
        "rounds_done": 2, "preprocessing": [step.to_json() for step in task.preprocessing],
        "sites": {"site-1": {"train_examples": 3, "test_examples": 1, "rounds": 2}},
        "started": "2026-11-21T20:00:00Z", "finished": "2026-11-21T20:01:00Z",
        "model_sha256": hashlib.sha256(data).hexdigest(), "fedge": "0.1.0", "flower": "1.41.0",
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(run))
    values = {"accuracy": 0.5}
    final = {"round": 2, "per_site": {}, "site_mean": values, "pooled": values}
    (path / "metrics.json").write_text(json.dumps({"run": "r-1", "final": final}))
    return path, network


def calibrate(path, network, accuracy):
    """What sites would have said: ranges that hold every activation of a few inputs, and counts."""
    fp32 = export_onnx(network, SHAPE)
    ranges = dict.fromkeys(activations(fp32), (-8.0, 8.0))
    counted = {}
    for kind in CANDIDATES:
        digest = hashlib.sha256(derived(kind, fp32, ranges)).hexdigest()
        counters = {"correct": 100 * accuracy[kind], "examples": 100.0, "loss-sum": 1.0}
        metrics = {"accuracy": accuracy[kind], "loss": 0.01}
        reference = {"accuracy": accuracy["onnx-fp32"], "loss": 0.01}
        counted[kind] = Counted(digest, 1, 100, counters, metrics, reference=reference)
    model = json.loads((path / "run.json").read_text())["model_sha256"]
    found = Calibration(
        "r-1", model, hashlib.sha256(fp32).hexdigest(), "exact", ("site-1",), 3, ranges, "", counted
    )
    (path / calibration.FILE).write_bytes(calibration.dump(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path, network = write_run(tmp_path_factory.mktemp("compiled") / "run")
    # INT8 for CPUs lost two points, which no speed makes good.
    calibrate(path, network, dict.fromkeys(CANDIDATES, 0.9) | {"onnx-int8": 0.88})
    return path


@pytest.fixture(scope="module")
def artefacts(run):
    """All that the targets give, and what the command printed."""
    out = run.parent / "artefacts"
    wanted = "cpu-int8,tensorrt-rtx:sm86+sm89,tensorrt"
    assert main.main(["compile", str(run), "--targets", wanted, "--out", str(out)]) == 0
    return out


def changed(graph, nodes, **constants):
    """A graph whose logits go through further nodes, from ``"before"`` to ``"logits"``."""
    model = onnx.load_model_from_string(graph)
    for node in model.graph.node:
        node.output[:] = ["before" if name == "logits" else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def wrong(graph):
    """Its logits are two hundredths too large."""
    return changed(
        graph, [helper.make_node("Mul", ["before", "by"], ["logits"])], by=np.float32(1.02)
    )


def crashing(graph):
    """The least int64 divided by -1, which traps."""
    nodes = [
        helper.make_node("Cast", ["before"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mul", ["whole", "none"], ["zeros"]),
        helper.make_node("Add", ["zeros", "least"], ["lowest"]),
        helper.make_node("Div", ["lowest", "minus"], ["too-large"]),
        helper.make_node("Cast", ["too-large"], ["logits"], to=TensorProto.FLOAT),
    ]
    least = np.array(np.iinfo(np.int64).min)
    return changed(graph, nodes, least=least, minus=np.array(-1), none=np.array(0))


def test_a_candidate_that_crashes_or_computes_something_else_is_left_out_with_its_reason(
    tmp_path, monkeypatch
):
    path, network = write_run(tmp_path / "run")
    calibrate(path, network, dict.fromkeys(CANDIDATES, 0.9))

    def made(kind, graph, ranges):
        bad = {"onnx-int8": crashing, "onnx-fp16": wrong}.get(kind)
        return bad(graph) if bad else derived(kind, graph, ranges)

    monkeypatch.setattr(artefact_builds, "derived", made)
    argv = ["compile", str(path), "--targets", "cpu-int8,tensorrt", "--out", str(tmp_path / "out")]
    assert main.main(argv) == 0
    found = compile_record.load(tmp_path / "out")
    assert [a.name for a in found.kept] == ["model.onnx", "model.int8-symmetric.onnx"]
    reasons = {d.name: d.reason for d in found.dropped if not d.on_device}
    assert reasons["model.int8.onnx"] == "does not run here: crashed (SIGFPE)"
    assert reasons["model.fp16.onnx"].startswith("differs by ")
    page = (path / "report.html").read_text()
    for reason in reasons.values():
        assert f"left out</span> {reason}" in page


def test_what_is_proved_and_what_is_not(artefacts, run):
    found = compile_record.load(artefacts)
    kept = {a.name: a.qualification for a in found.kept}
    assert next(iter(kept)) == "model.onnx"
    assert set(kept) == {
        "model.onnx", "model.fp16.onnx", "model.int8-symmetric.onnx",
        "model.fp16.tensorrt-rtx.sm86-sm89.engine", "model.int8.tensorrt-rtx.sm86-sm89.engine",
    }  # fmt: skip
    for name, q in kept.items():
        assert q.executed == name.endswith(".onnx")
        if q.executed:
            assert q.max_abs_difference <= q.tolerance
            assert q.latency.p50_ms > 0
            assert q.score.value == q.score.reference == 0.9
        else:
            assert "FE-710" in q.reason, "there is no GPU here"
    dropped = {d.name: d.reason for d in found.dropped}
    assert dropped["model.int8.onnx"] == "loses 2.0 points of accuracy, more than 1"
    assert "the device builds it at install" in dropped["model.fp16.tensorrt.native.engine"]
    assert sorted(p.name for p in artefacts.iterdir()) == sorted([*kept, compile_record.FILE])
    for a in found.kept:
        assert hashlib.sha256((artefacts / a.name).read_bytes()).hexdigest() == a.sha256
    assert 'id="compiled"' in (run / "report.html").read_text()


def test_the_bundle_holds_what_was_kept(artefacts, run, tmp_path):
    key, out = tmp_path / "key", tmp_path / "model.fedge"
    new_key(key)
    command = ["release", str(run), "--artifacts", str(artefacts), "--key", str(key)]
    assert main.main([*command, "--out", str(out)]) == 0
    bundle = open_bundle(out, load_public(tmp_path / "key.pub"))
    assert bundle.manifest.artefacts == compile_record.load(artefacts).kept
    for name, data in bundle.artefacts.items():
        assert data == (artefacts / name).read_bytes()


def released(run, artefacts, tmp_path, capsys):
    new_key(tmp_path / "key")
    command = ["release", str(run), "--artifacts", str(artefacts), "--key", str(tmp_path / "key")]
    assert main.main([*command, "--out", str(tmp_path / "model.fedge")]) == 1
    assert not (tmp_path / "model.fedge").exists()
    return capsys.readouterr().err


def test_artefacts_of_another_model_are_refused(artefacts, tmp_path, capsys):
    other, _ = write_run(tmp_path / "other", seed=1)
    assert "FE-610" in released(other, artefacts, tmp_path, capsys)


def test_a_changed_artefact_is_refused(artefacts, run, tmp_path, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in artefacts.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    data = bytearray((changed / "model.fp16.onnx").read_bytes())
    data[-1] ^= 1
    (changed / "model.fp16.onnx").write_bytes(data)
    assert "FE-610" in released(run, changed, tmp_path, capsys)


def failing(arguments, capsys):
    assert main.main(["compile", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_int8_without_ranges_is_refused(tmp_path, capsys):
    run, network = write_run(tmp_path / "run")
    wanted = ["--targets", "cpu-int8", "--out", tmp_path / "out"]
    assert "FE-609" in failing([run, *wanted], capsys)
    # Those of another model are none.
    calibrate(run, network, dict.fromkeys(CANDIDATES, 0.9))
    path = run / calibration.FILE
    path.write_bytes(
        path.read_bytes().replace(json.loads(path.read_text())["model_sha256"].encode(), b"0" * 64)
    )
    assert "FE-609" in failing([run, *wanted], capsys)
    assert not (tmp_path / "out").exists()


def test_weights_alone_are_compiled_by_their_tasks_name(tmp_path, capsys):
    run, _ = write_run(tmp_path / "run")
    weights = tmp_path / "elsewhere" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes((run / "model.safetensors").read_bytes())
    out = tmp_path / "out"
    assert "FE-209" in failing([weights, "--out", out], capsys)
    assert "FE-304" in failing([weights, "--task", "nothing", "--out", out], capsys)
    other = failing([weights, "--task", "breast-cancer", "--out", out], capsys)
    assert "FE-504" in other
    assert "Remedy: Name with --task the task" in other
    assert "FE-504" in failing([tmp_path / "nowhere.safetensors", "--out", out], capsys)
    foreign = run / "other.safetensors"
    foreign.write_bytes(tensors.encode({"x": np.ones(1, np.float32)}))
    assert "Remedy: Give a checkpoint of this run" in failing([foreign, "--out", out], capsys)
    assert (
        main.main(["compile", str(weights), "--task", "digits", "--out", str(out), "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert [a["name"] for a in told["kept"]] == ["model.onnx"]
    assert "FE-605" in failing([weights, "--task", "digits", "--out", out], capsys)


def test_a_target_that_could_not_be_built_is_a_failure_once_all_else_is_written(
    tmp_path, capsys, monkeypatch
):
    run, _ = write_run(tmp_path / "run")
    command = (sys.executable, "-c", "import os; os.abort()")
    child = functools.partial(artefact_builds.build_in_child, command=command)
    monkeypatch.setattr(artefact_builds, "build_in_child", child)
    out = tmp_path / "out"
    wanted = ["--targets", "cpu-fp32,tensorrt-rtx:sm86,tensorrt-rtx:sm89", "--out", out, "--json"]
    assert main.main(["compile", str(run), *map(str, wanted)]) == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("FE-611 ")
    assert "got nothing of tensorrt-rtx:sm86, tensorrt-rtx:sm89" in last
    assert "cpu-fp32" not in last
    assert compile_record.load(out).failed == ("tensorrt-rtx:sm86", "tensorrt-rtx:sm89")
    assert json.loads(printed.out) == json.loads((out / compile_record.FILE).read_text())
    assert [a.name for a in compile_record.load(out).kept] == ["model.onnx", "model.fp16.onnx"]
    assert (run / compile_record.FILE).is_file()


def test_a_checkpoint_of_the_final_weights_is_the_model(run, monkeypatch):
    """Its file holds the strategy's memory as well; calibration counts for the weights."""
    folder = run / "checkpoints"
    folder.mkdir()
    weights = tensors.load((run / "model.safetensors").read_bytes())
    data = tensors.encode({f"arrays/{k}": a for k, a in weights.items()} | {"memory/m": np.ones(1)})
    (folder / "round-000002.safetensors").write_bytes(data)
    monkeypatch.chdir(folder)
    found = trained_model.from_checkpoint(Path("round-000002.safetensors"))
    assert (
        found.sha256
        == trained_model.from_run(run).sha256
        == json.loads((run / "run.json").read_text())["model_sha256"]
    )
    assert calibration.load(found.folder / calibration.FILE).model_sha256 == found.sha256


def test_a_task_beside_a_run_of_another_is_refused(run):
    model = run / "model.safetensors"
    assert trained_model.from_checkpoint(model, "digits").task.name == "digits"
    with pytest.raises(UsageError, match="--task: must be 'digits'") as error:
        trained_model.from_checkpoint(model, "breast-cancer")
    assert error.value.code == 102


def test_a_graph_is_made_once_and_an_artefact_kept_once(run):
    data = (run / "model.safetensors").read_bytes()
    network = get_task("digits").network()
    network.load_state_dict(
        {k: torch.from_numpy(np.array(v)) for k, v in tensors.load(data).items()}
    )
    fp32 = export_onnx(network.eval(), SHAPE)
    seen = []
    builder = Builder(fp32, opset_of(fp32), None, lambda *step: seen.append(step[0]))
    outcome = builder.build(parse("cpu-fp32,onnx,tensorrt"))
    assert [b.artefact.name for b in outcome.built] == ["model.onnx", "model.fp16.onnx"]
    failed = {f.kind: f.reason for f in outcome.failed}
    assert failed["tensorrt-fp16"] == "the device builds it at install, of model.fp16.onnx"
    assert "no activation ranges" in failed["tensorrt-int8"]
    assert seen.count("model.fp16.onnx") == 1
    with pytest.raises(ReleaseError, match="FE-609"):
        Builder(fp32, 20, {}, lambda *_: None).build(parse("cpu-int8"))
