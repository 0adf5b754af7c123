"""Faults at fedge's own sites, under the names that they have in flower_faults.py; see ours.py.

"Refused" means that the fault neither changed nor ended the round. ``OVERFLOWS`` are those that a server brings about
by weights with which one record overflows: under noise neither an error nor a count may tell of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import RecordDict

from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32
from fedge.shared.compile import candidates
from fedge.shared.errors import SiteError

from .deviant import Server
from .flower_parties import Outcome
from .ours import REST, Attack, judged, opened_as, said
from .parties import MIN_SITES, VICTIM, make_sites
from .privacy import section

#: Each feature of the record that the victim holds or not; others are below 10.
_RECORD: Final = 1000.0


def nan_update(home: Path) -> Attack:
    """A fault: a column of the victim's data is NaN, and its training makes NaN of its weights."""
    sites = make_sites(home)
    sites[VICTIM].learner.data.train_features[:, 0] = np.nan
    server = Server(sites).begin().share().masked().commit().unmask()
    return judged(
        "nan-update",
        f"{said(server)} before any key of it went out; the sum over the other {len(server.group.survivors)} was "
        f"{opened_as(server)}",
        (server,),
        due={protocol.TRAIN: 1},
        opened=(server,),
    )


def dropout_before_upload(home: Path) -> Attack:
    """A fault: the victim is gone before its vector is, at each place where it can be."""
    sites = make_sites(home)
    early = Server({n: sites[n] for n in REST}).begin().share().masked().commit().unmask()
    heard = [f"1 before exchange 1: the sum over the other 5 was {opened_as(early)}"]
    servers = [early]
    for number, place in enumerate(("share", "masked"), start=2):
        server = Server(sites, server_round=number).begin()
        if place == "share":
            # Its reply is lost; the others go on without it.
            server.share()
            del server.group.sharers[VICTIM], server.group.encrypted_shares[VICTIM]
            server.masked()
        else:
            server.share().masked(skip=VICTIM)
        server.commit().unmask()
        heard.append(f"1 at {place}: the sum over the other 5 was {opened_as(server)}")
        servers.append(server)
    right = all(text.endswith("right") for text in heard)
    return Attack(
        Outcome("dropout-before-upload", "refused" if right else "succeeds", "; ".join(heard)),
        tuple(servers),
    )


FAULTS: Final[tuple[Callable[[Path], Attack], ...]] = (nan_update, dropout_before_upload)


def a_record_with_logits_that_overflow(home: Path) -> Outcome:
    """A server sends weights with which one held-out record's logits overflow, and waits for noised counts of 0."""
    told = {"mechanism": "example", "noise_multiplier": 1.0, "metrics": "noised"}
    counted = []
    for name in ("without", "with"):
        worker, server = _overflowing(home / name)
        if name == "with":
            worker.learner.data.test_features[0] = _RECORD
        # With little noise, for the numbers to be read.
        content = _request(server, protocol.QUALIFY, **told, metrics_noise_multiplier=0.01)
        counts = worker.answer(protocol.QUALIFY, content)[protocol.METRICS][protocol.COUNTS]
        counted.append([round(count) for count in counts])
    moved = max(abs(one - other) for one, other in zip(*counted, strict=True))
    words = (
        f"that record counts as wrong: {counted[1][1]} examples are counted with it and {counted[0][1]} without, "
        f"and no counter moves by more than {moved}"
    )
    refused = moved <= 1 and counted[0][1] == 8
    return Outcome(
        "a-record-with-logits-that-overflow", "refused" if refused else "succeeds", words
    )


def an_update_that_overflows(home: Path) -> Outcome:
    """A server sends weights with which training, or ranges, overflow over one record, and waits for an error."""
    said = {}
    for mechanism in ("off", "distributed", "local", "central", "central-mf", "example"):
        kinds = [protocol.TRAIN]
        noise: dict[str, Any] = {}
        if mechanism != "off":
            noise = {"noise_multiplier": 1.0, "metrics": "noised", "metrics_noise_multiplier": 1.0}
            kinds += [protocol.CALIBRATE] if mechanism in ("local", "example") else []
        for kind in kinds:
            for name in ("without", "with"):
                worker, server = _overflowing(home / mechanism / kind / name)
                if name == "with":
                    worker.learner.data.train_features[0] = _RECORD
                content = _request(server, kind, mechanism=mechanism, **noise)
                said[mechanism, kind, name] = _error(worker, kind, content)
    in_clear = said.pop(("off", protocol.TRAIN, "with"))
    told = sorted({mechanism for (mechanism, *_), code in said.items() if code})
    words = (
        f"{', '.join(told) or 'no mechanism'} raised; an update that is not finite is noised as one of zeros, an "
        f"example's ranges end at the bound; without noise the site raised FE-{in_clear}"
    )
    refused = not told and in_clear == 401
    return Outcome("an-update-that-overflows", "refused" if refused else "succeeds", words)


OVERFLOWS: Final[tuple[Callable[[Path], Outcome], ...]] = (
    a_record_with_logits_that_overflow,
    an_update_that_overflows,
)


def _overflowing(home: Path) -> tuple[SiteWorker, Server]:
    """A site, and a server whose weights are finite, and so is what they make of every record but ``_RECORD``."""
    sites = make_sites(home)
    server = Server(sites)
    server.weights = {name: np.zeros_like(a) for name, a in server.weights.items()}
    first, *_, last = [name for name in server.weights if name.endswith("weight")]
    server.weights[first][...] = 1e36
    server.weights[last][0], server.weights[last][1] = 1, -1
    return sites[VICTIM], server


def _request(server: Server, kind: str, **told: Any) -> RecordDict:
    """A request of that server under a privacy section, in clear but for distributed noise."""
    secure = told["mechanism"] == "distributed"
    content = server.train_request(secure=secure, min_sites=MIN_SITES)
    config = content.config_records[protocol.CONFIG]
    config[protocol.PRIVACY] = section(**told).model_dump_json(by_alias=True, exclude_none=True)
    config[protocol.ROUNDS] = 3
    config[protocol.SETTINGS] = '{"learning-rate": 1e-30, "batch-size": 130, "local-steps": 1}'
    if kind != protocol.TRAIN:
        graph = candidates.fp32(server.task, server.weights, (2,))
        digest = hashlib.sha256(graph).hexdigest()
        config[protocol.CALIBRATION] = json.dumps({"enabled": True})
        config[protocol.GRAPH] = digest
        config[protocol.CANDIDATES], config[protocol.CANDIDATE_DIGESTS] = [ONNX_FP32], [digest]
    return content


def _error(worker: SiteWorker, kind: str, content: RecordDict) -> int:
    """The number of the site's error; 0 where it answers."""
    try:
        worker.answer(kind, content)
    except SiteError as error:
        return error.code
    return 0
