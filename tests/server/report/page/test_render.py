"""The report as a whole: complete, self-contained, escaped, and true to the run directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedge.server.report.page.render import render, write
from fedge.shared.errors import ConfigError

VOID = {"meta", "rect", "path", "circle", "br"}
SHA = "0123456789abcdef" * 4
Run = dict[str, Any]


def run_files(sites: int = 8, rounds: int = 12, *, finished: bool = True) -> Run:
    """A run's files by name: JSON values, and the configuration as text."""
    names = [f"site-{i}" for i in range(1, sites + 1)]
    lines = []
    for r in range(1, rounds + 1):
        per_site = {
            s: {"accuracy": min(1.0, 0.5 + 0.4 * r / rounds + 0.0003 * i), "loss": 1.5 / r}
            for i, s in enumerate(names)
        }
        mean = {m: sum(v[m] for v in per_site.values()) / sites for m in ("accuracy", "loss")}
        lines.append(
            {
                "round": r,
                "outcome": "committed",
                "reason": None,
                "invited": names,
                "trained": names,
                "rejected": [],
                "dropped": [],
                "metrics": {
                    "train": {"loss": 2.0 / r},
                    "per_site": per_site,
                    "site_mean": mean,
                    "pooled": mean,
                },
                "examples": dict.fromkeys(names, 120),
                "seconds": 1.25,
                "bytes": {"sent": 2_000_000, "received": 1_000_000},
                "model_sha256": SHA,
            }
        )
    files: Run = {
        "run.json": {
            "run": "r-7f3a91c2",
            "state": "finished" if finished else "running",
            "task": "digits",
            "strategy": "FedAvg",
            "rounds": rounds if finished else rounds + 5,
            "rounds_done": rounds,
            "sites": {s: {"train_examples": 120, "test_examples": 40} for s in names},
            "preprocessing": [],
            "started": "2026-11-21T20:00:00Z",
            "finished": "2026-11-21T20:00:21Z" if finished else None,
            "model_sha256": SHA if finished else None,
            "fedge": "0.1.0",
            "flower": "1.41.0",
        },
        "rounds.jsonl": lines,
        "config.toml": '[task]\nname = "digits"\n',
    }
    if finished:
        files["metrics.json"] = {
            "run": "r-7f3a91c2",
            "final": {
                "round": rounds,
                **{k: lines[-1]["metrics"][k] for k in ("per_site", "site_mean", "pooled")},
            },
            "bytes": {"sent": 2_000_000 * rounds, "received": 1_000_000 * rounds},
            "seconds": 1.25 * rounds,
        }
    return files


def released(files: Run) -> Run:
    """The files with a release and a device's answer added."""
    manifest = {
        "format": "fedge.manifest/1",
        "run": "r-7f3a91c2",
        "sites": list(files["run.json"]["sites"]),
        "artefacts": [
            {
                "name": "model.onnx",
                "kind": "onnx-fp32",
                "sha256": SHA,
                "bytes": 152_904,
                "opset": 18,
            }
        ],
        "input": {
            "shape": [2],
            "dtype": "float32",
            "features": [
                {"name": "age", "unit": "years", "low": 0.0, "high": 120.0, "categories": []}
            ]
            * 2,
        },
        "output": {"labels": ["well", "ill"], "activation": "sigmoid", "threshold": 0.5},
        "preprocessing": [{"op": "standardise", "mean": [0.0, 1.0], "std": [1.0, 1.0]}],
        "metrics": {"pooled": {"accuracy": 0.901}, "site_mean": {"accuracy": 0.902}},
        "parity": {"max_abs_difference": 1.43e-6, "tolerance": 1e-4, "batch_sizes": [1, 7]},
        "latency": {"p50_ms": 0.0713, "p99_ms": 0.148, "batch": 1, "threads": 1, "device": "cpu"},
    }
    bundle = {"file": "model.fedge", "bytes": 168_312, "sha256": SHA}
    edge = {
        "verified": True,
        "rows": 450,
        "metrics": {"accuracy": 0.9711},
        "agreement": 0.99999,
        "seconds": 0.84,
        "environment": {"packages": 11, "torch": False, "flwr": False},
        "bench": {
            "p50_ms": 0.069,
            "p99_ms": 0.161,
            "items_per_second": 13_880.4,
            "peak_rss_mb": 71.3,
        },
    }
    release = {"bundle": bundle, "key_id": SHA[:32], "manifest": manifest}
    return {**files, "release.json": release, "edge.json": edge}


