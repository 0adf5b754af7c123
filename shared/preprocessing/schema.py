"""Input and output schema of a model, shared by sites, release and edge; needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedge.shared.errors import BundleError

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Feature:
    """One column of a table.

    Attributes:
        name: as in the CSV's header.
        unit: for example ``"mm Hg"``; empty where there is none.
        low, high: plausible values. A site's mean must lie within them for admission, and the
            device reports the columns of a row that lie outside them; the model accepts any value.
        categories: the allowed values of a categorical column, empty for a number.
    """

    name: str
    low: float
    high: float
    unit: str = ""
    categories: tuple[float, ...] = ()


@dataclass(frozen=True)
class InputSchema:
    """One raw example, before preprocessing.

    Attributes:
        shape: of one example, without the batch axis, for example ``(8, 8)`` or ``(10,)``.
        dtype: numpy's name of the type that ``predict`` accepts.
        features: one for each column where ``shape`` has one axis, otherwise empty.
        low, high: between which the numbers lie where there are no features, as 0 and 255 of an image; for generated
            examples, which are of [0, 1) after scaling where these are None. The model accepts any value.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    features: tuple[Feature, ...] = ()
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The schema as plain JSON values."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "features": [
                {
                    "name": f.name,
                    "unit": f.unit,
                    "low": f.low,
                    "high": f.high,
                    "categories": list(f.categories),
                }
                for f in self.features
            ],
            **({} if self.low is None else {"low": self.low}),
            **({} if self.high is None else {"high": self.high}),
        }

    @classmethod
    def from_json(cls, value: Any) -> InputSchema:
        """Parse the result of ``to_json``.

        Raises:
            BundleError: 706, the value is not an input schema.
        """
        try:
            return cls(
                shape=tuple(int(n) for n in value["shape"]),
                dtype=str(value["dtype"]),
                features=tuple(
                    Feature(
                        name=str(f["name"]),
                        unit=str(f["unit"]),
                        low=float(f["low"]),
                        high=float(f["high"]),
                        categories=tuple(float(c) for c in f["categories"]),
                    )
                    for f in value["features"]
                ),
                low=float(value["low"]) if "low" in value else None,
                high=float(value["high"]) if "high" in value else None,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(
                706, f"manifest: the input schema does not parse ({error!r})"
            ) from None


@dataclass(frozen=True)
class OutputSchema:
    """The meaning of the network's logits.

    Attributes:
        labels: class names; with ``"sigmoid"`` two of them, for below and at or above the threshold.
        activation: ``"softmax"`` over one logit for each label, or ``"sigmoid"`` of a single logit.
        threshold: probability at which the second label is chosen (``"sigmoid"`` only).
    """

    labels: tuple[str, ...]
    activation: Activation
    threshold: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """The schema as plain JSON values."""
        return {
            "labels": list(self.labels),
            "activation": self.activation,
            "threshold": self.threshold,
        }

    @classmethod
    def from_json(cls, value: Any) -> OutputSchema:
        """Parse the result of ``to_json``.

        Raises:
            BundleError: 706, the value is not an output schema, or its activation is unknown here.
        """
        try:
            activation = value["activation"]
            if activation not in ("softmax", "sigmoid"):
                raise ValueError(f"activation {activation!r}")
            labels = tuple(str(label) for label in value["labels"])
            return cls(labels=labels, activation=activation, threshold=float(value["threshold"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(
                706, f"manifest: the output schema does not parse ({error!r})"
            ) from None
