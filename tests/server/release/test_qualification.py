"""Which artefacts are kept: equal to the reference, good on the task, and faster; a crash is a result."""

from dataclasses import replace

import pytest

from fedge.server.release import qualification
from fedge.server.release.qualification import (
    METRIC_BUDGET,
    Timed,
    qualified,
    relative,
    split,
    verdict,
)
from fedge.shared.bundle.manifest_artefacts import Artefact, Engine, Score
from fedge.shared.errors import ReleaseError

RESULT = {
    "p50_ms": 1.0, "p99_ms": 2.0, "batch": 1, "threads": 1, "device": "a CPU", "peak_rss_mb": 50.0,
    "max_abs_difference": 0.0, "largest_logit": 10.0, "agreement": 1.0, "contradicted": 0.0,
    "others": [{"p50_ms": 20.0, "p99_ms": 30.0, "batch": 32}],
}  # fmt: skip
#: Times by those of the fp32 graph, at batch 1 and at batch 32.
FASTER, SLOWER = (0.5, 1.2), (1.01, 1.0)


def artefact(kind="onnx-int8", score=None, failure="", times=FASTER, **result):
    engine = Engine("tensorrt-rtx", "1.7", (86,)) if "rtx" in kind else None
    plain = Artefact(f"{kind}.onnx", kind, "a" * 64, 10, 20, engine)
    return qualified(plain, Timed({} if failure else RESULT | result, failure), score, times)


FP32 = artefact("onnx-fp32")
SAME = Score("accuracy", 0.9, 0.9, 400)
LOSS = Score("loss", 0.5055, 0.5, 400, higher_is_better=False, share=False)


def test_int8_that_is_faster_and_as_good_is_kept():
    fast = artefact(score=SAME, max_abs_difference=1.0, agreement=0.9)
    assert verdict(fast) == ""
    assert fast.qualification.tolerance == 2.5, "a quarter of the largest logit"
    assert split([FP32, fast]) == ((FP32, fast), ())


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            artefact(score=SAME, times=SLOWER),
            "is no faster than fp32 here: 1.01 times its time at batch 1, 1.00 at batch 32",
        ),
        (artefact(score=SAME, times=None), "was not timed beside fp32"),
        (artefact(contradicted=0.02), "another label than fp32 for 2.0 % of generated inputs"),
        (artefact(score=replace(SAME, value=0.889)), "loses 1.1 points of accuracy"),
        (artefact(score=LOSS), "its loss is 1.1 % worse, more than 1 %"),
        (artefact(score=SAME, max_abs_difference=2.6), "differs by 2.6"),
        (artefact(score=SAME, failure="crashed (SIGSEGV)"), "does not run here: crashed (SIGSEGV)"),
        (artefact("onnx-fp16", max_abs_difference=0.2), "differs by 0.2 from fp32, more than 0.1"),
        (artefact("onnx-fp16", replace(SAME, value=0.8), "FE-710 x"), "loses 10.0 points"),
        (artefact("onnx-fp16", failure="FE-709 x"), "gives NaN or infinity"),
        (artefact("onnx-int8-symmetric", contradicted=0.1), "no site has counted its metric"),
    ],
)
def test_what_is_not_worth_it_is_left_out_with_its_reason(found, reason):
    assert reason in verdict(found)
    kept, dropped = split([FP32, found])
    assert kept == (FP32,)
    assert reason in dropped[0].reason
    assert dropped[0].qualification == found.qualification


@pytest.mark.parametrize(
    "found",
    [
        artefact("tensorrt-rtx-fp16", failure="FE-710 no CUDA driver"),
        # The same graph may run on a GPU: onnxruntime crashes on some in half precision on a CPU.
        artefact("onnx-fp16", failure="crashed (SIGSEGV)"),
        artefact("onnx-int8-symmetric", score=SAME, times=SLOWER),
        # Where no site could count its metric parity alone judges.
        artefact("onnx-int8-symmetric", agreement=0.97, contradicted=0.005),
    ],
)
def test_what_is_for_another_machine_ships(found):
    assert verdict(found) == ""
    executed = found.qualification.executed
    assert executed == (found.kind == "onnx-int8-symmetric")
    assert bool(found.qualification.reason) != executed