def put(folder: Path, files: Run) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        if name == "rounds.jsonl":
            content = "".join(json.dumps(line) + "\n" for line in value)
        else:
            content = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Reads a page and fails where a tag is not closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words).replace("\u202f", " "))


def page(tmp_path: Path, files: Run) -> Page:
    return Page(render(put(tmp_path / "run", files)))


def cells(found: Page, css: str) -> list[dict[str, str | None]]:
    return [a for tag, a in found.tags if tag == "td" and css in (a.get("class") or "").split()]


def test_headline_and_key_figures(tmp_path: Path) -> None:
    text = page(tmp_path, released(run_files())).text
    assert (
        "FedAvg trained digits across 8 sites in 12 rounds: 90.1 % site mean and 90.1 % pooled accuracy."
        in text
    )
    assert "Data moved36.0 MB" in text
    assert "Time15.0 s1.25 s a round" in text
    assert "Updates counted96none rejected" in text
    assert "from 90.0 % (site-1) to 90.2 % (site-8)" in text


def test_bundle_and_device(tmp_path: Path) -> None:
    text = page(tmp_path, released(run_files())).text
    assert "lie within 1.43 × 10⁻⁶ of the trained model's, 70 times below the limit" in text
    assert "median (p50)71.3 µs69.0 µs" in text
    assert "metrics, pooledaccuracy 90.1 %" in text
    assert "preprocessingstandardise 2 columns" in text
    assert "formatfedge.manifest/1" in text  # a part that the report knows nothing about
    assert "Packages11without torch and flwr" in text
    assert "99.99 %" in text  # an agreement short of one never reads 100 %
    assert SHA in text


def test_parity_beyond_the_tolerance_is_said(tmp_path: Path) -> None:
    files = released(run_files())
    files["release.json"]["manifest"]["parity"]["max_abs_difference"] = 0.5
    text = page(tmp_path, files).text
    assert "more than is allowed" in text
    assert "outside tolerance" in text


def test_a_refused_bundle_is_said(tmp_path: Path) -> None:
    files = released(run_files())
    files["edge.json"]["verified"] = False
    text = page(tmp_path, files).text
    assert "✕ refused" in text
    assert "✓ verified" not in text


def test_no_rejections_in_words(tmp_path: Path) -> None:
    found = page(tmp_path, run_files())
    assert "No rejections" in found.text
    assert len(cells(found, "ok")) == 96


def test_rejections_with_their_reasons(tmp_path: Path) -> None:
    files = run_files()
    third = files["rounds.jsonl"][2]
    third["trained"] = [s for s in third["trained"] if s not in ("site-4", "site-5")]
    third["rejected"] = [
        {
            "site": "site-4",
            "code": "FE-401",
            "outcome": "rejected",
            "reason": "fc.weight holds infinity",
        },
        {
            "site": "site-5",
            "code": "FE-408",
            "outcome": "late",
            "reason": "2.4 s after the deadline",
        },
    ]
    third["dropped"] = [
        {"site": "site-1", "code": "FE-405", "metric": "auc", "reason": "must be finite"}
    ]
    for key in ("invited", "trained"):
        files["rounds.jsonl"][3][key] = [f"site-{i}" for i in range(1, 8)]
    found = page(tmp_path, files)
    assert "No rejections" not in found.text
    assert "3site-4rejected FE-401fc.weight holds infinity" in found.text
    assert "1 rejected, 1 late, 1 not connected, 1 with a metric dropped" in found.text
    (rejected,) = cells(found, "rejected")
    assert rejected["title"] == "site-4, round 3: rejected: FE-401 fc.weight holds infinity"
    (late,) = cells(found, "late")
    assert "2.4 s after the deadline" in (late["title"] or "")
    (noted,) = cells(found, "noted")
    assert "auc: must be finite" in (noted["title"] or "")


def away(files: Run, *names: str, rounds: bool = True) -> Run:
    """The files of a run that these sites registered for, and then had no part in."""
    for line in files["rounds.jsonl"]:
        for key in ("invited", "trained"):
            line[key] = [s for s in line[key] if s not in names]
        line["metrics"]["per_site"] = {
            s: v for s, v in line["metrics"]["per_site"].items() if s not in names
        }
    final = files["metrics.json"]["final"]
    final["per_site"] = {s: v for s, v in final["per_site"].items() if s not in names}
    if rounds:
        for name, site in files["run.json"]["sites"].items():
            site["rounds"] = 0 if name in names else len(files["rounds.jsonl"])
    return files


