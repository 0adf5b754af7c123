from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.shared.bundle import ustar
from fedge.shared.bundle.bundle import STATEMENT, Limits, Part, open_bundle, write_bundle
from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import Artefact
from fedge.shared.crypto import dsse
from fedge.shared.errors import BundleError, ReleaseError
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Scale

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUST = KEY.public_key()
MODEL = random.Random(0).randbytes(3000)
EXTRA = b"\0" * 512


def _artefact(name: str, data: bytes, kind: str = "onnx-fp32") -> Artefact:
    return Artefact(name, kind, hashlib.sha256(data).hexdigest(), len(data), 20)


MANIFEST = Manifest(
    task="digits",
    run="r-1",
    strategy="FedAvg",
    rounds=3,
    sites=("site-1", "site-2"),
    created="2026-01-31T12:00:00Z",
    fedge="0.1.0",
    config_sha256="a" * 64,
    model_sha256="b" * 64,
    artefacts=(_artefact("model.onnx", MODEL), _artefact("extra.onnx", EXTRA, "onnx-fp16")),
    input=InputSchema(shape=(8, 8)),
    output=OutputSchema(labels=("0", "1"), activation="softmax"),
    preprocessing=(Scale(0.0625),),
    metrics={"pooled": {"accuracy": 0.9}, "site_mean": {}},
    parity=Parity(1e-7, 1e-4, (1, 2)),
)
ARTEFACTS: dict[str, bytes | Path] = {"model.onnx": MODEL, "extra.onnx": EXTRA}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model.fedge"
    write_bundle(path, MANIFEST, ARTEFACTS, KEY)
    return path


def _assemble(members: list[tuple[str, bytes]]) -> bytes:
    parts = [ustar.header(n, len(d)) + d + ustar.padding(len(d)) for n, d in members]
    return b"".join(parts) + ustar.END


def _members(data: bytes) -> list[tuple[str, bytes]]:
    import io

    with tarfile.open(fileobj=io.BytesIO(data)) as verified:
        members = verified.getmembers()
        return [(m.name, verified.extractfile(m).read()) for m in members]  # type: ignore[union-attr]


def _regions(data: bytes) -> list[tuple[int, int, str]]:
    """(start, end, part) of every byte of a good bundle."""
    found, at = [], 0
    for name, content in _members(data):
        for size, part in (
            (512, f"archive header of {name}"),
            (len(content), name),
            (-len(content) % 512, f"archive padding after {name}"),
        ):
            found.append((at, at + size, part))
            at += size
    return [*found, (at, len(data), "archive end")]


def _refused(path: Path, data: bytes, **arguments: Any) -> BundleError:
    path.write_bytes(data)
    with pytest.raises(BundleError) as error:
        open_bundle(path, TRUST, **arguments)
    assert "\n" not in error.value.message
    return error.value


def _signed(manifest: dict[str, Any], statement: dict[str, Any] | None = None) -> bytes:
    """A bundle whose signature is right, whatever the manifest says."""
    data = dsse.canonical_json(manifest)
    subjects = [("manifest.json", data), *ARTEFACTS.items()]
    value = statement or {
        "_type": dsse.STATEMENT_TYPE,
        "predicateType": dsse.PREDICATE_TYPE,
        "predicate": {
            key: manifest.get(key)
            for key in (
                "task",
                "run",
                "strategy",
                "rounds",
                "sites",
                "config_sha256",
                "model_sha256",
                "fedge",
            )
        },
        "subject": [
            {
                "name": name,
                "digest": {"sha256": hashlib.sha256(content).hexdigest()},  # type: ignore[arg-type]
                "annotations": {"bytes": len(content)},  # type: ignore[arg-type]
            }
            for name, content in subjects
        ],
    }
    envelope = dsse.sign(dsse.canonical_json(value), KEY)
    return _assemble(
        [
            (STATEMENT, envelope),
            ("manifest.json", data),
            ("model.onnx", MODEL),
            ("extra.onnx", EXTRA),
        ]
    )


