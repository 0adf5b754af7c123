import logging
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from fedge.client.training import device
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import ConfigError, SiteError


def settings(kind):
    return TrainSection.model_validate({"mixed-precision": kind})


def test_the_policys_device_is_chosen():
    assert device.choose("cpu") == torch.device("cpu")
    found = device.choose("auto")
    assert found.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("wanted", ["cuda:64", "cuda:99"])
def test_a_device_that_is_not_there_is_a_numbered_error(wanted):
    with pytest.raises(SiteError) as caught:
        device.choose(wanted)
    assert caught.value.code == 417


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (MemoryError(), 416),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 416),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            ),
            416,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 416),
        (torch.AcceleratorError("CUDA error: out of memory"), 416),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 417),
        (RuntimeError("CUDA error: unspecified launch failure"), 417),
        (RuntimeError("CUDA driver initialization failed"), 417),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), 417),
        (RuntimeError("shapes differ"), None),
        (ValueError("CUDA error"), None),
    ],
)
def test_failures_of_memory_and_device_are_told_from_others(error, number):
    assert device.error_code(error) == number


def test_the_cpus_own_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2**50)
    assert device.error_code(caught.value) == 416


def failing(task, error):
    def loss(logits, labels):
        raise error

    return replace(task, loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 416),
        (MemoryError(), 416),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), 417),
        (RuntimeError("CUDA error: the launch timed out"), 417),
    ],
)
def test_they_end_the_task_and_the_worker_lives_on(
    task, data, ask, tell, weights, tmp_path, error, code, caplog
):
    worker = SiteWorker("a", failing(task, error), data, tmp_path)
    found = tell(worker, ask(protocol.TRAIN, weights))
    assert isinstance(found, SiteError)
    assert found.code == code
    assert str(error) in caplog.text
    assert str(error) not in found.message or not str(error)
    assert protocol.METRICS in tell(worker, ask(protocol.EVALUATE, weights))


@pytest.mark.slow
def test_what_did_not_fit_is_let_go(task, data, ask, tell, weights, tmp_path, caplog):
    # Pytest keeps every record, and with it the frames of its exception; no handler of ours does.
    caplog.set_level(logging.CRITICAL + 1, "fedge.client.worker.handlers")
    seen = []

    def loss(logits, labels):
        held = torch.zeros(1000)
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError(f"CUDA out of memory {held.numel()}")

    worker = SiteWorker("a", replace(task, loss=loss), data, tmp_path)
    assert tell(worker, ask(protocol.TRAIN, weights)).code == 416
    assert seen[0]() is None
    assert worker.learner._prepared is None


def test_a_network_that_fails_ends_the_task_too(task, data, ask, tell, weights, tmp_path):
    worker = SiteWorker("a", task, data, tmp_path)
    handle = worker.learner.network.register_forward_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: unknown error"))
    )
    assert tell(worker, ask(protocol.EVALUATE, weights)).code == 417
    handle.remove()
    assert protocol.METRICS in tell(worker, ask(protocol.EVALUATE, weights))


_BOUNDED = """
import dataclasses, tempfile, torch
from pathlib import Path
from fedge.client.training import device
from fedge.client.data.dataset import own_examples
from fedge.client.settings.site_config import OwnData
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.tasks.registry import get_task
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

plain = get_task("breast-cancer")
hungry = [True]
def loss(logits, labels):
    if hungry[0]:
        torch.ones(2**28, dtype=torch.float64)
    return plain.loss(logits, labels)
task = dataclasses.replace(plain, loss=loss)
device.bound(device.CPU, 1.5, 0.9)
with tempfile.TemporaryDirectory() as home:
    worker = SiteWorker("a", task, own_examples(task, "a", OwnData()), Path(home))
    request = RecordDict({
        protocol.CONFIG: ConfigRecord({
            protocol.RUN_ID: "r", protocol.SERVER_ROUND: 1, protocol.TASK: task.name,
            protocol.STANDARDISE: "site", protocol.SEED: 1, protocol.THREADS: 1,
            protocol.SETTINGS: "{}"}),
        protocol.ARRAYS: ArrayRecord(
            {n: Array(t.numpy()) for n, t in task.network().state_dict().items()})})
    try:
        worker.answer(protocol.TRAIN, request)
    except SiteError as error:
        print(error.code)
    hungry[0] = False
    print(protocol.ARRAYS in worker.answer(protocol.TRAIN, request))
"""


@pytest.mark.slow
def test_a_real_bound_on_memory_ends_the_task_and_not_the_process():
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["416", "True"], done.stderr


def test_a_bound_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"policy.memory-gib: must be at least"):
        device.bound(device.CPU, 0.01, 0.9)
    device.bound(device.CPU, None, 0.9)


def test_a_bound_that_a_gpu_would_ignore_is_refused():
    with pytest.raises(ConfigError) as caught:
        device.bound(torch.device("cuda", 0), 8.0, 0.9)
    assert caught.value.code == 201
    assert "policy.toml: memory-gib: must be left out with a GPU, got 8" in caught.value.message


def test_float16_needs_a_gpu():
    device.require(settings("float16"), torch.device("cuda", 0))
    device.require(settings("bfloat16"), device.CPU)
    with pytest.raises(SiteError) as caught:
        device.require(settings("float16"), device.CPU)
    assert caught.value.code == 414
    assert "train.mixed-precision: must be off or bfloat16 on cpu" in caught.value.message


def test_seeding_leaves_the_generator_as_it_was():
    before = torch.random.get_rng_state()
    with device.seeded(3, device.CPU):
        first = torch.rand(3)
    with device.seeded(3, device.CPU):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)