@pytest.mark.parametrize("rounds", [True, False])
def test_sites_without_a_part_are_named_and_not_counted(tmp_path: Path, rounds: bool) -> None:
    found = page(tmp_path, away(run_files(rounds=6), "site-5", "site-8", rounds=rounds))
    assert "trained digits across 6 of 8 sites in 6 rounds" in found.text
    assert found.text.count("Not evaluated in round 6: site-5, site-8.") == 2
    assert "Measured on 240 held-out examples." in found.text
    assert "Sites6 of 8720 training examples" in found.text
    assert "36 updates counted; 12 not connected." in found.text
    assert "Replies that did not count fully: 12 not connected." in found.text
    assert "none rejected, late or missing" not in found.text
    assert len(cells(found, "absent")) == 12
    assert len(cells(found, "idle")) == 0


def test_all_sites_with_a_part_need_no_word(tmp_path: Path) -> None:
    text = page(tmp_path, run_files()).text
    assert "across 8 sites" in text
    assert "Not evaluated" not in text
    assert "not connected" not in text
    assert "Measured on 320 held-out examples." in text
    assert "96 updates counted; none rejected, late or missing." in text


def test_a_count_of_rounds_in_run_json_comes_first(tmp_path: Path) -> None:
    files = run_files()
    for name, site in files["run.json"]["sites"].items():
        site["rounds"] = 0 if name == "site-3" else 12
    assert "across 7 of 8 sites" in page(tmp_path, files).text


def test_updates_of_skipped_rounds_do_not_count(tmp_path: Path) -> None:
    files = run_files(rounds=2)
    files["rounds.jsonl"][1]["trained"] = files["rounds.jsonl"][1]["trained"][:7]
    files["rounds.jsonl"][0]["outcome"] = "skipped"
    assert "across 7 of 8 sites" in page(tmp_path, files).text


def test_sites_that_were_not_drawn_are_not_missing(tmp_path: Path) -> None:
    files = away(run_files(), "site-8")
    files["config.toml"] = "[round]\nfraction-train = 0.9\n"
    found = page(tmp_path, files)
    assert "none rejected, late or missing" in found.text
    assert len(cells(found, "idle")) == 12
    files["config.toml"] = "[round]\nfraction-train = 1.0\n"
    found = page(tmp_path, files)
    assert "12 not connected" in found.text
    assert len(cells(found, "absent")) == 12


def test_refused_registrations_and_absent_sites(tmp_path: Path) -> None:
    files = away(run_files(rounds=6), "site-8")
    for line in files["rounds.jsonl"]:
        line["rejected"] = [
            {"site": "site-8", "code": "FE-409", "outcome": "absent", "reason": "not registered"}
        ]
    refused = {"code": "FE-412", "outcome": "rejected", "reason": "other data"}
    files["rounds.jsonl"][0]["rejected"] = [{"site": s, **refused} for s in ("site-8", "stranger")]
    found = page(tmp_path, files)
    assert "2 rejected, 5 absent" in found.text
    assert "not connected" not in found.text
    assert "1strangerrejected FE-412other data" in found.text
    assert len([c for c in cells(found, "absent") if "FE-409" in (c["title"] or "")]) == 5
    assert [(c["title"] or "")[:17] for c in cells(found, "rejected")] == [
        "site-8, round 1: ",
        "stranger, round 1",
    ]
    assert "across 7 of 8 sites" in found.text  # a stranger is no site of the run


@pytest.mark.parametrize(
    ("equal", "words"),
    [
        (["site-4", "site-7"], "to 100.0 % (site-4, site-7)"),
        (["site-2", "site-4", "site-7"], "to 100.0 % (site-2, site-4, site-7)"),
        ([f"site-{i}" for i in range(2, 8)], "to 100.0 % (site-2, site-3, site-4 and 3 more)"),
        ([f"site-{i}" for i in range(1, 9)], "accuracy of 100.0 % at each of the 8 sites"),
    ],
)
def test_sites_with_the_same_result_are_named_together(
    tmp_path: Path, equal: list[str], words: str
) -> None:
    files = run_files()
    for name in equal:
        files["metrics.json"]["final"]["per_site"][name] = {"accuracy": 1.0, "loss": 0.1}
    assert words in page(tmp_path, files).text


def test_many_sites_without_evaluation_are_cut(tmp_path: Path) -> None:
    names = [f"site-{i}" for i in range(11, 41)]
    text = page(tmp_path, away(run_files(40), *names)).text
    assert "site-11, site-12" in text
    assert "site-22 and 18 more." in text


