"""A Flower bundle that ships its own hostile ``fedge/`` gets no data, whoever controls the server.

Real processes. Site "clinic-a" has its worker and its relay in two homes and, where the tests run as root, as two
users. A third node is Flower's own ``flower-supernode`` as the data's owner would run it: there the same bundle takes
what it likes, so what the sites withhold is withheld by fedge and not by the attack's own faults.

What an approved bundle may ask is not nothing: updates and sums are what the protocol is for, and what may be inferred
from those is bounded by the policy and by privacy mechanisms, not by who runs the code.
"""

from __future__ import annotations

import base64
import errno
import functools
import grp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.client.data import dataset as site_data
from fedge.client.data import npy_files
from fedge.client.deployment import node_key, operations
from fedge.client.relay.worker_client import STATUS
from fedge.client.settings import policy_writer, site_config
from fedge.server.deployment import operations as server_operate
from fedge.server.deployment import site_registry
from fedge.server.runs.directory import state_of
from fedge.shared import protocol
from fedge.shared.config import reader
from fedge.shared.daemon import home as homes
from fedge.shared.flower import app_bundle
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import frames as wire

pytestmark = [pytest.mark.realtime, pytest.mark.timeout(1000)]

#: How much slower than an idle one a machine may be before a test gives up.
PATIENCE = 4
TASK = "breast-cancer"
CONFIG = """
[task]
name = "breast-cancer"
[run]
rounds = 1
[data]
partition = "iid"
[sites]
count = 2
[train]
local-steps = 2
"""
BIN = Path(sys.executable).parent
FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
honest_bundle = functools.cache(app_bundle.sha256)
#: Who the relay is where the tests may choose: "nobody", who owns nothing.
NOBODY = 65534
NOBODY_RUNS: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}
FORGED = "ab" * 32


_START = """\
import site, sys
site.addsitedir({packages!r})
from fedge.shared.cli.main import main
sys.exit(main())
"""


