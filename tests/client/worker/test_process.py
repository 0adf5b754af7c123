"""The worker as a real process."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.client.data import npy_files
from fedge.client.data.dataset import own_examples
from fedge.client.relay.worker_client import SocketLink
from fedge.client.settings import policy_writer, site_config
from fedge.client.settings.site_config import OwnData, WorkerPart
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import frames

BUNDLE, OTHER = "ab" * 32, "cd" * 32
TASK = "breast-cancer"
GOOD = {"tasks": [TASK], "bundles": [BUNDLE], "versions": ["0.1.0"]}
START = 300.0


class Process:
    """``python -m fedge.client.worker.process HOME``, and its log."""

    def __init__(self, home, *arguments):
        self.home, self.log = home, home / "log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "fedge.client.worker.process", home, *arguments], stderr=log
            )

    def link(self, deadline=START, bundle=BUNDLE):
        return SocketLink(self.home / "worker.sock", deadline, bundle)

    def text(self):
        return self.log.read_text()

    def end(self, number=signal.SIGKILL):
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(60)


def make(home, **more):
    site_config.write(home, name="site-1", task=TASK, address="127.0.0.1:1", **more)
    policy_writer.write(home, **GOOD)
    return home


def request(kind, weights=None, **changes):
    values = {
        protocol.RUN_ID: "r-1",
        protocol.SERVER_ROUND: 1,
        protocol.TASK: TASK,
        protocol.VERSION: "0.1.0",
        protocol.COHORT: 3,
        protocol.STANDARDISE: "site",
        protocol.SEED: 42,
        protocol.THREADS: 1,
    }
    if kind == protocol.TRAIN:
        values[protocol.SETTINGS] = '{"local-steps": 20}'
    config = ConfigRecord(values | {k.replace("_", "-"): v for k, v in changes.items()})
    content = RecordDict({protocol.CONFIG: config})
    if weights is not None:
        content[protocol.ARRAYS] = ArrayRecord({k: Array(a) for k, a in weights.items()})
    return content


def long_training(weights, steps=3000):
    return request(protocol.TRAIN, weights, train=f'{{"local-steps": {steps}}}', server_round=2)


def data_of(reply):
    return b"".join(frames.encode_reply(reply))


@pytest.fixture(scope="module")
def weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {k: t.numpy().copy() for k, t in get_task(TASK).network().state_dict().items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same site in this process, which says what the replies must be."""
    task = get_task(TASK)
    data = own_examples(task, "site-1", OwnData())
    return SiteWorker("site-1", task, data, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One process for the tests that leave it as it was, in a home deeper than a socket's path may be."""
    home = tmp_path_factory.mktemp("home").joinpath(*["a-folder-with-a-long-name"] * 6)
    process = Process(make(home))
    process.link().permit(BUNDLE)
    yield process
    process.end()


@pytest.fixture
def started(tmp_path):
    """Processes that end with the test."""
    found = []

    def start(home, *arguments):
        found.append(Process(home, *arguments))
        return found[-1]

    yield start
    for process in found:
        process.end()


def wait_until(true, seconds=START):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


pytestmark = pytest.mark.slow


def test_replies_equal_those_of_a_simulated_site(running, alone, weights):
    for kind in (protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE):
        asked = request(kind, None if kind == protocol.REGISTER else weights)
        found = running.link().exchange(kind, asked)
        assert data_of(found) == data_of(alone.answer(kind, asked))
    assert (
        f" INFO site=site-1 run=r-1 round=1 fedge.client.worker.socket_server: {protocol.TRAIN}"
        in running.text()
    )
    assert "fedge.client.worker.process: ready\n" in running.text()


def test_a_repeated_request_is_trained_once(running, weights):
    asked = request(protocol.TRAIN, weights, server_round=7)
    first = running.link().exchange(protocol.TRAIN, asked)
    assert data_of(running.link().exchange(protocol.TRAIN, asked)) == data_of(first)
    lines = [line for line in running.text().splitlines() if "round=7" in line]
    assert [line.partition(": ")[2][:15] for line in lines] == [
        "train: answered",
        "train: asked ag",
    ]


def test_a_probe_is_answered_while_the_site_trains(running, weights):
    content = long_training(weights)
    thread = threading.Thread(target=running.link().exchange, args=(protocol.TRAIN, content))
    thread.start()
    wait_until(lambda: running.link().status()["busy"])
    reply = running.link().exchange(protocol.PROBE, request(protocol.PROBE))
    # It would be 0 after the training.
    assert reply[protocol.METRICS]["busy"] == 1
    thread.join(60)


def test_a_bundle_that_is_not_approved_is_refused(running, weights):
    for call, *arguments in (
        (running.link().permit, OTHER),
        (running.link(bundle=OTHER).exchange, protocol.TRAIN, request(protocol.TRAIN, weights)),
    ):
        with pytest.raises(SiteError) as caught:
            call(*arguments)
        assert caught.value.code == 419
    assert f"got {OTHER}" in running.text()


def test_the_policys_word_holds_at_once(running, weights):
    asked = request(protocol.TRAIN, weights, cohort=1)
    with pytest.raises(SiteError) as caught:
        running.link().exchange(protocol.TRAIN, asked)
    assert caught.value.code == 418
    policy_writer.write(running.home, **GOOD, min_cohort=1)
    assert protocol.ARRAYS in running.link().exchange(protocol.TRAIN, asked)
    (running.home / "policy.toml").unlink()
    with pytest.raises(SiteError) as caught:
        running.link().exchange(protocol.TRAIN, asked)
    assert caught.value.code == 418
    policy_writer.write(running.home, **GOOD)
    running.link().exchange(protocol.REGISTER, request(protocol.REGISTER))


def test_no_core_is_dumped_of_it_and_no_other_process_of_its_user_reads_it(running):
    """Of one that is not dumpable the files in /proc are root's, and here those are compared that tell."""
    pid = running.link().status()["pid"]
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    program = """
import ctypes, sys
from fedge.client.worker import process
try:
    process.main(__import__("pathlib").Path(sys.argv[1]))
except Exception as error:
    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), error.code)  # PR_GET_DUMPABLE
"""
    found = subprocess.run(
        [sys.executable, "-c", program, running.home / "nowhere"], capture_output=True, timeout=300
    )
    assert found.stdout == b"0 901\n", found


def test_a_second_worker_of_the_same_home_is_refused(running, started):
    second = started(running.home)
    assert second.popen.wait(START) == 1
    assert "FE-902" in running.text()
    running.link().status()


def test_a_worker_killed_while_it_trains_is_asked_again(tmp_path, started, alone, weights):
    home = make(tmp_path / "home")
    content, replies = long_training(weights), []
    first = started(home)
    first.link().permit(BUNDLE)

    def ask():
        replies.append(first.link().exchange(protocol.TRAIN, content))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: first.link().status()["busy"])
    time.sleep(0.2)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert not replies
    second = started(home)
    thread.join(START)
    assert second.popen.poll() is None
    assert data_of(replies[0]) == data_of(alone.answer(protocol.TRAIN, content))


