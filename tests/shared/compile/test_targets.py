import pytest

from fedge.shared.bundle.manifest_artefacts import KINDS, ONNX_FP32
from fedge.shared.compile.targets import RTX_CAPABILITIES, SOURCES, Target, parse
from fedge.shared.errors import ReleaseError


def test_the_list_of_the_documents_is_read():
    found = parse("cpu-fp32,cpu-int8, tensorrt-rtx:sm120+sm86+sm89,tensorrt,onnx")
    assert [t.name for t in found] == ["cpu-fp32", "cpu-int8", "tensorrt-rtx", "tensorrt", "onnx"]
    assert found[2].capabilities == (86, 89, 120)
    assert str(found[2]) == "tensorrt-rtx:sm86+sm89+sm120"
    assert parse(",".join(map(str, found))) == found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "got ''"),
        ("cpu", "got 'cpu'"),
        ("cpu-fp32,", "got ''"),
        ("cpu-fp32:sm86", "no GPU with cpu-fp32"),
        ("tensorrt:sm87", "no GPU with tensorrt"),
        ("tensorrt-rtx", "got no GPU"),
        ("tensorrt-rtx:", "got ''"),
        ("tensorrt-rtx:86", "got '86'"),
        ("tensorrt-rtx:sm87", "got 'sm87'"),
        ("tensorrt-rtx:sm90+sm86", "got 'sm90'"),
        ("tensorrt-rtx:sm86+sm86", "each GPU once"),
        ("cpu-fp32,cpu-fp32", "once"),
        ("tensorrt-rtx:sm86+sm89,tensorrt-rtx:sm89+sm86", "once"),
    ],
)
def test_what_nothing_is_built_for_is_refused(text, named):
    with pytest.raises(ReleaseError, match=r"FE-608 --targets") as caught:
        parse(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["tensorrt-rtx:sm90", "tensorrt-rtx:sm89+sm87"])
def test_for_other_gpus_the_remedy_names_the_target(text):
    with pytest.raises(ReleaseError) as caught:
        parse(text)
    assert caught.value.remedy.startswith("Name `tensorrt` for any other GPU")


def test_every_kind_has_a_source_down_to_the_fp32_graph():
    for kind in KINDS:
        while kind != ONNX_FP32:
            kind = SOURCES[kind]


def test_int8_of_a_gpu_needs_ranges():
    target = Target("tensorrt-rtx", RTX_CAPABILITIES[:2])
    assert target.kinds(calibrated=False) == ("onnx-fp16", "tensorrt-rtx-fp16")
    assert target.kinds(calibrated=True) == (
        "onnx-fp16", "onnx-int8-symmetric", "tensorrt-rtx-fp16", "tensorrt-rtx-int8",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("cpu-int4", "cpu-int8"),
        ("tensorrt_rtx:sm86", "tensorrt-rtx"),
        ("tensort", "tensorrt"),
        ("fp32", "cpu-fp32"),
        ("onxx", "onnx"),
    ],
)
def test_an_unknown_target_names_the_nearest(given, near):
    with pytest.raises(ReleaseError, match=rf"did you mean {near}\?"):
        parse(given)