ENGINE = artefact("tensorrt-rtx-int8", failure="FE-710 fails to run")


def test_an_engine_goes_with_its_graph():
    good = artefact("onnx-int8-symmetric", SAME)
    assert split([FP32, good, ENGINE]) == ((FP32, good, ENGINE), ())
    # Its own metric was counted nowhere: 50 points lost are told by the graph.
    bad = artefact("onnx-int8-symmetric", replace(SAME, value=0.4))
    kept, dropped = split([FP32, bad, ENGINE])
    assert kept == (FP32,)
    assert dropped[1].name == ENGINE.name
    assert "its graph is not kept: loses 50.0 points" in dropped[1].reason
    assert split([FP32, ENGINE])[0] == (FP32,)


@pytest.mark.parametrize(
    ("capability", "version", "own"),
    [(86, "1.7", True), (89, "1.7", False), (86, "1.8", False), (None, "1.7", False)],
)
def test_an_engine_that_fails_where_it_should_run_is_left_out(
    monkeypatch, capability, version, own
):
    monkeypatch.setattr(qualification.gpu_capability, "capability", lambda: capability)
    monkeypatch.setattr(qualification.tensorrt, "version", lambda runtime: version)
    assert bool(verdict(ENGINE)) == own


def test_slower_int8_is_kept_where_somebody_asks_for_it():
    slow = artefact(score=SAME, times=SLOWER)
    assert split([FP32, slow])[0] == (FP32,)
    assert split([FP32, slow], keep_slower=True)[0] == (FP32, slow)
    worse = artefact(score=replace(SAME, value=0.8), times=SLOWER)
    assert split([FP32, worse], keep_slower=True)[0] == (FP32,), "its metric still counts"


def timed(one, many):
    return Timed(RESULT | {"p50_ms": one, "others": [{"p50_ms": many}]})


def test_times_are_compared_in_turns_and_one_disturbed_turn_does_not_count():
    fp32 = timed(1.0, 20.0)
    turns = [
        (fp32, timed(0.5, 22.0)),
        (fp32, timed(9.0, 99.0)),
        (timed(3.0, 60.0), timed(1.8, 72.0)),
    ]
    assert relative(turns) == pytest.approx((0.6, 1.2))
    assert relative([*turns, (fp32, Timed({}, "crashed"))]) is None
    assert relative([]) is None


def test_faster_at_either_batch_is_enough():
    assert verdict(artefact(score=SAME, times=(1.5, 0.9))) == ""
    assert verdict(artefact(score=SAME, times=(0.9, 1.5))) == ""


def test_a_loss_of_just_one_point_is_allowed():
    score = Score("accuracy", 0.75, 0.75 + METRIC_BUDGET, 400)
    assert verdict(artefact(score=score)) == ""


@pytest.mark.parametrize(
    ("score", "budget", "kept"),
    [
        (Score("accuracy", 0.86, 0.9, 400), 0.05, True),
        (Score("accuracy", 0.86, 0.9, 400), 0.03, False),
        (Score("accuracy", 0.95, 0.9, 400), 0.0, True),
        (Score("accuracy", 0.899, 0.9, 400), 0.0, False),
        # Of what is no share a part of its own value, and where less is better in that direction.
        (Score("loss", 20.1, 20.0, 400, higher_is_better=False, share=False), 0.01, True),
        (Score("loss", 20.3, 20.0, 400, higher_is_better=False, share=False), 0.01, False),
        (Score("loss", 0.1, 20.0, 400, higher_is_better=False, share=False), 0.0, True),
        (Score("gain", 19.9, 20.0, 400, share=False), 0.01, True),
        (Score("gain", 19.7, 20.0, 400, share=False), 0.01, False),
    ],
)
def test_the_budget_is_the_compiler_s_to_set_and_goes_by_the_metric_s_worse_direction(
    score, budget, kept
):
    assert (verdict(artefact(score=score), budget=budget) == "") == kept


def test_nothing_is_compiled_where_the_source_itself_does_not_run():
    with pytest.raises(ReleaseError, match="FE-604"):
        split([artefact("onnx-fp32", failure="crashed (SIGILL)")])
