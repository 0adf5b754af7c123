"""Attacks on what the documents promise beside noise and budget: counters, shares, checksums, processes, code.

Run as those of ``privacy`` are; see table.py. "Succeeds" stands where the documents promise nothing. ``OVERFLOWS`` are
of weights with which one record overflows: under noise neither an error nor a count may tell of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from math import isinf
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import RecordDict
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.config import get_project_dir
from flwr.supernode.runtime import run_clientapp
from pydantic import ValidationError

from fedge.client.relay.worker_client import SocketLink
from fedge.client.settings import policy as policies
from fedge.client.settings import policy_writer
from fedge.client.settings.policy import PolicyFile, SecurePolicy
from fedge.client.worker.handlers import SiteWorker
from fedge.client.worker.socket_server import Service
from fedge.server.secagg.attempt import GroupAttempt
from fedge.shared import protocol
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32
from fedge.shared.cli import main
from fedge.shared.compile import candidates
from fedge.shared.daemon import sockets
from fedge.shared.errors import SiteError
from fedge.shared.flower import app_bundle
from fedge.shared.flower.patches import CLIENT_APP, before_bundle
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import masking, messages
from fedge.shared.secagg.exact_counters import Counter, encode_counters

from .deviant import Server
from .flower_parties import Outcome
from .ours import said
from .parties import EXAMPLES, MIN_SITES, NAMES, VICTIM, make_sites
from .privacy import BUNDLE, DELTA, NOISED, code_of, content_of, policy_of, section, verdict


def carries_of_exact_counters(_: Path) -> Outcome:
    """A server tells three sites with losses of 10.5, 20.5 and 30 from three with 10, 20 and 31 by what it opens."""
    counter = Counter("loss", 0, 2**39, 20)

    def opened(values: tuple[float, ...], limb: int) -> list[int]:
        mask = (1 << limb) - 1
        sent = [int(encode_counters({"loss": v}, [counter])[0, 0]) for v in values]
        return [sum(one >> shift & mask for one in sent) for shift in range(0, 60, limb)]

    ours, others = (10.5, 20.5, 30.0), (10.0, 20.0, 31.0)
    same = opened(ours, 60) == opened(others, 60)
    limbs = opened(ours, 20) == opened(others, 20)
    words = "both sums are one element, and the same; with a sum for each 20 bits they were not"
    return Outcome("carries-of-exact-counters", verdict(same and not limbs), words)


def too_many_corrupt_sites(_: Path) -> Outcome:
    """A server counts on two corrupt sites where the owner reckons with three, though privacy is not required."""
    told = section(**NOISED, corrupt_sites=2)
    content = content_of(protocol.TRAIN, told, masked=True)
    owner = policy_of(**{"corrupt-sites": 3})
    code = code_of(policies.allow, owner, protocol.TRAIN, content, BUNDLE)
    try:
        SecurePolicy.model_validate({"min-sites": 15, "corrupt-sites": 5})
        masks = "is taken"
    except ValidationError:
        masks = "is refused"
    words = (
        f"the policy raised FE-{code}; for masks, a policy of five among a min-sites of 15 {masks}"
    )
    return Outcome("too-many-corrupt-sites", verdict((code, masks) == (418, "is refused")), words)


def ledger_restored_without_its_charges(home: Path) -> Outcome:
    """A site loses charges with its ledger and restores an older copy; the lost ones were of the server's own noise."""
    home.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.create(home / FILE)

    def charge(number: int, mechanism: str) -> None:
        one = Charge(
            "heart", "site", "r-1", number, "train", 0, mechanism, Release(4.0), DELTA, f"{number:064x}"
        )  # fmt: skip
        ledger.charge(one, Budget(1e6, DELTA, "consumers"))

    charge(1, "distributed")
    copy = (home / FILE).read_bytes()
    charge(2, "central")
    (home / FILE).write_bytes(copy)
    try:
        Ledger(home / FILE)
        refused = 0
    except SiteError as error:
        refused = error.code
    with redirect_stdout(io.StringIO()):
        noise = ("--noise-multiplier", "4", "--sampling-rate", "1", "--steps", "1")
        main.main(["privacy", "restore", "--home", str(home), *noise])
    spent = Ledger(home / FILE).spent("heart", "site", DELTA)
    words = (
        f"the copy alone: FE-{refused}; restored, epsilon for one site at delta {DELTA:g} is {spent.consumers:.3f} "
        f"against the consumers and {'infinite' if isinf(spent.server) else 'finite'} against the server, unless the "
        "owner says that all noise was its own"
    )
    right = refused == 428 and isinf(spent.server)
    return Outcome("ledger-restored-without-its-charges", verdict(right), words)


