"""A task with a model of some 9 MB, as a package of its own that is only on a path, not installed."""

from __future__ import annotations

from pathlib import Path

_MODULE = """\
from dataclasses import replace

from fedge.shared.models.fnn import FNN
from fedge.shared.tasks import breast_cancer

TASK = replace(
    breast_cancer.TASK, name="wide", summary="a large network", network=lambda: FNN((30, 1500, 1500, 1))
)
"""
#: Parameters of the network, each a float32.
PARAMETERS = 30 * 1500 + 1500 + 1500 * 1500 + 1500 + 1500 + 1


def write(folder: Path) -> str:
    """Write the package; the folder, for PYTHONPATH."""
    information = folder / "wide-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "wide_task.py").write_text(_MODULE, encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wide\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[fedge.tasks]\nwide = wide_task:TASK\n")
    return str(folder)