def test_sigterm_ends_it_cleanly_though_it_trains(tmp_path, started, weights):
    process = started(make(tmp_path / "home"))
    process.link().permit(BUNDLE)
    caught = []

    def ask():
        try:
            process.link(deadline=10.0).exchange(protocol.TRAIN, long_training(weights, 2_000_000))
        except SiteError as error:
            caught.append(error.code)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: process.link().status()["busy"])
    assert process.end(signal.SIGTERM) == 0
    assert not (process.home / "worker.sock").exists()
    assert "Traceback" not in process.text()
    thread.join(60)
    assert caught == [420]


def test_it_serves_a_share_and_ends_with_its_parent(tmp_path, weights):
    home = make(tmp_path / "home", data=OwnData.model_validate({"share": Path("share")}))
    whole = own_examples(get_task(TASK), "site-1", OwnData())
    npy_files.write(home / "share", whole)
    # The shell starts the worker in the background and waits, so it is the parent.
    command = (
        f'"{sys.executable}" -m fedge.client.worker.process "{home}" --with-parent & echo $!; wait'
    )
    with subprocess.Popen(
        ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as shell:
        pid = int(shell.stdout.readline())
        link = SocketLink(home / "worker.sock", START, BUNDLE)
        link.permit(BUNDLE)
        reply = link.exchange(protocol.REGISTER, request(protocol.REGISTER))
        assert reply[protocol.METRICS][protocol.NUM_TRAIN_EXAMPLES] == len(whole.train_labels)
        shell.kill()
    wait_until(lambda: not (home / "worker.sock").exists())
    wait_until(
        lambda: (
            not Path(f"/proc/{pid}/cmdline").exists()
            or not Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    )


@pytest.mark.parametrize(
    ("spoil", "number"),
    [
        (lambda home: (home / "policy.toml").unlink(), "FE-901"),
        (lambda home: (home / "site.toml").unlink(), "FE-901"),
        (lambda home: (home / "policy.toml").write_text("tasks = 3"), "FE-201"),
        (lambda home: policy_writer.write(home, **GOOD, device="cuda:7"), "FE-417"),
        (
            lambda home: make(home, data=OwnData.model_validate({"share": Path("none")})),
            "FE-301",
        ),
        (
            lambda home: make(home, worker=WorkerPart.model_validate({"group": "no-such-group"})),
            "FE-201",
        ),
    ],
)
def test_what_it_cannot_start_with_is_one_line(tmp_path, started, spoil, number):
    home = make(tmp_path / "home")
    spoil(home)
    process = started(home)
    assert process.popen.wait(START) == 1
    assert process.text().splitlines()[-1].startswith(number)
    assert "Traceback" not in process.text()


def test_a_bound_on_memory_is_kept_and_survived(tmp_path, started, weights):
    home = make(tmp_path / "home")
    path = home / "policy.toml"
    text = path.read_text().replace("# memory-gib = 8.0", "memory-gib = 0.8")
    path.write_text(text.replace('device = "auto"', 'device = "cpu"'))
    process = started(home)
    process.link().permit(BUNDLE)
    # 384 MiB, which the worker would hold twice: as received, and as an array of its own.
    large = weights | {"more": np.zeros(3 * 2**24, np.float64)}
    with pytest.raises(SiteError) as caught:
        process.link().exchange(protocol.TRAIN, request(protocol.TRAIN, large))
    assert caught.value.code == 416
    assert protocol.ARRAYS in process.link().exchange(
        protocol.TRAIN, request(protocol.TRAIN, weights)
    )
    assert process.popen.poll() is None


def test_another_device_in_the_policy_takes_another_process(tmp_path, started, weights):
    home, replies = make(tmp_path / "home"), []
    first = started(home)
    first.link().permit(BUNDLE)
    policy_writer.write(home, **GOOD, device="cpu")

    def ask():
        replies.append(first.link().exchange(protocol.TRAIN, request(protocol.TRAIN, weights)))

    thread = threading.Thread(target=ask)
    thread.start()
    assert first.popen.wait(START) == 75
    started(home)
    thread.join(START)
    assert protocol.ARRAYS in replies[0]
