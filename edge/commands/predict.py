"""`fedge-edge predict`: one JSON object a row."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedge.edge.commands.arguments import (
    add_artifact,
    add_bundle,
    add_statistics,
    add_threads,
    open_trusted,
)
from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.edge.runtime.model import Prediction


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="a .npy or .csv file, or - for CSV on standard input",
    )
    add_artifact(parser)
    add_statistics(parser)
    add_threads(parser)
    # Accepted as by the other commands; the output is JSON always.
    parser.add_argument("--json", action="store_true", help=SUPPRESS)


def _run(arguments: Namespace) -> int:
    bundle, record = open_trusted(arguments)
    from fedge.edge.inputs.reader import read_examples, read_statistics
    from fedge.edge.inputs.row_rules import RowRules
    from fedge.edge.runtime.model import EdgeModel

    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    model = EdgeModel.from_bundle(
        bundle,
        threads=arguments.threads,
        statistics=statistics,
        artefact=arguments.artifact,
        record=record,
    )
    rules = RowRules.from_schema(model.manifest.input, model.steps)
    row = 0
    for examples in read_examples(arguments.input, rules):
        prediction = model.predict(examples, row)
        labels = model.manifest.output.labels
        for line in rows(prediction, labels, row, rules.outside(examples)):
            sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
        sys.stdout.flush()
        row += len(examples)
    # On stdout are the rows alone; at the end, as what was chosen may have failed on the way.
    sys.stderr.write(f"{model.backend}: {model.why}\n")
    return 0


def rows(
    prediction: Prediction,
    labels: tuple[str, ...],
    first_row: int,
    outside: Sequence[tuple[str, ...]],
) -> list[dict[str, Any]]:
    """One JSON object a row; probabilities to seven digits, as many as float32 holds.

    Args:
        prediction: for n examples.
        labels: names of the model's labels.
        first_row: number of the first example.
        outside: names of the columns outside their features' ranges, one tuple an example; an
            empty one omits the key.
    """
    lines = []
    indices, probabilities = prediction.indices.tolist(), prediction.probabilities.tolist()
    for offset, (index, values, names) in enumerate(
        zip(indices, probabilities, outside, strict=True)
    ):
        rounded = [float(f"{value:.7g}") for value in values]
        line = {
            "row": first_row + offset,
            "label": labels[index],
            "index": index,
            "probability": rounded[index],
            "probabilities": dict(zip(labels, rounded, strict=True)),
        }
        if names:
            line["outside"] = list(names)
        lines.append(line)
    return lines


COMMAND = Command(
    summary="predict the rows of a file, one JSON object a row",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog=(
        "A row's \"outside\" names columns beyond the low and high of the bundle's schema\n\n"
        "example:\n  fedge-edge predict model.fedge --trust release.key.pub --input rows.csv"
    ),
)
