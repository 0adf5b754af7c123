from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedge.shared.crypto import dsse
from fedge.shared.errors import BundleError, ReleaseError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PAYLOAD = dsse.statement([{"name": "a", "digest": {"sha256": "00"}}], {"run": "r-1"})


def _codes(error: pytest.ExceptionInfo[BundleError | ReleaseError]) -> int:
    return error.value.code


def test_pre_authentication_encoding_is_that_of_the_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == expected
    assert dsse.pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_canonical_json_has_one_spelling() -> None:
    assert dsse.canonical_json({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}\n'
    with pytest.raises(ValueError, match="JSON"):
        dsse.canonical_json(float("nan"))


@pytest.mark.parametrize(
    "data",
    [
        b'{"b":1,"a":2}\n',
        b'{"a":2}',
        b'{"a": 2}\n',
        b'{"a":2,"a":2}\n',
        b'{"a":1.00}\n',
        b'{"a":"\xc3\xa9"}\n',
        b"NaN\n",
        b"1e400\n",
        b"[" * 100_000,
        b"1" * 5000 + b"\n",
        b"",
        b"\xff",
    ],
)
def test_another_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError) as error:
        dsse.parse_canonical(data, "part")
    assert _codes(error) == 702
    assert error.value.message.startswith("part: ")


def test_new_key_writes_a_pair_that_signs_and_verifies(tmp_path: Path) -> None:
    path = tmp_path / "k"
    before = os.umask(0)
    try:
        identity = dsse.new_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    private, public = dsse.load_private(path), dsse.load_public(tmp_path / "k.pub")
    assert dsse.key_id(private.public_key()) == dsse.key_id(public) == identity
    assert dsse.open_envelope(dsse.sign(PAYLOAD, private), public) == PAYLOAD
    assert b"PRIVATE" not in (tmp_path / "k.pub").read_bytes()


@pytest.mark.parametrize("taken", ["k", "k.pub"])
def test_new_key_overwrites_nothing(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(ReleaseError) as error:
        dsse.new_key(tmp_path / "k")
    assert _codes(error) == 601
    assert taken in error.value.message
    assert [p.name for p in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_new_key_does_not_follow_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReleaseError) as error:
        dsse.new_key(tmp_path / "k")
    assert _codes(error) == 601
    assert not (tmp_path / "elsewhere").exists()


def test_new_key_names_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError) as error:
        dsse.new_key(tmp_path / "no" / "k")
    assert _codes(error) == 606


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    other = X25519PrivateKey.generate()
    locked = KEY.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    texts = {
        "empty": b"",
        "noise": os.urandom(300),
        "large": b"x" * (dsse.KEY_LIMIT + 1),
        "private": other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "public": other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "locked": locked,
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in (*texts, "folder", "pipe", "missing"):
        with pytest.raises(ReleaseError) as release_error:
            dsse.load_private(tmp_path / name)
        assert _codes(release_error) == 602, name
        with pytest.raises(BundleError) as error:
            dsse.load_public(tmp_path / name)
        assert _codes(error) == 707, name


def test_another_key_or_payload_does_not_verify() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(BundleError) as error:
        dsse.open_envelope(dsse.sign(PAYLOAD, other), KEY.public_key())
    assert _codes(error) == 703
    # The other's signature under the trusted key's name.
    forged = json.loads(dsse.sign(PAYLOAD, other))
    forged["signatures"][0]["keyid"] = dsse.key_id(KEY.public_key())
    with pytest.raises(BundleError) as error:
        dsse.open_envelope(dsse.canonical_json(forged), KEY.public_key())
    assert _codes(error) == 703


def test_only_one_spelling_of_an_envelope_is_accepted() -> None:
    good = json.loads(dsse.sign(PAYLOAD, KEY))
    signature = good["signatures"][0]
    # The last character of 64 bytes in base64 holds four bits, so sixteen characters decode alike.
    respelled = signature["sig"][:-3] + chr(ord(signature["sig"][-3]) + 1) + "=="
    assert base64.b64decode(respelled) == base64.b64decode(signature["sig"])
    broken = [
        {**good, "extra": 1},
        {**good, "signatures": []},
        {**good, "signatures": [signature, signature]},
        {**good, "signatures": [{**signature, "sig": respelled}]},
        {**good, "payloadType": "text/plain"},
        {**good, "payload": good["payload"] + "\n"},
        {**good, "payload": "A" + good["payload"]},
    ]
    texts = [dsse.canonical_json(value) for value in broken]
    texts += [json.dumps(good).encode(), dsse.sign(PAYLOAD, KEY)[:-1], b"", b"{}"]
    for text in texts:
        with pytest.raises(BundleError) as error:
            dsse.open_envelope(text, KEY.public_key())
        assert _codes(error) == 702, text


OTHER_TYPE = "application/vnd.fedge.roster+json"


def test_another_payload_type_is_signed_with_the_payload() -> None:
    envelope = dsse.sign(b"{}\n", KEY, payload_type=OTHER_TYPE)
    assert json.loads(envelope)["payloadType"] == OTHER_TYPE
    public = KEY.public_key()
    assert dsse.open_envelope(envelope, public, payload_type=OTHER_TYPE) == b"{}\n"
    signature = base64.b64decode(json.loads(envelope)["signatures"][0]["sig"])
    public.verify(signature, dsse.pae(OTHER_TYPE, b"{}\n"))


def test_the_default_type_is_that_of_a_statement() -> None:
    assert dsse.sign(PAYLOAD, KEY) == dsse.sign(PAYLOAD, KEY, payload_type=dsse.PAYLOAD_TYPE)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (dsse.PAYLOAD_TYPE, OTHER_TYPE),
        (OTHER_TYPE, dsse.PAYLOAD_TYPE),
        (OTHER_TYPE, OTHER_TYPE + "2"),
        # A type that the one form of an envelope has no room for is refused, not escaped.
        ('a"b', 'a"b'),
        ("", ""),
    ],
)
def test_one_type_does_not_pass_for_another(written: str, wanted: str) -> None:
    envelope = dsse.sign(PAYLOAD, KEY, payload_type=written)
    with pytest.raises(BundleError) as error:
        dsse.open_envelope(envelope, KEY.public_key(), "part", payload_type=wanted)
    assert _codes(error) == 702
    assert error.value.message.startswith("part: ")


def test_a_type_that_was_changed_does_not_verify() -> None:
    envelope = json.loads(dsse.sign(PAYLOAD, KEY))
    changed = dsse.canonical_json({**envelope, "payloadType": OTHER_TYPE})
    with pytest.raises(BundleError) as error:
        dsse.open_envelope(changed, KEY.public_key(), payload_type=OTHER_TYPE)
    assert _codes(error) == 703
