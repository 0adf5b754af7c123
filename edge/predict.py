"""`fedge-edge predict`: one JSON object a row."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from fedge.edge.arguments import add_bundle, add_statistics, add_threads, open_trusted
from fedge.shared.command import Command

if TYPE_CHECKING:
    from fedge.edge.runtime import Prediction


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="a .npy or .csv file, or - for CSV on standard input",
    )
    add_statistics(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="accepted; the output always is JSON")


def _run(arguments: Namespace) -> int:
    bundle = open_trusted(arguments)
    from fedge.edge.inputs import RowRules, read_examples, read_statistics
    from fedge.edge.runtime import EdgeModel

    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    model = EdgeModel.from_bundle(bundle, threads=arguments.threads, statistics=statistics)
    rules = RowRules.of(model.manifest.input, model.steps)
    row = 0
    for examples in read_examples(arguments.input, rules):
        prediction = model.predict(examples, row)
        for line in rows(prediction, model.manifest.output.labels, row):
            sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
        sys.stdout.flush()
        row += len(examples)
    return 0


def rows(prediction: Prediction, labels: tuple[str, ...], first_row: int) -> list[dict[str, Any]]:
    """One JSON object a row; probabilities to seven digits, as many as float32 holds."""
    lines = []
    for offset, (index, values) in enumerate(
        zip(prediction.indices.tolist(), prediction.probabilities.tolist(), strict=True)
    ):
        rounded = [float(f"{value:.7g}") for value in values]
        lines.append(
            {
                "row": first_row + offset,
                "label": labels[index],
                "index": index,
                "probability": rounded[index],
                "probabilities": dict(zip(labels, rounded, strict=True)),
            }
        )
    return lines


COMMAND = Command(
    summary="predict the rows of a file, one JSON object a row",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge-edge predict model.fedge --trust release.key.pub --input rows.csv",
)