def undecryptable_shares(home: Path) -> Outcome:
    """A site deals shares that nobody can decrypt, round after round; then two of six say so of an honest dealer."""
    server = Server(make_sites(home)).begin().share()
    dealt = server.group.encrypted_shares[VICTIM]
    server.group.encrypted_shares[VICTIM] = {site: bytes(len(dealt[site])) for site in dealt}
    group = server.masked().group
    accusers = [r.site for r in server.refusals if (r.code, r.peer) == (425, VICTIM)]
    found: list[set[str]] = []
    for by in (accusers, accusers[:2]):
        trial = GroupAttempt([], group, blames={VICTIM: dict.fromkeys(by, 425)})
        trial.check(messages.MASKED, 5)
        found.append(trial.found_out)
    rest = {n: s for n, s in server.sites.items() if n != VICTIM}
    following = Server(rest, server_round=2).begin().share().masked().commit().unmask()
    words = (
        f"{said(server)}: more than a third of its holders, so it is left out for the run; the next sum, over the "
        f"other {len(rest)}, was {'right' if following.is_right() else 'wrong'}; "
        f"two of {len(NAMES)} have {'nobody' if not found[1] else 'the dealer'} left out"
    )
    right = found == [{VICTIM}, set()] and following.is_right()
    return Outcome("undecryptable-shares", verdict(right), words)


def another_vector_of_the_same_checksum(_: Path) -> Outcome:
    """A server claims that a site masked another vector, which has the checksum that the site signed."""
    vector = np.arange(64, dtype=np.uint32)
    # GHASH's key is all zeros, so that everybody has H, and a block counts H times what the next does: what the field's
    # one changes in the first, H takes back in the second.
    h = Cipher(algorithms.AES(bytes(32)), modes.ECB()).encryptor().update(bytes(16))  # noqa: S305
    other = vector.copy().view(np.uint8)
    other[0] ^= 0x80
    other[16:32] ^= np.frombuffer(h, np.uint8)
    forged = other.view(np.uint32)
    met = masking.checksum(forged) == masking.checksum(vector) and not np.array_equal(
        forged, vector
    )
    words = (
        "two blocks changed give another vector of the same 64 bits: they are against damage on the way, settle no "
        "dispute, and nothing rests on them"
    )
    return Outcome("another-vector-of-the-same-checksum", "succeeds" if met else "refused", words)


def worker_status(home: Path) -> Outcome:
    """A relay that was taken over asks the worker for its status before it has shown an approved bundle."""
    worker = make_sites(home)[VICTIM]
    policy_writer.write(home, tasks=["blobs"], bundles=[BUNDLE], versions=["0.1.0"])
    service = Service(worker, PolicyFile(home), 20.0, lambda _: None)
    path = home / "worker.sock"
    with sockets.listen(path) as listener:
        asked = threading.Thread(target=lambda: service.take(listener.accept()[0]), daemon=True)
        asked.start()
        told = SocketLink(path, 20.0, "").status()
        asked.join(20)
        service.drain(5)
    counts = {EXAMPLES[VICTIM], len(worker.learner.data.test_labels)}
    known = sorted(told.keys() - {"pid", "site", "task", "device", "busy", "uptime"})
    words = f"it tells {', '.join(sorted(told))}, and no number of examples"
    hidden = not known and not counts & {v for k, v in told.items() if k not in ("pid", "uptime")}
    return Outcome("worker-status", verdict(hidden), words)


def core_through_a_pipe(_: Path) -> Outcome:
    """A crash hands the worker's memory to the program that core_pattern pipes to, whatever the limit of core files."""
    program = """
import ctypes
from fedge.shared.daemon.process import forbid_core_dumps
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
forbid_core_dumps()
print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    words = f"PR_SET_DUMPABLE of the worker is {found[1]}, where a process begins with {found[0]}"
    return Outcome("core-through-a-pipe", verdict(found == ["1", "0"]), words)


def code_from_another_folder(home: Path) -> Outcome:
    """A server sends the approved bundle and names another one's folder in the run's record (id, version, hash)."""
    content, digest = app_bundle.bundle(), app_bundle.sha256()
    name, number = get_fab_metadata(content)
    with (
        patch.dict("os.environ", {"FLWR_HOME": str(home)}),
        patch.object(run_clientapp, "install_from_fab", run_clientapp.install_from_fab),
        patch.object(run_clientapp, "get_project_dir", get_project_dir),
    ):
        before_bundle(CLIENT_APP, lambda _: None)
        with redirect_stdout(io.StringIO()):
            folder = run_clientapp.install_from_fab(content, skip_prompt=True)
        own = run_clientapp.get_project_dir(name, number, digest) == folder
        named = ((name, "9.9.9", digest), ("other/app", number, digest), (name, number, "f" * 64))
        for place in named:
            shutil.copytree(folder, get_project_dir(*place))
        codes = [code_of(run_clientapp.get_project_dir, *place) for place in named]
        theirs = sum(get_project_dir(*place).is_dir() for place in named)
    words = (
        f"another id, version or hash: {', '.join(f'FE-{code}' for code in codes)}; Flower itself takes "
        f"{theirs} of the {len(named)} folders"
    )
    return Outcome("code-from-another-folder", verdict(own and codes == [419] * 3), words)


PROMISES: Final[tuple[Callable[[Path], Outcome], ...]] = (
    carries_of_exact_counters,
    too_many_corrupt_sites,
    ledger_restored_without_its_charges,
    undecryptable_shares,
    another_vector_of_the_same_checksum,
    worker_status,
    core_through_a_pipe,
    code_from_another_folder,
)


#: Each feature of the record that the victim holds or not; others are below 10.
_RECORD: Final = 1000.0


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