def test_a_bundle_is_read_as_it_was_written(good: Path) -> None:
    bundle = open_bundle(good, TRUST)
    assert bundle.manifest == MANIFEST
    assert bundle.artefacts == ARTEFACTS
    assert bundle.key_id == dsse.key_id(TRUST)
    assert [part.name for part in bundle.parts] == [name for name, _ in _members(good.read_bytes())]
    assert [part.name for part in bundle.parts][:3] == [STATEMENT, "manifest.json", "model.onnx"]
    for part, (_, content) in zip(bundle.parts, _members(good.read_bytes()), strict=True):
        assert part == Part(part.name, len(content), hashlib.sha256(content).hexdigest())
    assert bundle.statement["predicate"]["sites"] == ["site-1", "site-2"]


def test_the_statement_holds_no_floats(good: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    payload = dsse.open_envelope(_members(good.read_bytes())[0][1], TRUST)
    json.loads(payload, parse_float=refuse)


def test_the_test_assembles_what_fedge_writes(good: Path) -> None:
    assert _assemble(_members(good.read_bytes())) == good.read_bytes()
    assert _signed(MANIFEST.to_json()) == good.read_bytes()


def test_the_same_content_gives_the_same_bytes(tmp_path: Path, good: Path) -> None:
    (tmp_path / "m").write_bytes(MODEL)
    part = write_bundle(
        tmp_path / "again.fedge", MANIFEST, {"model.onnx": tmp_path / "m", "extra.onnx": EXTRA}, KEY
    )
    data = (tmp_path / "again.fedge").read_bytes()
    assert data == good.read_bytes()
    assert part == Part("again.fedge", len(data), hashlib.sha256(data).hexdigest())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.fedge", "m"]


def test_tar_lists_the_members(good: Path) -> None:
    done = subprocess.run(["tar", "tf", str(good)], capture_output=True, check=True, text=True)
    assert done.stdout.split() == [STATEMENT, "manifest.json", "model.onnx", "extra.onnx"]
    assert done.stderr == ""


@pytest.mark.slow
def test_every_changed_byte_is_refused_with_its_part(tmp_path: Path, good: Path) -> None:
    data = good.read_bytes()
    regions = _regions(data)
    statement_and_manifest = next(
        end for _, end, part in regions if part == "archive padding after manifest.json"
    )
    draw = random.Random(1)
    offsets = [*range(statement_and_manifest)]
    offsets += [draw.randrange(statement_and_manifest, len(data)) for _ in range(1000)]
    path = tmp_path / "changed.fedge"
    path.write_bytes(data)
    named = set()
    with path.open("r+b", buffering=0) as file:
        for offset in offsets:
            changed = data[offset] ^ draw.randrange(1, 256)
            file.seek(offset)
            file.write(bytes([changed]))
            with pytest.raises(BundleError) as error:
                open_bundle(path, TRUST)
            part = next(part for start, end, part in regions if start <= offset < end)
            assert error.value.message.startswith(f"{part}: "), (offset, changed)
            assert error.value.code in (702, 703, 704)
            named.add(part)
            file.seek(offset)
            file.write(data[offset : offset + 1])
    assert named == {part for start, end, part in regions if start < end}
    open_bundle(path, TRUST)


def test_every_single_bit_of_the_signature_counts(tmp_path: Path, good: Path) -> None:
    data = good.read_bytes()
    start = data.index(b'"sig":"') + 7
    for offset in range(start, start + 88):
        for bit in range(8):
            changed = bytearray(data)
            changed[offset] ^= 1 << bit
            assert _refused(tmp_path / "b", bytes(changed)).code in (702, 703)


def test_inserted_and_removed_bytes_are_refused(tmp_path: Path, good: Path) -> None:
    data = good.read_bytes()
    draw = random.Random(2)
    for _ in range(300):
        at, count = draw.randrange(len(data)), draw.choice([1, 2, 512])
        filler = draw.choice([b"\0", b"x", data[at : at + 1]]) * count
        _refused(tmp_path / "b", data[:at] + filler + data[at:])
        _refused(tmp_path / "b", data[:at] + data[at + count :])


def test_appended_and_missing_bytes_are_refused(tmp_path: Path, good: Path) -> None:
    data = good.read_bytes()
    for tail in (b"\0", b"\0" * 512, bytes(10240 - len(data) % 10240), b"x", data):
        error = _refused(tmp_path / "b", data + tail)
        assert error.message.startswith("archive end: ")
    for length in [*range(0, len(data), 97), len(data) - 1]:
        assert _refused(tmp_path / "b", data[:length]).code == 702


def test_members_in_another_order_or_number_are_refused(tmp_path: Path, good: Path) -> None:
    members = _members(good.read_bytes())
    statement, manifest, model, extra = members
    for other in (
        [manifest, statement, model, extra],
        [statement, model, manifest, extra],
        [statement, manifest, extra, model],
        [statement, manifest, model],
        [statement, manifest, model, model, extra],
        [statement, manifest, model, extra, ("more", b"x")],
        [statement, statement, manifest, model, extra],
        [],
    ):
        assert _refused(tmp_path / "b", _assemble(other)).code == 702


def test_another_key_is_refused(good: Path) -> None:
    with pytest.raises(BundleError) as error:
        open_bundle(good, Ed25519PrivateKey.generate().public_key())
    assert error.value.code == 703
    assert error.value.message.startswith(STATEMENT)


def test_parts_of_two_bundles_do_not_mix(tmp_path: Path, good: Path) -> None:
    other = random.Random(3).randbytes(3000)
    manifest = dataclasses.replace(
        MANIFEST,
        artefacts=(_artefact("model.onnx", other), _artefact("extra.onnx", EXTRA, "onnx-fp16")),
    )
    write_bundle(tmp_path / "other", manifest, {"model.onnx": other, "extra.onnx": EXTRA}, KEY)
    first, second = _members(good.read_bytes()), _members((tmp_path / "other").read_bytes())
    error = _refused(tmp_path / "b", _assemble([*first[:2], second[2], first[3]]))
    assert (error.code, error.message.split(":")[0]) == (704, "model.onnx")
    error = _refused(tmp_path / "b", _assemble([first[0], *second[1:]]))
    assert (error.code, error.message.split(":")[0]) == (704, "manifest.json")
    open_bundle(tmp_path / "other", TRUST)


def test_a_signed_statement_must_agree_with_its_manifest(tmp_path: Path, good: Path) -> None:
    payload = dsse.open_envelope(_members(good.read_bytes())[0][1], TRUST)
    for change in (
        {"predicate": {**json.loads(payload)["predicate"], "run": "r-2"}},
        {"subject": json.loads(payload)["subject"][:2]},
        {"more": 1},
    ):
        statement = {**json.loads(payload), **change}
        error = _refused(tmp_path / "b", _signed(MANIFEST.to_json(), statement))
        assert error.code == 704, change
    for broken in (
        {},
        [],
        {**json.loads(payload), "predicateType": "other"},
        {**json.loads(payload), "subject": []},
        {
            **json.loads(payload),
            "subject": [{"digest": {"sha256": 3}, "annotations": {"bytes": 5}}],
        },
        {
            **json.loads(payload),
            "subject": [{"digest": {"sha256": ""}, "annotations": {"bytes": -5}}],
        },
    ):
        error = _refused(tmp_path / "b", _signed(MANIFEST.to_json(), broken or {"": ""}))  # type: ignore[arg-type]
        assert error.code == 706, broken


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preprocessing", [{"op": "system", "command": "true"}]),
        ("input", {"shape": [-8, -8], "dtype": "float32", "features": []}),
        ("input", {"shape": [2**40], "dtype": "float32", "features": []}),
        ("rounds", -1),
        ("later", "field"),
    ],
)
def test_a_validly_signed_manifest_may_still_be_refused(
    tmp_path: Path, key: str, value: Any
) -> None:
    error = _refused(tmp_path / "b", _signed({**MANIFEST.to_json(), key: value}))
    assert error.code == 706
    assert error.message.startswith("manifest")


