"""What a digest of the ledger, which every reply carries, tells of the record that it is of."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

DELTA: Final = 1e-5
BATCH, EXAMPLES = 32, 503


def charged(path: Path, number: int = 1) -> None:
    """One round of DP-SGD at a site of 503 examples: the sampling rate tells how many there are."""
    release = Release(1.0, BATCH / EXAMPLES, 5)
    made = Charge(
        "heart", "example", "r-1", number, "train", 0, "example", release, DELTA, "ab" * 32
    )
    Ledger(path).charge(made, Budget(1e6, DELTA))


def rows(path: Path) -> list[tuple[dict[str, Any], str, str]]:
    """Of each record: its values, its hash, and the hash before it."""
    with closing(sqlite3.connect(path)) as db:
        (name,) = db.execute("SELECT ledger FROM meta").fetchone()
        found = db.execute("SELECT record, hash FROM charge ORDER BY id").fetchall()
    start = hashlib.sha256(canonical_json({"ledger": name})).hexdigest()
    before = [start, *(kept for _, kept in found)]
    return [
        (json.loads(text), kept, previous)
        for (text, kept), previous in zip(found, before, strict=False)
    ]


def guessed(known: dict[str, Any], previous: str, digest: str) -> list[int]:
    """The numbers of examples with which a server that knows all else finds the digest, over a second of times."""
    at = datetime.fromisoformat(known["time"])
    found = []
    for number in range(480, 520):
        for ms in range(-20, 20):
            time = (at + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")
            tried = known | {"sampling_rate": BATCH / number, "time": time}
            text = canonical_json(tried)
            if hashlib.sha256(bytes.fromhex(previous) + text).hexdigest() == digest:
                found.append(number)
    return found


def test_a_server_cannot_try_numbers_of_examples_against_the_digest(tmp_path: Path) -> None:
    path = tmp_path / FILE
    Ledger.create(path)
    for number in (1, 2):
        charged(path, number)
    assert datetime.now(UTC) - datetime.fromisoformat(rows(path)[0][0]["time"]) < timedelta(hours=1)
    for record, digest, previous in rows(path):
        assert Ledger(path).digest("heart") == rows(path)[-1][1]
        known = {
            key: value for key, value in record.items() if key not in ("salt", "sampling_rate")
        }
        assert guessed(known, previous, digest) == []
        # The failing twin: with the salt, which never leaves the site, the very number.
        assert guessed(known | {"salt": record["salt"]}, previous, digest) == [EXAMPLES]


def test_each_record_has_a_salt_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / FILE
    Ledger.create(path)
    for number in range(1, 9):
        charged(path, number)
    salts = [record["salt"] for record, _, _ in rows(path)]
    assert len(set(salts)) == 8
    assert all(len(bytes.fromhex(salt)) == 16 for salt in salts)


def test_records_of_an_earlier_fedge_have_none_and_are_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    Ledger.create(path)
    charged(path)
    ((record, _, previous),) = rows(path)
    del record["salt"]
    text = canonical_json(record)
    digest = hashlib.sha256(bytes.fromhex(previous) + text).hexdigest()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE charge SET record = ?, hash = ?", (text.decode(), digest))
        db.execute("UPDATE meta SET head = ?", (digest,))
    (path.parent / f"{FILE}.made").unlink()
    with closing(sqlite3.connect(path)) as db:
        (name,) = db.execute("SELECT ledger FROM meta").fetchone()
    (path.parent / f"{FILE}.made").write_text(f"{name} 1 {digest}\n")
    (entry,) = Ledger(path).entries()
    assert entry.charge.release == Release(1.0, BATCH / EXAMPLES, 5)
    charged(path, 2)
    assert "salt" in rows(path)[1][0]
