from __future__ import annotations

import os
from argparse import ArgumentParser

import pytest

from fedge.edge.serving.loaded_model import Limits
from fedge.edge.serving.options import add_options, limits_of

MODEL = ("model.fedge", "--trust", "k.pub")


def limits(*words: str) -> Limits:
    parser = ArgumentParser()
    add_options(parser)
    return limits_of(parser.parse_args([*MODEL, *words]))


@pytest.mark.parametrize(
    ("cores", "words", "runs"),
    [
        (1, (), 1),
        (2, (), 2),
        (3, ("--threads", "2"), 1),
        (2, ("--threads", "8"), 1),
        (64, (), 4),
        (64, ("--parallel", "7"), 7),
        (2, ("--parallel", "1"), 1),
    ],
)
def test_runs_fill_the_cores_by_default(
    monkeypatch: pytest.MonkeyPatch, cores: int, words: tuple[str, ...], runs: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert limits(*words).parallel == runs


def test_a_delay_is_in_milliseconds() -> None:
    assert limits("--batch-delay", "2.5").batch_delay == pytest.approx(0.0025)


@pytest.mark.parametrize(
    "words",
    [("--deadline", "nan"), ("--deadline", "0"), ("--deadline", "inf"), ("--parallel", "0")],
)
def test_limits_out_of_range_are_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        limits(*words)
    assert f"argument {words[0]}: must be" in capsys.readouterr().err
