"""Ed25519 keys, and statements signed with them.

The envelope is DSSE 1.0 (https://github.com/secure-systems-lab/dsse), the payload an in-toto
Statement 1 (https://github.com/in-toto/attestation), or another type that the caller names; as the
type is signed too, none passes for the other. Both are written in one canonical form only,
so that two files which mean the same are the same bytes, and a byte that differs is always noticed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from fedge.shared.crypto import key_files
from fedge.shared.errors import BundleError, ReleaseError
from fedge.shared.files import read_bounded, reason

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:fedge:release:v1"

#: An Ed25519 key in PEM takes about 120 bytes; comments around it may take more.
KEY_LIMIT: Final = 16 * 1024

# The only form that is accepted, so that no JSON parser sees bytes which nobody signed.
_ENVELOPE = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/]*={0,2})","payloadType":"([A-Za-z0-9!#$&^_.+/-]{1,255})",'
    rb'"signatures":\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{86}==)"\}\]\}\n'
)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, without spaces, in ASCII, with a newline at the end.

    Raises:
        ValueError: ``value`` holds NaN or infinity.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii") + b"\n"


def parse_canonical(data: bytes, part: str) -> Any:
    """Read what ``canonical_json`` wrote, and nothing else.

    Raises:
        BundleError: 702, ``data`` is not JSON, or not in canonical form.
    """
    try:
        value = json.loads(data.decode("ascii"))
        canonical = canonical_json(value) == data
    except (ValueError, RecursionError, TypeError) as error:
        raise BundleError(
            702, f"{part}: must be canonical JSON, got {type(error).__name__}"
        ) from None
    if not canonical:
        raise BundleError(702, f"{part}: must be canonical JSON, got another spelling of it")
    return value


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hexadecimal."""
    return hashlib.sha256(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def public_path(path: Path) -> Path:
    """Where the public half of the key at ``path`` lies: ``PATH.pub``."""
    return path.with_name(path.name + ".pub")


def new_key(path: Path) -> str:
    """Write a new private key to ``path`` (mode 0600 at once), and ``PATH.pub``.

    Returns:
        The key's id.

    Raises:
        ReleaseError: 601, one of the two files exists; 606, they cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    written: list[Path] = []
    try:
        for target, mode, data in (
            (path, 0o600, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (
                public_path(path),
                0o644,
                public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            ),
        ):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            written.append(target)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for target in written:
            target.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            name = path if not written else public_path(path)
            raise ReleaseError(601, f"{name}: must not exist yet") from None
        raise ReleaseError(606, f"{path}: cannot be written ({reason(error)})") from None
    return key_id(public)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key in PEM, without a password.

    Raises:
        ReleaseError: 602, the file cannot be read or holds something else.
    """
    try:
        return key_files.load_ed25519(path, owner_only=False)
    except ValueError as error:
        raise ReleaseError(602, str(error)) from None


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key in PEM.

    Raises:
        BundleError: 707, the file cannot be read or holds something else.
    """
    try:
        data = read_bounded(path, KEY_LIMIT)
        if data.count(b"-----BEGIN") > 1:
            raise BundleError(707, f"{path}: must hold one key, got several")
        key = load_pem_public_key(data)
    except OSError as error:
        raise BundleError(707, f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BundleError(707, f"{path}: must hold an Ed25519 public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(707, f"{path}: must hold an Ed25519 key, got another kind")
    return key


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def statement(subjects: list[dict[str, Any]], predicate: dict[str, Any]) -> bytes:
    """An in-toto Statement in canonical JSON."""
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": subjects,
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
    )


def sign(payload: bytes, private: Ed25519PrivateKey, *, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """A DSSE envelope around ``payload``, with one signature.

    Args:
        payload: an in-toto Statement, unless ``payload_type`` says otherwise.
        private: the key that signs.
        payload_type: the payload's media type, without parameters.
    """
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [
                {
                    "keyid": key_id(private.public_key()),
                    "sig": base64.b64encode(private.sign(pae(payload_type, payload))).decode(),
                }
            ],
        }
    )


def open_envelope(
    envelope: bytes,
    trusted: Ed25519PublicKey,
    part: str = "statement",
    *,
    payload_type: str = PAYLOAD_TYPE,
) -> bytes:
    """The payload of an envelope that carries the trusted key's signature, and only that one.

    Args:
        envelope: as ``sign`` wrote it.
        trusted: the key that must have signed.
        part: what messages call the envelope.
        payload_type: the media type that the payload must have.

    Raises:
        BundleError: 702, the envelope is not in canonical form, or of another type; 703, the
            signature is not the trusted key's.
    """
    match = _ENVELOPE.fullmatch(envelope)
    if match is None:
        raise BundleError(
            702, f"{part}: must be a DSSE envelope in canonical form with one signature"
        )
    found = match[2].decode()
    if found != payload_type:
        raise BundleError(702, f"{part}: must hold a payload of {payload_type}, got {found[:80]}")
    payload, signature = _base64(match[1], part), _base64(match[4], part)
    signer, expected = match[3].decode(), key_id(trusted)
    if signer != expected:
        raise BundleError(
            703, f"{part}: must be signed by the trusted key {expected[:16]}…, got {signer[:16]}…"
        )
    try:
        trusted.verify(signature, pae(payload_type, payload))
    except InvalidSignature:
        raise BundleError(
            703, f"{part}: the signature is not that of the trusted key {expected[:16]}…"
        ) from None
    return payload


def _base64(text: bytes, part: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise BundleError(702, f"{part}: must be a DSSE envelope, got damaged base64") from None
    # Several texts decode to the same bytes, where the last character has bits to spare.
    if base64.b64encode(data) != text:
        raise BundleError(
            702, f"{part}: must be a DSSE envelope, got a second spelling of its base64"
        )
    return data