def test_a_skipped_round_and_its_reason(tmp_path: Path) -> None:
    files = run_files()
    files["rounds.jsonl"][4] |= {
        "outcome": "skipped",
        "reason": "FE-501 1 of 2 updates",
        "metrics": {},
    }
    found = page(tmp_path, files)
    assert "11 rounds made a new model, 1 was skipped." in found.text
    assert "skipped: FE-501 1 of 2 updates" in [a.get("title") for t, a in found.tags if t == "th"]


@pytest.mark.parametrize(
    "missing", ["release.json", "edge.json", "metrics.json", "config.toml", "rounds.jsonl"]
)
def test_any_later_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    files = released(run_files())
    del files[missing]
    text = page(tmp_path, files).text
    assert "r-7f3a91c2" in text
    assert "could not be read" not in text
    assert ("90.1 %" in text) or missing == "rounds.jsonl"


def test_half_finished_run(tmp_path: Path) -> None:
    files = run_files(rounds=5, finished=False)
    folder = put(tmp_path / "run", files)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 6, "outcome": "comm')  # killed in the writing
    found = Page(render(folder))
    assert (
        "FedAvg is training digits across 8 sites, 5 of 10 rounds done: 90.1 % site mean"
        in found.text
    )
    assert "No bundle has been released" in found.text
    assert "could not be read" not in found.text


def test_no_round_yet(tmp_path: Path) -> None:
    files = run_files(rounds=1, finished=False)
    files["rounds.jsonl"] = []
    text = page(tmp_path, files).text
    assert "0 of 6 rounds done: not evaluated yet" in text


def test_damaged_files_are_named_and_left_out(tmp_path: Path) -> None:
    files = released(run_files())
    files["release.json"] = '{"bundle": '
    folder = put(tmp_path / "run", files)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    (folder / "rounds.jsonl").write_text("\n".join([lines[0], "not JSON", *lines[1:]]) + "\n")
    text = Page(render(folder)).text
    assert "release.json does not parse" in text
    assert "rounds.jsonl, line 2 does not parse" in text
    assert "12 rounds made a new model." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sites", "rounds"), [(1, 1), (1, 3), (8, 1), (25, 7), (300, 60), (3, 170)]
)
def test_every_size(tmp_path: Path, sites: int, rounds: int) -> None:
    found = page(tmp_path, released(run_files(sites, rounds)))
    words = set(re.findall(r"[A-Za-z]+", found.text))
    assert not words & {"None", "nan", "NaN", "inf", "Infinity"}
    drawn = " ".join(
        v for _, a in found.tags for k, v in a.items() if k in ("d", "x", "y", "cx", "height") and v
    )
    assert not re.search(r"nan|inf|None", drawn)
    assert len(cells(found, "ok")) == sites * min(rounds, 150)


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    files = run_files()
    line = files["rounds.jsonl"][3]
    line["metrics"]["site_mean"] = {"accuracy": float("nan"), "loss": float("inf")}
    line["seconds"] = float("nan")
    line["bytes"] = {"sent": None, "received": "many"}
    files["metrics.json"]["final"]["pooled"] = {"accuracy": float("nan")}
    found = page(tmp_path, files)
    assert not set(re.findall(r"[A-Za-z]+", found.text)) & {"None", "nan", "NaN", "inf"}
    assert "90.1 % site mean accuracy" in found.text


PAYLOAD = "\"><img src=x onerror=alert(1)>'</style><script>alert(2)</script>$style&\u202e\x07"


