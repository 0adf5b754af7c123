import ast
import re
from pathlib import Path

import pytest

import fedge.shared.errors as errors
from fedge.shared.error_catalogue import CATALOGUE
from fedge.shared.errors import BundleError, ConfigError, FedgeError, brief, one_line

ROOT = Path(errors.__file__).parent.parent
HUNDREDS = {
    "UsageError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "SiteError": 4,
    "RunError": 5,
    "ReleaseError": 6,
    "BundleError": 7,
    "InputError": 8,
}


def raised() -> list[tuple[str, str, int]]:
    """(place, class, code) of every error that is made with a number written out."""
    return [
        (f"{path}:{node.lineno}", node.func.id, node.args[0].value)
        for component in ("client", "edge", "server", "shared", "simulations")
        for path in sorted((ROOT / component).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in HUNDREDS
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]


@pytest.mark.slow
def test_every_number_that_is_raised_stands_in_its_class_s_block_of_the_catalogue():
    calls = raised()
    assert len(calls) > 20
    for place, name, code in calls:
        assert code in CATALOGUE, place
        assert code // 100 == HUNDREDS[name], f"{place}: {name} {code}"


def test_a_number_outside_the_catalogue_is_a_defect():
    with pytest.raises(KeyError):
        FedgeError(199, "no such number")


def test_titles_and_remedies_are_one_line_and_end_as_sentences():
    for code, entry in CATALOGUE.items():
        assert "\n" not in entry.title + entry.remedy, code
        assert entry.remedy.endswith("."), code
        assert not entry.title.endswith("."), code


def test_one_line_holds_number_message_and_remedy():
    line = one_line(ConfigError(206, "runs/a: must be empty, got 3 files"))
    assert line == (
        "FE-206 runs/a: must be empty, got 3 files. "
        "Remedy: Choose another --out (or --name), or continue the run that is there: --resume, "
        "`fedge server resume`."
    )


def test_one_line_does_not_double_the_full_stop():
    assert "done. Remedy" in one_line(ConfigError(201, "done."))


@pytest.mark.parametrize(
    "hostile", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "a\x0bb", "\x1b[2Jclear", "nul\0", "\udcff"]
)
def test_one_line_is_one_printable_line_whatever_the_message_quotes(hostile):
    line = one_line(BundleError(702, f"part {hostile}: altered"))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    line.encode("utf-8")


def test_one_line_is_bounded():
    line = one_line(BundleError(702, "x" * 100_000))
    assert len(line) < errors.MAX_MESSAGE + 200
    assert "…" in line and line.endswith(CATALOGUE[702].remedy)


def test_a_case_of_its_own_has_a_remedy_of_its_own():
    assert one_line(ConfigError(206, "a", remedy="Do b.")) == "FE-206 a. Remedy: Do b."


def test_label_and_text():
    error = ConfigError(201, "run.rounds: must be at least 1, got 0")
    assert error.label == "FE-201"
    assert re.match(r"FE-201 run\.rounds", str(error))


def test_brief_is_one_short_printable_line():
    assert brief(ValueError("a\tb\nc")) == "ValueError: a b"
    assert brief(KeyError()) == "KeyError"
    assert brief(ValueError("\x1b[0m")) == "ValueError: \\x1b[0m"
    assert len(brief(ValueError("x" * 5000))) == 200