def second_user() -> list[str] | None:
    """Where there is the right to become another user: a command of fedge that he can run, else None."""
    if os.geteuid() != 0:
        return None
    start = _START.format(packages=sysconfig.get_path("purelib"))
    # The interpreter of the tests may lie in a folder that is root's alone.
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for interpreter in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        command = [interpreter, "-c", start]
        try:
            tried = subprocess.run(
                [*command, "site", "start", "--help"], **NOBODY_RUNS, capture_output=True
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return command
    return None


# The attacker's code. It knows every path, which is more than an attacker would.

PYPROJECT = """\
[project]
name = "relay"
version = "{version}"
description = "Looks like the real one."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedge"
[tool.flwr.app.components]
serverapp = "attack.server:app"
clientapp = "{client}"
[tool.flwr.app.config]
out = ""
nodes = 1
"""

SERVER = """
import base64, json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    nodes, until = [], time.monotonic() + 300
    while len(nodes) < context.run_config["nodes"] and time.monotonic() < until:
        nodes = list(grid.get_node_ids())
        time.sleep(0.2)
    ask = RecordDict({"ask": ConfigRecord({"what": "everything"})})
    waiting = list(grid.push_messages(
        [Message(ask, dst_node_id=n, message_type="train") for n in nodes]))
    told = {}
    while len(told) < len(nodes) and time.monotonic() < until:
        pending = [m for n, m in zip(nodes, waiting) if str(n) not in told]
        for reply in grid.pull_messages(pending):
            entry = {}
            if reply.has_error():
                entry["error"] = [reply.error.code, reply.error.reason]
            else:
                for name, record in reply.content.items():
                    for key, value in record.items():
                        data = value if isinstance(value, bytes) else repr(value).encode()
                        entry[key] = base64.b64encode(data).decode()
            # The SuperLink itself answers for a node that is gone.
            node = nodes[waiting.index(reply.metadata.reply_to_message_id)]
            told[str(node)] = entry
        time.sleep(0.2)
    out = Path(context.run_config["out"])
    out.with_suffix(".tmp").write_text(json.dumps(told))
    out.with_suffix(".tmp").replace(out)
"""

SITE = """
import os, socket, struct
from pathlib import Path
from attack.targets import FILES, FOLDERS, FRAMES, MARKERS, SOCKET
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

Path(MARKERS, f"imported-{os.getpid()}").touch()
app = ClientApp()


def seen(look):
    try:
        return look()
    except OSError as error:
        return f"errno {error.errno}".encode()


def ask(frame):
    folder = os.open(os.path.dirname(SOCKET), os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(120)
        s.connect(f"/proc/self/fd/{folder}/{os.path.basename(SOCKET)}")
        got = b""
        try:
            s.sendall(frame)
        except OSError:
            pass
        try:
            while part := s.recv(65536):
                got += part
        except ConnectionError:
            pass
        return got


@app.train()
def train(message, context):
    site = context.node_config["site"]
    Path(MARKERS, f"ran-{site}").touch()
    loot = {f"file {path}": seen(Path(path).read_bytes) for path in FILES}
    loot |= {f"folder {path}": seen(lambda: repr(os.listdir(path)).encode()) for path in FOLDERS}
    loot |= {f"ask {name}": seen(lambda: ask(frame)) for name, frame in FRAMES.items()}
    loot["bundle"] = os.environ.get("FEDGE_BUNDLE", "").encode()
    return Message(RecordDict({"loot": ConfigRecord(loot)}), reply_to=message)
"""


def frames(bundle: str) -> dict[str, bytes]:
    """Requests to the worker that nobody should make, and three that its policy allows."""
    task = get_task(TASK)
    arrays = {k: Array(t.numpy()) for k, t in task.network().state_dict().items()}
    good: dict[str, Any] = {
        protocol.RUN_ID: "stolen",
        protocol.SERVER_ROUND: 1,
        protocol.TASK: TASK,
        protocol.STANDARDISE: "federated",
        protocol.VERSION: version("fedge"),
        protocol.COHORT: 2,
        protocol.SEED: 1,
        protocol.THREADS: 1,
        protocol.FEATURE_MEAN: [0.0] * task.input.shape[0],
        protocol.FEATURE_STD: [1.0] * task.input.shape[0],
        protocol.SETTINGS: '{"local-steps": 1}',
    }

    def frame(kind: str, claimed: str = bundle, **changes: Any) -> bytes:
        values = good | {key.replace("_", "-"): value for key, value in changes.items()}
        content = RecordDict({protocol.CONFIG: ConfigRecord(values)})
        if kind == protocol.TRAIN:
            content[protocol.ARRAYS] = ArrayRecord(arrays)
        return b"".join(wire.encode_request(wire.Request(kind, content, claimed)))

    return {
        "status": b"".join(wire.encode_request(wire.Request(STATUS, RecordDict()))),
        "register": frame(protocol.REGISTER, server_round=0),
        "allowed": frame(protocol.TRAIN),
        "other task": frame(protocol.TRAIN, task="digits"),
        "other bundle": frame(protocol.TRAIN, claimed=FORGED),
        "no bundle": frame(protocol.TRAIN, claimed=""),
        "cohort of 1": frame(protocol.TRAIN, cohort=1),
        "other version": frame(protocol.TRAIN, fedge_version="0.0.0"),
        "late round": frame(protocol.TRAIN, server_round=1_000_000),
        "path as run": frame(protocol.TRAIN, run_id="../../data"),
        "unknown kind": frame("query.rows"),
        "garbage": b"\xff" * 4096,
        "pickle": (64).to_bytes(8, "big") + b"\x80\x04cposix\nsystem\n.".ljust(64, b"\0"),
        "endless": (2**62).to_bytes(8, "big") + b"x" * 65536,
    }


#: fedge's own server starts no app but its own, so an attacker who has the server changes just that.
HOSTILE_SERVER = """
import sys
from fedge.server.deployment import run_scheduler as coordinators
from fedge.shared.cli.main import main

honest = coordinators.RunScheduler.launch

def launch(self, arguments):
    if any((run.flower_run or run.asked) and not run.pid for run in self._runs.values()):
        return honest(self, arguments)
    self._supervisor.task("attack", coordinators.Program(
        "flwr-serverapp", self._supervisor.log_of("attack"),
        function=coordinators.script("flwr-serverapp", arguments), environment=self._environment))

coordinators.RunScheduler.launch = launch
sys.exit(main())
"""

#: FE numbers of the refusals; the two that are no frame at all may also just be closed.
REFUSED: dict[str, set[object]] = {
    "other task": {418},
    "other bundle": {419},
    "no bundle": {419},
    "cohort of 1": {418},
    "other version": {418},
    "late round": {418},
    "path as run": {414},
    "unknown kind": {414},
    "garbage": {414, 418, "closed"},
    "pickle": {414},
    "endless": {414, 418, "closed"},
}


class Deployment:
    """Daemons of a server and of sites, as operators start them.

    Args:
        folder: takes every home.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.port = folder, folder / "server", homes.free_port()
        self.daemons: list[subprocess.Popen[bytes]] = []
        server_operate.init(self.server, f"127.0.0.1:{self.port}")

    def start(self, name: str, *words: str, command: Sequence[str] = (), **options: Any) -> None:
        """Start the daemon of a home, by another command and as another user where given."""
        kind = "server" if name == "server" else "site"
        line = [*(command or FEDGE), kind, "start", "--home", str(self.folder / name), *words]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen(line, stdout=log, stderr=log, **options))

    def wait(self, true: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait until something is true."""
        until = time.monotonic() + PATIENCE * seconds
        while not true():
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s\n{self.tails()}"
            time.sleep(0.1)

    def tails(self) -> str:
        """The ends of all logs."""
        texts = {log: log.read_text(errors="replace") for log in sorted(self.folder.rglob("*.log"))}
        return "\n".join(f"== {log}\n{text[-600:]}" for log, text in texts.items())

    def end(self) -> None:
        """End what was started, the server last."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(PATIENCE * 30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def told(home: Path) -> dict[str, Any]:
    """What a daemon says of itself."""
    return homes.status(home) or {}


def code_of(reply: bytes) -> object:
    """What a refusal says; a line that was closed on unread bytes says nothing."""
    return wire.decode_reply(reply[8:]) if len(reply) > 8 else "closed"


@dataclass
class Scene:
    deployment: Deployment
    two_users: bool
    worker: Path
    relay: Path
    rows: bytes
    columns: int

    @property
    def folder(self) -> Path:
        return self.deployment.folder

    def build(self, name: str, client: str) -> Path:
        """Write a hostile app; the same code under two names of its ClientApp."""
        app, markers = self.folder / name, self.folder / f"markers-{name}"
        markers.mkdir()
        markers.chmod(0o777)
        pid = told(self.worker)["services"]["worker"]["pid"]
        files = [
            *(self.worker / "share").glob("*.npy"),
            *map(self.worker.joinpath, _PRIVATE),
            *(Path(f"/proc/{pid}/{name}") for name in ("environ", "mem")),
        ]
        targets = {
            # Of one user the attacker may read the data outright, so only two users keep them apart.
            "FILES": [*map(str, files)] if self.two_users else [],
            "FOLDERS": [str(self.worker), str(self.worker / "share")] if self.two_users else [],
            "FRAMES": frames(honest_bundle()),
            "MARKERS": str(markers),
            "SOCKET": str(self.folder / "run" / "worker.sock"),
        }
        texts = {
            "pyproject.toml": PYPROJECT.format(version=version("fedge"), client=client),
            "attack/__init__.py": "",
            "attack/targets.py": "\n".join(f"{k} = {v!r}" for k, v in targets.items()),
            "attack/server.py": SERVER,
            "attack/site.py": SITE,
            "fedge/__init__.py": f"import pathlib; pathlib.Path({str(markers)!r}, 'shadow').touch()\n",
            "fedge/client/__init__.py": "",
            "fedge/client/app.py": "from attack import site\napp = site.app\n",
        }
        for path, text in texts.items():
            (app / path).parent.mkdir(parents=True, exist_ok=True)
            (app / path).write_text(text, encoding="utf-8")
        subprocess.run(
            [BIN / "flwr", "build"], cwd=app, env=self.environment, check=True, capture_output=True
        )
        return app

    @property
    def environment(self) -> dict[str, str]:
        """Of one who controls the server."""
        return os.environ | {
            "FLWR_HOME": str(self.deployment.server / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # A command of fedge run in this process may have silenced Flower; the tests read its log.
            "FLWR_LOG_LEVEL": "INFO",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }

    def attack(self, app: Path, nodes: int) -> dict[str, dict[str, Any]]:
        """Submit the app with Flower's own command; what each site sent back, by name."""
        out = self.folder / f"{app.name}-{time.monotonic_ns()}.json"
        config = f'out="{out}" nodes={nodes}'
        ran = subprocess.run(
            [BIN / "flwr", "run", app, "local", "--run-config", config],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        self.deployment.wait(out.is_file, 90, "the attacker's loot")
        seats = json.loads((self.deployment.server / "nodes.json").read_text())
        names = {seat["node"]: name for name, seat in seats.items()}
        return {
            names[node]: {
                key: value if key == "error" else base64.b64decode(value)
                for key, value in entry.items()
            }
            for node, entry in json.loads(out.read_text()).items()
        }

    def markers(self, name: str) -> set[str]:
        found = (self.folder / f"markers-{name}").iterdir()
        return {
            path.name.rpartition("-")[0] if "imported" in path.name else path.name for path in found
        }

    def holds_rows(self, loot: dict[str, Any]) -> bool:
        """Whether any four neighbouring values of any row are in it."""
        size, width = 4 * self.columns, 16
        pieces = {
            self.rows[at + i : at + i + width]
            for at in range(0, len(self.rows), size)
            for i in range(0, size - width + 1, width)
        }
        zeros = bytes(width)
        blob = b"\n".join(v if isinstance(v, bytes) else repr(v).encode() for v in loot.values())
        return any(piece in blob for piece in pieces - {zeros})


_PRIVATE = ("site.toml", "policy.toml", "worker.lock", "log/worker.log", "status.json")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    # Not below pytest's own folder, which only one user may enter.
    folder = Path(tempfile.mkdtemp(prefix="fedge-hostile-"))
    folder.chmod(0o755)
    try:
        deployment = Deployment(folder)
        try:
            yield _scene(deployment)
        finally:
            deployment.end()
    finally:
        shutil.rmtree(folder)


def _scene(deployment: Deployment) -> Scene:
    folder, other = deployment.folder, second_user()
    deployment.start("server", command=[sys.executable, "-c", HOSTILE_SERVER])
    (folder / "config.toml").write_text(CONFIG)
    shares = site_data.site_shares(reader.load(folder / "config.toml"), get_task(TASK))
    mine = next(iter(shares.values()))
    relay, worker = _admit(deployment, "clinic-a"), folder / "clinic-a-worker"
    _admit(deployment, "clinic-b")
    (folder / "run").mkdir(mode=0o755)
    section = site_config.WorkerPart(
        socket=folder / "run" / "worker.sock",
        group=grp.getgrgid(NOBODY).gr_name if other else None,
    )
    address = f"127.0.0.1:{deployment.port}"
    for home in (relay, worker):
        own = site_config.OwnData(share=Path("share")) if home == worker else None
        site_config.write(
            home, name="clinic-a", task=TASK, address=address, data=own, worker=section
        )
    policy_writer.write(
        worker, tasks=[TASK], bundles=[honest_bundle()], versions=[version("fedge")]
    )
    npy_files.write(worker / "share", mine)
    if other:
        for path in [relay, *relay.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    deployment.start("clinic-a-worker", "--only", "worker")
    deployment.wait(
        lambda: told(deployment.server).get("registered") == ["clinic-a", "clinic-b"],
        60,
        "the server",
    )
    who = {"command": other, **NOBODY_RUNS} if other else {}
    deployment.start("clinic-a", "--only", "relay", **who)
    deployment.start("clinic-b")

    def ready() -> bool:
        states = [
            service["state"]
            for name in ("server", "clinic-a-worker", "clinic-a", "clinic-b")
            for service in told(deployment.folder / name)
            .get("services", {"": {"state": "none"}})
            .values()
        ]
        return set(states) == {"ready"}

    deployment.wait(ready, 90, "the federation")
    rows = np.concatenate([mine.train_features, mine.test_features])
    return Scene(deployment, other is not None, worker, relay, rows.tobytes(), rows.shape[1])


def _admit(deployment: Deployment, site: str) -> Path:
    """Make a site's home and let it in."""
    home = deployment.folder / site
    address, ca = f"127.0.0.1:{deployment.port}", deployment.server / "ca" / "ca.crt"
    operations.init(home, site, task=TASK, server=address, ca=ca, bundle=honest_bundle())
    site_registry.admit(deployment.server, site, home / "site.pub")
    return home


@contextmanager
def plain_node(scene: Scene) -> Iterator[None]:
    """Flower's own SuperNode, started by the owner of the data."""
    deployment, home = scene.deployment, scene.folder / "plain"
    node_key.create(home)
    site_registry.admit(deployment.server, "plain", home / "site.pub")
    deployment.wait(lambda: "plain" in told(deployment.server).get("registered", ()), 30, "the key")
    command = [
        str(BIN / "flower-supernode"),
        "--root-certificates", str(scene.relay / "ca.crt"),
        "--superlink", f"127.0.0.1:{deployment.port}",
        "--auth-supernode-private-key", str(home / "site.key"),
        "--node-config", 'site="plain"',
        "--port", str(homes.free_port()),
    ]  # fmt: skip
    log = scene.folder / "plain.log"
    with log.open("wb") as file:
        node = subprocess.Popen(
            command,
            env=scene.environment | {"FLWR_HOME": str(home / "flower")},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deployment.wait(lambda: b"SuperNode ID:" in log.read_bytes(), 60, "the plain node")
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(PATIENCE * 30)
        site_registry.expel(deployment.server, "plain")


def test_a_bundle_with_its_own_fedge_does_not_run_where_nobody_approved_it(scene: Scene) -> None:
    app = scene.build("shadow", "fedge.client.app:app")
    with plain_node(scene):
        loot = scene.attack(app, nodes=3)
    # Without our look at the bundle it runs, and takes the rows where the users are not divided.
    assert {"ran-plain", "shadow"} <= scene.markers("shadow")
    assert "error" not in loot["plain"]
    if scene.two_users:
        assert scene.holds_rows(loot["plain"])

    assert not {"ran-clinic-a", "ran-clinic-b"} & scene.markers("shadow")
    digest = hashlib.sha256(next(app.glob("*.fab")).read_bytes()).hexdigest()
    for site, home in (("clinic-a", scene.relay), ("clinic-b", scene.folder / "clinic-b")):
        assert list(loot[site]) == ["error"]
        _, reason = loot[site]["error"]
        assert "FE-419" in reason
        for text in (str(scene.folder), "clinic", "policy", digest):
            assert text not in reason
        # Not even unpacked; what was refused is in the site's own log.
        assert not list((home / "flower").rglob("attack"))
        assert f"bundle {digest}: FE-419" in (home / "log" / "clientapp.log").read_text()

    # And the honest run that comes after it is served.
    name = server_operate.submit(scene.deployment.server, scene.folder / "config.toml")
    run = scene.deployment.server / "runs" / name
    scene.deployment.wait(lambda: state_of(run) != "unfinished", 120, "the honest run")
    assert state_of(run) == "finished", scene.deployment.tails()
    (line,) = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
    assert line["trained"] == ["clinic-a", "clinic-b"]


def test_even_approved_it_gets_no_data(scene: Scene) -> None:
    """The operator was tricked: policy.toml holds the hash of the attacker's bundle."""
    app = scene.build("approved", "attack.site:app")
    digest = hashlib.sha256(next(app.glob("*.fab")).read_bytes()).hexdigest()
    policy_writer.write(
        scene.worker,
        tasks=[TASK],
        bundles=[honest_bundle(), digest],
        versions=[version("fedge")],
    )
    loot = scene.attack(app, nodes=2)
    assert "ran-clinic-a" in scene.markers("approved")
    assert "ran-clinic-b" not in scene.markers("approved")
    assert "FE-419" in loot["clinic-b"]["error"][1]

    found = loot["clinic-a"]
    assert found["bundle"].decode() == digest
    assert not scene.holds_rows(found)
    replies = {key.removeprefix("ask "): v for key, v in found.items() if key.startswith("ask ")}
    assert set(replies) == set(frames(digest))
    codes = {name: code_of(replies[name]) for name in REFUSED}
    assert {name: code for name, code in codes.items() if code not in REFUSED[name]} == {}
    # What the policy allows is answered as the protocol has it: counts, sums, and an update of the model.
    for name in ("status", "register", "allowed"):
        answer = wire.decode_reply(replies[name][8:])
        assert isinstance(answer, RecordDict), name
        for record in answer.values():
            if isinstance(record, ArrayRecord):
                shapes = {k: a.shape for k, a in record.items()}
                network = get_task(TASK).network().state_dict()
                assert shapes == {k: tuple(t.shape) for k, t in network.items()}
    if scene.two_users:
        private = {k: v for k, v in found.items() if k.startswith(("file ", "folder "))}
        assert len(private) == 4 + len(_PRIVATE) + 2 + 2
        assert set(private.values()) == {f"errno {errno.EACCES}".encode()}
