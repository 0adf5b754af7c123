"""Nothing of a single site travels in clear: every message of a run is searched for what its sites know."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from builders import config
from flwr.app import ArrayRecord, Message, RecordDict

from fedge.client.data.dataset import site_shares
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.secagg import messages
from fedge.shared.tasks.registry import get_task
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid


class Said(NamedTuple):
    """One request and its reply."""

    site: str
    kind: str
    request: RecordDict
    reply: RecordDict


class Recorder(InProcessGrid):
    """A grid that keeps every message."""

    def __init__(self, sites: Any, app: Any, run_id: int) -> None:
        super().__init__(sites, app, run_id)
        self.names = dict(sites)
        self.asked: dict[str, Message] = {}
        self.said: list[Said] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        self.asked |= dict(zip(ids, pushed, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            asked = self.asked[reply.metadata.reply_to_message_id]
            assert not reply.has_error(), reply.error
            site = self.names[asked.metadata.dst_node_id]
            kind = asked.metadata.message_type
            self.said.append(Said(site, kind, deepcopy(asked.content), deepcopy(reply.content)))
        return replies


class Known(NamedTuple):
    """What a site alone knows, as it would look in a message."""

    numbers: dict[str, float]
    pairs: np.ndarray


def known(run_config: Config, said: list[Said], home: Path) -> dict[str, Known]:
    """What each site would have answered to the same requests without masks."""
    task = get_task(run_config.task.name)
    found = {}
    for site, data in site_shares(run_config, task).items():
        worker = SiteWorker(site, task, data, home / site)
        numbers: dict[str, float] = {}
        pairs: list[np.ndarray] = []
        for number, one in enumerate(s for s in said if s.site == site):
            if one.kind not in (protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE):
                continue
            plain = RecordDict({k: v for k, v in one.request.items() if k != messages.SECURE})
            reply = worker.answer(one.kind, plain)
            for name, value in reply[protocol.METRICS].items():
                values = value if isinstance(value, list) else [value]
                numbers |= {f"{one.kind} {number} {name} {i}": v for i, v in enumerate(values)}
            if one.kind == protocol.TRAIN:
                before = {n: a.numpy() for n, a in plain[protocol.ARRAYS].items()}
                for name, array in reply[protocol.ARRAYS].items():
                    after = array.numpy().ravel()
                    pairs += [both(after), both(after - before[name].ravel())]
        # Small whole numbers, and the seed, stand in every message.
        common = {*range(-5, 6), run_config.run.seed}
        numbers = {n: v for n, v in numbers.items() if v not in common}
        found[site] = Known(numbers, np.unique(np.concatenate(pairs)))
    return found


def both(values: np.ndarray) -> np.ndarray:
    """Each two values in a row that are no zeros, as one number of eight bytes."""
    flat = np.ascontiguousarray(values, np.float32)
    two = np.stack([flat[:-1], flat[1:]], axis=1)
    return np.ascontiguousarray(two[(two != 0).all(axis=1)]).view(np.uint64).ravel()


def pieces(content: RecordDict) -> Iterator[bytes]:
    """All that a message holds, numbers as eight bytes."""
    for name, record in content.items():
        yield name.encode()
        for key, value in record.items():
            yield key.encode()
            if isinstance(record, ArrayRecord):
                yield value.data
                continue
            for item in value if isinstance(value, list) else [value]:
                match item:
                    case bool():
                        yield bytes([item])
                    case int():
                        yield struct.pack("<q", item)
                    case float():
                        yield struct.pack("<d", item)
                    case str():
                        yield item.encode()
                    case bytes():
                        yield item


def found_in(raw: bytes, secret: Known) -> set[str]:
    """What of a site's knowledge a message holds."""
    found = set()
    for name, value in secret.numbers.items():
        forms = [struct.pack("<d", value), struct.pack(">d", value)]
        if value == int(value):
            forms += [struct.pack("<q", int(value)), struct.pack(">q", int(value))]
        if any(form in raw for form in forms):
            found.add(name.split()[2])
    for offset in range(8):
        held = np.frombuffer(raw, "<u8", (len(raw) - offset) // 8, offset)
        at = np.searchsorted(secret.pairs, held).clip(max=len(secret.pairs) - 1)
        if (secret.pairs[at] == held).any():
            found.add("weights")
    return found


def run(task: str, out: Path, *, secure: bool) -> tuple[Config, list[Said]]:
    made: list[Recorder] = []

    def grid(*args: Any) -> Recorder:
        made.append(Recorder(*args))
        return made[0]

    run_config = config(
        task,
        run={"rounds": 1 if task == "digits" else 2, "seed": 3},
        data={"alpha": 2.0},
        secure_aggregation={"enabled": secure},
    )
    simulate(run_config, out, grid=grid)
    return run_config, made[0].said


def searched(task: str, home: Path, *, secure: bool) -> tuple[list[Said], set[str]]:
    """All that was said, and what of single sites is in it: in replies, and in requests of exchanges 1 to 4."""
    run_config, said = run(task, home / "run", secure=secure)
    secrets = known(run_config, said, home / "plain")
    assert all(len(s.numbers) > 5 and len(s.pairs) > 50 for s in secrets.values())
    parts = [s.reply for s in said] + [s.request for s in said if s.kind in messages.STEPS]
    raw = b"|".join(piece for content in parts for piece in pieces(content))
    return said, set().union(*(found_in(raw, secret) for secret in secrets.values()))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "breast-cancer"])
def test_nothing_of_one_site_is_in_any_message(task, tmp_path):
    said, found = searched(task, tmp_path, secure=True)
    assert found == set()
    kinds = {s.kind for s in said}
    assert kinds >= {protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE, *messages.STEPS}
    assert (messages.STATISTICS in kinds) == (task == "breast-cancer")
    for one in said:
        # Nor is there a place for it: no record of metrics, no array but the masked one.
        reply = one.reply
        assert not dict(reply.get(protocol.METRICS, {}))
        assert list(reply.get(protocol.ARRAYS, {})) in ([], [messages.VECTOR])
        names = b"|".join(pieces(reply))
        for name in (
            protocol.NUM_EXAMPLES,
            protocol.TRAIN_LOSS,
            protocol.FEATURE_TOTAL,
            "examples",
        ):
            assert name.encode() not in names
        assert set(reply[protocol.CONFIG]) == {"site", "run-id", "server-round", "task"}


@pytest.mark.slow
def test_the_twin_without_masks_is_full_of_it(tmp_path):
    _, found = searched("breast-cancer", tmp_path, secure=False)
    assert found >= {
        "num-train-examples",
        "num-test-examples",
        "feature-total",
        "feature-total-of-squares",
        "num-examples",
        "train-loss",
        "examples",
        "correct",
        "loss-sum",
        "weights",
    }
