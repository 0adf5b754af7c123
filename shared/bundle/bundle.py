"""The signed bundle in which a model reaches a device.

A ``.fedge`` file is a plain tar archive: the signed statement, the manifest, then the artefacts in
the manifest's order. The signature covers the statement, the statement holds the hash and size of
every other part, and the archive has one spelling only; so any byte that was changed, added or
removed is noticed before anything is used. The guarantee assumes Ed25519, SHA-256, and that the
trusted key is the right one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.shared.bundle import ustar
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.bundle.manifest_checks import PART as MANIFEST
from fedge.shared.bundle.ustar import ArchiveReader
from fedge.shared.crypto import dsse
from fedge.shared.errors import BundleError, ReleaseError
from fedge.shared.files import flush_folder, open_regular, reason

STATEMENT: Final = "statement.dsse.json"
_CHUNK: Final = 2**20
#: Name, size, SHA-256 and content of a member to write.
_Member: TypeAlias = "tuple[str, int, str, bytes | Path]"


@dataclass(frozen=True)
class Limits:
    """Largest sizes that are read or held, in bytes."""

    statement: int = 16 * 2**20
    manifest: int = 16 * 2**20
    artefact: int = 1536 * 2**20
    total: int = 2048 * 2**20


@dataclass(frozen=True)
class Part:
    """One verified member of a bundle.

    Attributes:
        name: of the archive's member.
        bytes: its size.
        sha256: of its content, in hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte was verified.

    Attributes:
        manifest: description of the model and its artefacts.
        statement: the signed in-toto Statement, as JSON values.
        artefacts: name -> bytes, in the manifest's order; the very bytes that were hashed.
        parts: all members in the archive's order.
        key_id: of the key that signed.
    """

    manifest: Manifest
    statement: dict[str, Any]
    artefacts: dict[str, bytes]
    parts: tuple[Part, ...]
    key_id: str


def _statement(manifest: Manifest, sha256: str, size: int) -> bytes:
    subjects = [_subject(MANIFEST, sha256, size)]
    subjects += [_subject(a.name, a.sha256, a.bytes) for a in manifest.artefacts]
    return dsse.statement(
        subjects,
        {
            "task": manifest.task,
            "run": manifest.run,
            "strategy": manifest.strategy,
            "rounds": manifest.rounds,
            "sites": list(manifest.sites),
            "config_sha256": manifest.config_sha256,
            "model_sha256": manifest.model_sha256,
            "fedge": manifest.fedge,
            **({"privacy": manifest.privacy.to_json()} if manifest.privacy else {}),
        },
    )


def _subject(name: str, sha256: str, size: int) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}, "annotations": {"bytes": size}}


def write_bundle(
    path: Path,
    manifest: Manifest,
    artefacts: Mapping[str, bytes | Path],
    key: Ed25519PrivateKey,
    *,
    replace: bool = False,
    limits: Limits | None = None,
) -> Part:
    """Sign a manifest and write it with its artefacts; the file appears whole or not at all.

    Args:
        path: of the bundle.
        manifest: names, sizes and hashes of the artefacts are compared with the artefacts
            themselves.
        artefacts: name -> contents, or a file that holds them.
        key: private key that signs the statement.
        replace: whether an existing file may be replaced.
        limits: of the devices that will read it.

    Returns:
        Name, size and hash of the file.

    Raises:
        BundleError: 705, a part or the whole is larger than ``limits``; 706, the manifest would be refused by a
            device. Nothing was written.
        ReleaseError: 605, ``path`` exists; 606, it cannot be written; 603, an artefact is not the
            manifest's.
    """
    data = manifest.to_bytes()
    manifest = Manifest.from_bytes(data)
    statement = dsse.sign(_statement(manifest, hashlib.sha256(data).hexdigest(), len(data)), key)
    if set(artefacts) != {artefact.name for artefact in manifest.artefacts}:
        raise ReleaseError(603, f"{MANIFEST}: must list {sorted(artefacts)}")
    members: list[_Member] = [
        (STATEMENT, len(statement), hashlib.sha256(statement).hexdigest(), statement),
        (MANIFEST, len(data), hashlib.sha256(data).hexdigest(), data),
        *((a.name, a.bytes, a.sha256, artefacts[a.name]) for a in manifest.artefacts),
    ]
    _refuse_large(members, limits or Limits())
    if os.path.lexists(path) and not replace:
        raise ReleaseError(605, f"{path}: must not exist yet")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    whole = hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            size = 0
            for name, expected, sha256, content in members:
                for chunk in _member(name, expected, sha256, content):
                    whole.update(chunk)
                    size += file.write(chunk)
            whole.update(ustar.END)
            size += file.write(ustar.END)
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(path) and not replace:
            raise ReleaseError(605, f"{path}: must not exist yet")
        os.replace(temporary, path)  # noqa: PTH105 - the name by which the step is known
        flush_folder(path.parent)
    except OSError as error:
        raise ReleaseError(606, f"{path}: cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return Part(path.name, size, whole.hexdigest())


def _refuse_large(members: Sequence[_Member], limits: Limits) -> None:
    """Compare the sizes of the members with what devices read.

    Raises:
        BundleError: 705.
    """
    bounds = {STATEMENT: limits.statement, MANIFEST: limits.manifest}
    sizes = [(name, size, bounds.get(name, limits.artefact)) for name, size, *_ in members]
    total = sum(ustar.BLOCK + size + len(ustar.padding(size)) for _, size, _ in sizes)
    for name, size, bound in (*sizes, ("archive", total + len(ustar.END), limits.total)):
        if size > bound:
            raise BundleError(
                705,
                f"{name}: must be at most {bound} bytes, got {size}",
                remedy="Compile for fewer targets, or make the model smaller; no device would take this bundle.",
            )


def _member(name: str, size: int, sha256: str, content: bytes | Path) -> Iterator[bytes]:
    yield ustar.header(name, size)
    digest, count = hashlib.sha256(), 0
    for chunk in _chunks(content):
        digest.update(chunk)
        count += len(chunk)
        yield chunk
    if (count, digest.hexdigest()) != (size, sha256):
        raise ReleaseError(
            603, f"{name}: must be the {size} bytes of the manifest, got {count} others"
        )
    yield ustar.padding(size)


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def open_bundle(path: Path, trusted: Ed25519PublicKey, *, limits: Limits | None = None) -> Bundle:
    """Read and verify a bundle, each byte once, in the order of the archive.

    Args:
        path: of the bundle.
        trusted: public key that must have signed it.
        limits: largest sizes that are accepted.

    Raises:
        BundleError: 701, the file cannot be read; 702, it was altered; 703, the signature is not
            the trusted key's; 704, a part is not the signed one; 705, a part is larger than
            ``limits``; 706, the manifest needs something unknown here. The message begins with
            the part at fault.
    """
    try:
        file, size = open_regular(path)
    except OSError as error:
        raise BundleError(701, f"{path}: cannot be read ({reason(error)})") from None
    with file:
        return _verify(file, size, trusted, limits or Limits())


def _verify(file: BinaryIO, size: int, trusted: Ed25519PublicKey, limits: Limits) -> Bundle:
    if size > limits.total:
        raise BundleError(705, f"archive: must be at most {limits.total} bytes, got {size}")
    reader = ArchiveReader(file, size)

    # The signed statement, before anything else is looked at.
    announced = reader.announced_size(STATEMENT, limits.statement)
    envelope = reader.content(STATEMENT, announced)
    payload = dsse.open_envelope(envelope, trusted, STATEMENT)
    statement = dsse.parse_canonical(payload, STATEMENT)
    signed_size, signed_sha256 = _signed_manifest(statement)
    reader.expect_padding(STATEMENT, announced)

    # The manifest, as large as was signed.
    if signed_size > limits.manifest:
        raise BundleError(
            705, f"{MANIFEST}: must be at most {limits.manifest} bytes, got {signed_size}"
        )
    reader.expect_header(MANIFEST, signed_size)
    data = _hashed(reader, MANIFEST, signed_size, signed_sha256)
    manifest = Manifest.from_bytes(data)
    if _statement(manifest, signed_sha256, signed_size) != payload:
        raise BundleError(704, f"{MANIFEST}: must hold what the signed statement says of it")
    reader.expect_padding(MANIFEST, signed_size)

    # The artefacts.
    artefacts: dict[str, bytes] = {}
    for artefact in manifest.artefacts:
        if artefact.bytes > limits.artefact:
            raise BundleError(
                705,
                f"{artefact.name}: must be at most {limits.artefact} bytes, got {artefact.bytes}",
            )
        reader.expect_header(artefact.name, artefact.bytes)
        artefacts[artefact.name] = _hashed(reader, artefact.name, artefact.bytes, artefact.sha256)
        reader.expect_padding(artefact.name, artefact.bytes)
    reader.expect_end()
    parts = (
        Part(STATEMENT, announced, hashlib.sha256(envelope).hexdigest()),
        Part(MANIFEST, signed_size, signed_sha256),
        *(Part(a.name, a.bytes, a.sha256) for a in manifest.artefacts),
    )
    return Bundle(manifest, statement, artefacts, parts, dsse.key_id(trusted))


def _signed_manifest(statement: Any) -> tuple[int, str]:
    """Size and SHA-256 of the manifest, from the statement's first subject."""
    try:
        kind = statement["_type"], statement["predicateType"]
        subject = statement["subject"][0]
        size, sha256 = subject["annotations"]["bytes"], subject["digest"]["sha256"]
    except (KeyError, TypeError, IndexError):
        raise BundleError(706, f"{STATEMENT}: must be an in-toto Statement of fedge") from None
    if kind != (dsse.STATEMENT_TYPE, dsse.PREDICATE_TYPE):
        raise BundleError(706, f"{STATEMENT}: must be of {dsse.PREDICATE_TYPE}, got another type")
    if type(size) is not int or not 0 < size < 2**33 or not isinstance(sha256, str):
        raise BundleError(706, f"{STATEMENT}: must hold the manifest's size and SHA-256")
    return size, sha256


def _hashed(reader: ArchiveReader, name: str, size: int, sha256: str) -> bytes:
    data = reader.content(name, size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(704, f"{name}: its SHA-256 differs from the signed one")
    return data
