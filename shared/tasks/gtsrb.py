"""Traffic signs: colour images of 32x32 pixels in 43 classes, read from an .npz file.

German Traffic Sign Recognition Benchmark (Stallkamp, Schlipsing, Salmen and Igel, Neural Networks 32,
2012, https://doi.org/10.1016/j.neunet.2012.02.016). The file holds ``x``, uint8 ``(n, 32, 32, 3)`` in
RGB, ``y``, the class, and ``track``: the images of one class and track show one physical sign, frame
after frame, so they are alike, and a track is never divided, neither between training and test nor
between sites.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedge.shared.errors import DataError
from fedge.shared.models.cnn import CNN
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Scale
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.npz import ArraySpec, read_npz
from fedge.shared.tasks.task import Table, Task

FILE: Final = "gtsrb_32_every3rd.npz"
SIDE: Final = 32
CHANNELS: Final = 3
#: The whole benchmark has 51,839 images.
MAX_ROWS: Final = 60_000
#: Vehicles among which the signs are divided: the file names no sites.
SITES: Final = 8
#: Tracks of a class in a row for one vehicle; the last of them is for testing.
SIGNS: Final = 4

LABELS: Final = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70",
    "speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing",
    "no passing over 3.5 t", "right of way at next crossing", "priority road", "yield", "stop",
    "no vehicles", "no vehicles over 3.5 t", "no entry", "caution", "curve left", "curve right",
    "double curve", "bumpy road", "slippery road", "road narrows", "road work", "traffic lights",
    "pedestrians", "children", "bicycles", "ice or snow", "wild animals", "end of all limits",
    "right ahead", "left ahead", "straight ahead", "straight or right", "straight or left",
    "keep right", "keep left", "roundabout", "end of no passing", "end of no passing over 3.5 t",
)  # fmt: skip


def load(path: Path | None = None) -> Table:
    """Read the file ``path``, or the file of the benchmark's name in the folder ``path``.

    Images come channels first, ``(n, 3, 32, 32)``, 0 to 255.

    Raises:
        DataError: 301, the file is missing; 302, it does not follow the format.
    """
    if path is None:
        raise DataError(301, f"data.path: must be {FILE} or its folder, got nothing")
    file = path / FILE if path.is_dir() else path
    arrays = read_npz(
        file,
        {
            "x": ArraySpec(("u1",), (SIDE, SIDE, CHANNELS)),
            "y": ArraySpec(("i2", "i4", "i8", "u1")),
            "track": ArraySpec(("i2", "i4", "i8")),
        },
        max_rows=MAX_ROWS,
    )
    labels = arrays["y"].astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(LABELS)))
    if len(wrong):
        raise DataError(
            302,
            f"{file.name}, array y, row {wrong[0]}: must be a class 0 to {len(LABELS) - 1},"
            f" got {labels[wrong[0]]}",
        )
    sites, test = divided(labels, arrays["track"].astype(np.int64))
    return Table(
        features=np.ascontiguousarray(arrays["x"].transpose(0, 3, 1, 2), dtype=np.float32),
        labels=labels,
        sites=sites,
        test=test,
    )


def divided(
    labels: NDArray[Any], tracks: NDArray[Any]
) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
    """Assign images to vehicles and to training or test, by whole tracks and without randomness.

    The tracks of a class are assigned in order, four to a vehicle, the fourth of each four for
    testing; the next class begins with the next vehicle. So few vehicles have rare signs.

    Args:
        labels: class of each image, ``(n,)`` int64.
        tracks: track of each image, ``(n,)`` int64, unique within its class.

    Returns:
        Names ``vehicle-1`` to ``vehicle-8`` and the test mask, both ``(n,)``.
    """
    site = np.zeros(len(labels), dtype=np.int64)
    test = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        _, place = np.unique(tracks[rows], return_inverse=True)
        site[rows] = (place // SIGNS + label) % SITES
        test[rows] = place % SIGNS == SIGNS - 1
    names = np.asarray([f"vehicle-{number}" for number in range(1, SITES + 1)])
    return names[site], test


def network() -> nn.Module:
    """A CNN from three 32x32 channels to 43 logits."""
    return CNN(channels=CHANNELS, side=SIDE, classes=len(LABELS), hidden=64)


TASK = Task(
    name="gtsrb",
    summary=f"traffic signs, 32x32 pixels, 43 classes (a file {FILE} in data.path)",
    input=InputSchema(shape=(CHANNELS, SIDE, SIDE)),
    output=OutputSchema(labels=LABELS, activation="softmax"),
    preprocessing=(Scale(1 / 255),),
    network=network,
    loss=softmax_loss,
    counters=softmax_counters,
    metrics=(ACCURACY, LOSS),
    load=load,
)