def test_sizes_beyond_the_limits_are_refused_before_they_are_read(
    tmp_path: Path, good: Path
) -> None:
    data = good.read_bytes()
    for limits, part in (
        (Limits(total=len(data) - 1), "archive"),
        (Limits(statement=100), STATEMENT),
        (Limits(manifest=100), "manifest.json"),
        (Limits(artefact=2999), "model.onnx"),
    ):
        error = _refused(tmp_path / "b", data, limits=limits)
        assert (error.code, error.message.split(":")[0]) == (705, part)
    (tmp_path / "c").write_bytes(data)
    open_bundle(tmp_path / "c", TRUST, limits=Limits(len(data), len(data), 3000, len(data)))


def test_what_no_device_would_read_is_not_written(tmp_path: Path, good: Path) -> None:
    data = good.read_bytes()
    sizes = {name: len(content) for name, content in _members(data)}
    exact = Limits(sizes[STATEMENT], sizes["manifest.json"], 3000, len(data))
    fits = tmp_path / "fits"
    assert write_bundle(fits, MANIFEST, ARTEFACTS, KEY, limits=exact).bytes == len(data)
    open_bundle(fits, TRUST, limits=exact)
    fits.write_bytes(b"what served before")
    for field, part in (
        ("total", "archive"),
        ("statement", STATEMENT),
        ("manifest", "manifest.json"),
        ("artefact", "model.onnx"),
    ):
        small = dataclasses.replace(exact, **{field: getattr(exact, field) - 1})
        assert _refused(tmp_path / "b", data, limits=small).code == 705
        with pytest.raises(BundleError) as error:
            write_bundle(fits, MANIFEST, ARTEFACTS, KEY, replace=True, limits=small)
        assert (error.value.code, error.value.message.split(":")[0]) == (705, part)
        assert "fewer targets" in error.value.remedy
        assert fits.read_bytes() == b"what served before"