def poisoned(value: Any, keys: bool = True) -> Any:
    """The value with the payload in every string and in the names of sites."""
    if isinstance(value, dict):
        site = re.compile(r"site-\d+")
        return {
            (k + PAYLOAD if keys and site.fullmatch(k) else k): poisoned(v, keys)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [poisoned(v, keys) for v in value]
    return value + PAYLOAD if isinstance(value, str) else value


@pytest.mark.parametrize("sites", [8, 60])
def test_nothing_that_a_site_says_becomes_markup(tmp_path: Path, sites: int) -> None:
    files = released(run_files(sites))
    files["rounds.jsonl"][2]["rejected"] = [
        {"site": "site-4", "code": "FE-401", "outcome": "rejected", "reason": "r"},
        {"site": "stranger", "code": "x", "outcome": "unheard of", "reason": ""},
    ]
    files["rounds.jsonl"][2]["dropped"] = [
        {"site": "site-1", "code": "FE-405", "metric": "auc", "reason": "r"}
    ]
    files["rounds.jsonl"][1]["outcome"] = "skipped"
    files["release.json"]["manifest"][PAYLOAD] = {PAYLOAD: [PAYLOAD]}
    files["edge.json"][PAYLOAD] = PAYLOAD
    files["edge.json"]["metrics"][PAYLOAD] = 0.5
    clean = page(tmp_path, released(run_files(sites)))
    raw = render(put(tmp_path / "poisoned", poisoned(files)))
    found = Page(raw)
    assert "<img" not in raw
    assert "<script" not in raw
    assert "\u202e" not in raw
    assert "\x07" not in raw
    assert "onerror=alert(1)" in found.text  # shown, as text
    assert {t for t, _ in found.tags} <= {t for t, _ in clean.tags} | {"code", "span", "b"}
    assert not [k for _, a in found.tags for k in a if k.startswith("on")]
    assert sum(t == "style" for t, _ in found.tags) == 1


@pytest.mark.parametrize("sites", [8, 60])
def test_self_contained(tmp_path: Path, sites: int) -> None:
    raw = render(put(tmp_path / "run", released(run_files(sites))))
    found = Page(raw)
    assert "://" not in raw
    assert "url(" not in raw
    assert "@import" not in raw
    assert "$" not in raw  # no placeholder is left
    assert not {"script", "link", "img", "iframe", "object", "form"} & {t for t, _ in found.tags}
    links = [v for _, a in found.tags for k, v in a.items() if k in ("href", "src")]
    ids = {a["id"] for _, a in found.tags if "id" in a}
    assert links
    assert all(v is not None and v[0] == "#" and v[1:] in ids for v in links)
    policy = [a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv")]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_accessible(tmp_path: Path) -> None:
    found = page(tmp_path, released(run_files()))
    pictures = [a for t, a in found.tags if t == "svg"]
    assert pictures
    assert all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    assert all(a.get("scope") in ("col", "row") for t, a in found.tags if t == "th")
    assert sum(t == "table" for t, _ in found.tags) == sum(t == "caption" for t, _ in found.tags)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_many_refusals_are_counted_but_cut(tmp_path: Path) -> None:
    files = run_files(8, 100)
    for line in files["rounds.jsonl"]:
        line["trained"] = line["invited"][:2]
        line["rejected"] = [
            {"site": s, "code": "FE-409", "outcome": "absent", "reason": "no reply"}
            for s in line["invited"][2:]
        ]
    text = page(tmp_path, files).text
    assert "The first 500 of 600." in text
    assert "600 absent" in text


def test_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "run", run_files())
    path = write(folder)
    assert path == folder / "report.html"
    before = path.read_text(encoding="utf-8")
    assert before == render(folder)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    put(folder, released(run_files()))
    real: Callable[..., None] = os.replace
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write(folder)
    assert path.read_text(encoding="utf-8") == before
    assert not list(folder.glob(".report-*"))
    monkeypatch.setattr(os, "replace", real)
    write(folder)
    assert path.read_text(encoding="utf-8") != before


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_not_a_run_directory(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        render(tmp_path)
    assert caught.value.code == 209


def test_rounds_that_lacked_a_site_are_listed_with_the_reason(tmp_path: Path) -> None:
    files = run_files(4, 3)
    lacking = files["rounds.jsonl"][1]
    lacking["trained"] = ["site-1"]
    lacking["rejected"] = [
        {
            "site": "site-2",
            "code": "FE-409",
            "outcome": "absent",
            "reason": "not connected for 9 s",
        },
        {"site": "site-3", "code": "FE-408", "outcome": "late", "reason": "reply after 60 s"},
        {"site": "<b>4", "code": "FE-401", "outcome": "rejected", "reason": "<script>"},
    ]
    page = render(put(tmp_path, files))
    table = page[page.index("Rounds in which a site was missing") :]
    row = table[table.index("<tbody>") : table.index("</tbody>")]
    assert row.count("<tr>") == 1, "only the round that lacked one"
    assert "not connected for 9 s" in row
    assert "<script>" not in row
    whole = render(put(tmp_path / "whole", run_files(4, 3)))
    assert "Rounds in which a site was missing" not in whole


def test_a_stopped_run_says_so_first(tmp_path: Path) -> None:
    files = run_files(finished=False) | {
        "stopped.json": {"code": "FE-502", "message": "round 3: <i>", "when": "now"}
    }
    page = render(put(tmp_path, files))
    assert "FE-502 round 3: &lt;i&gt;" in page
    assert "was stopped" in page
    assert "The run was stopped" not in render(put(tmp_path / "goes-on", run_files(finished=False)))
