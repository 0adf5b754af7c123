"""The style sheet's colours can be read, on light and on dark pages (WCAG 2.1, contrast AA)."""

from __future__ import annotations

import re
from importlib import resources

import pytest

CSS = resources.files("fedge.server.report").joinpath("page.css").read_text(encoding="utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
)
#: Text colour and what it stands on.
TEXT = [
    *(
        (name, ground)
        for name in ("text", "muted", "blue", "orange", "violet")
        for ground in ("page", "card")
    ),
    ("good", "card"),
    ("bad", "card"),
    ("muted", "soft"),
    ("text", "absent"),
    ("text", "warn"),
    ("ok-text", "ok"),
    ("late-text", "late"),
    ("white", "rejected"),
    ("white", "error"),
]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "ground"), TEXT)
def test_text_can_be_read(theme: dict[str, str], name: str, ground: str) -> None:
    colour = "#ffffff" if name == "white" else theme[name]
    assert contrast(colour, theme[ground]) >= 4.5


def test_contrast_of_black_on_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") < 4.5


def test_both_themes_name_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()


def test_every_colour_used_is_named() -> None:
    assert set(re.findall(r"var\(--([a-z-]+)\)", CSS)) <= LIGHT.keys() | {"edge"}
