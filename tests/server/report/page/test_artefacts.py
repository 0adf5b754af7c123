"""The report's section on compiled artefacts."""

import json
import re

import pytest

from fedge.server.report.page.render import render

MODEL = "b" * 64
EXECUTED = {
    "executed": True, "reason": "", "max_abs_difference": 0.1, "tolerance": 1.0, "agreement": 0.995,
    "peak_rss_mb": 52.0, "latency": {"p50_ms": 0.5, "p99_ms": 1, "batch": 1, "threads": 1, "device": "x"},
    "score": {"metric": "accuracy", "value": 0.9, "reference": 0.905, "num_examples": 400},
}  # fmt: skip


def artefact(name, kind, **more):
    return {"name": name, "kind": kind, "bytes": 1000, "sha256": "a" * 64, "opset": 20, **more}


COMPILED = {
    "format": "fedge.compile/1", "task": "digits", "model_sha256": MODEL, "device": "a CPU",
    "targets": ["cpu-int8", "tensorrt-rtx:sm86+sm89"],
    "kept": [
        artefact("model.onnx", "onnx-fp32", qualification=EXECUTED),
        artefact("model.engine", "tensorrt-rtx-fp16",
                 qualification={"executed": False, "reason": "no <b>GPU</b> here"}),
    ],
    "dropped": [artefact("model.int8.onnx", "onnx-int8", reason="is no faster", qualification=EXECUTED)],
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    def rendered(compiled):
        (tmp_path / "run.json").write_text(json.dumps({"run": "r", "model_sha256": MODEL}))
        text = compiled if isinstance(compiled, str) else json.dumps(compiled)
        (tmp_path / "compile.json").write_text(text)
        return render(tmp_path)

    return rendered


def test_it_says_which_is_proved_and_which_is_not(page):
    found = page(COMPILED)
    assert 'href="#compiled"' in found
    for words in (">source<", ">unproven<", "left out", "is no faster"):
        assert words in found
    assert "99.50" in found
    assert "(-0.50)" in found, "half a point less than the fp32 graph"
    assert "tensorrt-rtx:sm86+sm89" in found
    assert "no &lt;b&gt;GPU" in found


def test_on_a_narrow_page_every_figure_tells_what_it_is(page):
    """A row is a block there, without the table's head; what has no value takes no room."""
    found = page(COMPILED)
    table = found[found.index('<table class="stacked">') :].partition("</table>")[0]
    source, engine, _ = (row.partition("</tr>")[0] for row in table.split("<tr>")[2:])
    assert re.findall('data-label="([^"]+)"', source) == [
        "size", "one inference, median", "memory", "agreement", "accuracy",
    ]  # fmt: skip
    hidden = re.findall('<td class="([^"]*)" data-label="([^"]+)">', engine)
    assert [label for css, label in hidden if "none" not in css.split()] == ["size"]
    assert "none" not in re.findall('class="([^"]*)"', source)
    assert 'data-label="size">1.00' in source
    assert "attr(data-label)" in found
    assert found.count('<table class="stacked">') == 1, "other tables keep their heads"


@pytest.mark.parametrize(
    "other",
    [
        {**COMPILED, "model_sha256": "c" * 64},
        {},
        [],
        {**COMPILED, "kept": 3},
        {**COMPILED, "kept": []},
    ],
)
def test_what_is_of_another_model_is_not_shown(page, other):
    assert 'id="compiled"' not in page(other)


@pytest.mark.parametrize(
    "kept", [[{}], [3], [{"qualification": 3}], [{"bytes": "x", "qualification": {"latency": []}}]]
)
def test_damaged_values_are_left_out(page, kept):
    assert 'id="compiled"' in page({**COMPILED, "kept": kept})


def test_a_damaged_file_is_named(page):
    assert "What could not be read" in page("{")


def picture(found):
    return found.partition("Speed against what is lost")[2].partition("</svg>")[0]


def test_the_picture_has_what_was_timed_and_scored_and_says_what_was_left_out(page):
    drawn = picture(page(COMPILED))
    kept, left = re.findall(r'<circle class="bubble (\w+)"[^>]*><title>([^<]*)</title>', drawn)
    assert kept == ("kept", "model.onnx: 0.5 ms, +0.50 lost, 1.00\u202fkB")
    assert left[0] == "left"
    assert left[1].endswith(", left out")
    assert "accuracy lost, points" in drawn
    assert "engine" not in drawn, "what never ran here has no speed"


@pytest.mark.parametrize(
    ("reference", "value", "higher", "said"),
    [(2.0, 2.5, False, "+25.00 lost"), (2.0, 1.5, False, "-25.00 lost"), (0, 1, False, None)],
)
def test_what_is_no_share_is_lost_in_percent_of_its_value_in_its_worse_direction(
    page, reference, value, higher, said
):
    score = {
        "metric": "mse",
        "share": False,
        "value": value,
        "reference": reference,
        "higher_is_better": higher,
    }
    scored = {**EXECUTED, "score": {**score, "num_examples": 4}}
    of = [artefact(f"{n}.onnx", "onnx-fp16", qualification=scored) for n in "ab"]
    drawn = picture(page({**COMPILED, "kept": of, "dropped": []}))
    if said is None:
        assert not drawn
    else:
        assert drawn.count(said) >= 2
        assert "% of the value" in drawn


def test_a_share_of_any_name_is_lost_in_points(page):
    score = {"metric": "auc", "value": 0.491, "reference": 0.5, "num_examples": 4}
    of = [
        artefact(f"{n}.onnx", "onnx-fp16", qualification={**EXECUTED, "score": score}) for n in "ab"
    ]
    drawn = picture(page({**COMPILED, "kept": of, "dropped": []}))
    assert drawn.count("+0.90 lost") >= 2
    assert "AUC lost, points" in drawn


def test_what_is_for_gpus_alone_says_so(page):
    of = [artefact("a.onnx", kind, qualification=EXECUTED) for kind in ("onnx-fp16", "onnx-int8")]
    found = page({**COMPILED, "kept": of, "dropped": []})
    assert found.count("proved here</span> for GPUs") == 1
    assert found.count("proved here</span>") == 2


def test_what_the_device_builds_is_not_left_out(page):
    reason = "the device builds it at install, of model.fp16.onnx"
    engine = artefact("model.engine", "tensorrt-fp16", reason=reason, on_device=True)
    found = page({**COMPILED, "dropped": [engine]})
    assert f">built on the device</span> {reason}" in found
    assert "left out" not in found[found.index('id="compiled"') :].partition("</table>")[0]


@pytest.mark.parametrize("kept", [[], [artefact("a.onnx", "onnx-fp32", qualification=EXECUTED)]])
def test_one_alone_is_no_picture(page, kept):
    compiled = {**COMPILED, "kept": kept, "dropped": []}
    assert not picture(page(compiled))
