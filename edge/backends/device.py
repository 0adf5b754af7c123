"""Detects this device's processor, GPU, ONNX Runtime providers and TensorRT wheels."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from fedge.edge.backends.backend import CPU, CUDA, OPENVINO, PROVIDERS
from fedge.edge.backends.cuda import Driver, Gpu
from fedge.shared.bundle.manifest_artefacts import ENGINE_KINDS, Artefact
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.errors import BundleError

_MAX_NAME: Final = 100
_CPUINFO_BYTES: Final = 64 * 1024
#: The distributions that bring the module onnxruntime.
_ONNXRUNTIME: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
)


@dataclass(frozen=True)
class Device:
    """The hardware and runtimes of this device.

    Attributes:
        cpu: name of the processor.
        places: available places of ONNX Runtime.
        gpu: None where there is none; then ``no_gpu`` says why.
        no_gpu: why there is no GPU, in a few words.
        wheels: version of each TensorRT runtime that is installed and was looked for.
    """

    cpu: str
    places: tuple[str, ...] = (CPU,)
    gpu: Gpu | None = None
    no_gpu: str = "device: was not looked for"
    wheels: Mapping[str, str] = field(default_factory=dict)


def detect(artefacts: tuple[Artefact, ...], *, engines: bool = False) -> Device:
    """Detect this device's hardware and runtimes, as far as the artefacts need them.

    Args:
        artefacts: that may be run; a GPU is only looked for where one of them, or a provider, could use it.
        engines: look for TensorRT even where no artefact is an engine, as one may be built.
    """
    providers = load_onnxruntime().get_available_providers()
    places = [place for place in (CPU, CUDA, OPENVINO) if PROVIDERS[place] in providers]
    engines = engines or any(artefact.kind in ENGINE_KINDS for artefact in artefacts)
    if not (engines or CUDA in places):
        return Device(cpu_name(), tuple(places))
    try:
        gpu = Driver().gpu()
    except BundleError as error:
        places = [place for place in places if place != CUDA]
        return Device(cpu_name(), tuple(places), None, error.message)
    return Device(cpu_name(), tuple(places), gpu, "", _wheels() if engines else {})


def cpu_name() -> str:
    """The processor's model name, at most 100 printable characters."""
    name = ""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            lines = file.read(_CPUINFO_BYTES).decode("ascii", "replace").splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        # Arm's processors have no name there, their boards may.
        name = fields.get("model name") or fields.get("Model") or ""
    except OSError:
        pass
    name = name or platform.processor() or platform.machine() or CPU
    return "".join(c for c in " ".join(name.split()) if c.isprintable())[:_MAX_NAME]


def runtime_versions() -> dict[str, str]:
    """Versions of the runtimes on which a qualification depends; nothing is imported."""
    versions = {}
    for name in _ONNXRUNTIME:
        try:
            versions["onnxruntime"] = version(name)
            break
        except PackageNotFoundError:
            continue
    return versions


def _wheels() -> dict[str, str]:
    from fedge.edge.backends.engine import MODULES, load_wheel

    loaded = {runtime: load_wheel(runtime) for runtime in MODULES}
    return {runtime: str(wheel.__version__) for runtime, wheel in loaded.items() if wheel}