def test_an_artefact_too_large_is_refused_without_being_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(Limits().artefact + 1)
    listed = (dataclasses.replace(MANIFEST.artefacts[0], bytes=Limits().artefact + 1),)
    manifest = dataclasses.replace(MANIFEST, artefacts=listed)
    with pytest.raises(BundleError, match="FE-705 model.onnx"):
        write_bundle(tmp_path / "b", manifest, {"model.onnx": huge}, KEY)
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]


def test_a_sparse_giant_costs_nothing(tmp_path: Path, good: Path) -> None:
    huge = tmp_path / "huge"
    huge.write_bytes(ustar.header(STATEMENT, 2**32))
    os.truncate(huge, 2**31 - 512)
    with pytest.raises(BundleError) as error:
        open_bundle(huge, TRUST)
    assert error.value.code == 705


def test_what_is_no_file_is_refused(tmp_path: Path, good: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path / "folder",
        tmp_path / "pipe",
        tmp_path / "loop",
        tmp_path / "missing",
        Path("/dev/zero"),
        Path("nul\0"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(BundleError) as error:
            open_bundle(path, TRUST)
        assert error.value.code == 701
    (tmp_path / "link").symlink_to(good)
    assert open_bundle(tmp_path / "link", TRUST).manifest == MANIFEST


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_text("precious")
    with pytest.raises(ReleaseError) as error:
        write_bundle(path, MANIFEST, ARTEFACTS, KEY)
    assert error.value.code == 605
    assert path.read_text() == "precious"
    write_bundle(path, MANIFEST, ARTEFACTS, KEY, replace=True)
    assert open_bundle(path, TRUST).manifest == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError) as error:
        write_bundle(tmp_path / "no" / "b", MANIFEST, ARTEFACTS, KEY)
    assert error.value.code == 606
    for artefacts in ({"model.onnx": MODEL}, {"model.onnx": MODEL + b"x", "extra.onnx": EXTRA}):
        with pytest.raises(ReleaseError) as error:
            write_bundle(tmp_path / "b", MANIFEST, artefacts, KEY)
        assert error.value.code == 603
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "b", dataclasses.replace(MANIFEST, rounds=-1), ARTEFACTS, KEY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_archive_is_refused(tmp_path: Path, good: Path, data: st.DataObject) -> None:
    whole = good.read_bytes()
    members = data.draw(
        st.lists(
            st.one_of(
                st.sampled_from(_members(whole)),
                st.tuples(
                    st.sampled_from([STATEMENT, "manifest.json", "a"]), st.binary(max_size=600)
                ),
            ),
            max_size=5,
        )
    )
    text = data.draw(st.one_of(st.binary(max_size=2000), st.just(_assemble(members))))
    if text != whole:
        _refused(tmp_path / "b", text)
