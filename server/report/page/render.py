"""The report of a run: one self-contained HTML file, for the engineer, the security officer and the physician.

It holds no script and names nothing outside itself; its Content-Security-Policy allows inline style and nothing
else. Every value is escaped, as sites choose their names and reasons come from their replies.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from string import Template

from fedge.server.report import format as fmt
from fedge.server.report.format import esc
from fedge.server.report.page.artefacts import compiled
from fedge.server.report.page.bundle import hash_html, release
from fedge.server.report.page.cost import cost
from fedge.server.report.page.device import device
from fedge.server.report.page.learning import learning
from fedge.server.report.page.participation import participation
from fedge.server.report.page.privacy import WORDS as PRIVACY_WORDS
from fedge.server.report.page.privacy import privacy, private
from fedge.server.report.page.secure_aggregation import WORDS, secure
from fedge.server.report.page.sites import site_results
from fedge.server.report.page.summary import brief, headline, tiles
from fedge.server.report.page.sweep import sweep
from fedge.server.report.records import Run
from fedge.server.report.run_data import read
from fedge.shared.files import write_atomically

#: Characters of the configuration that are shown.
MAX_CONFIG = 100_000

GLOSSARY = (
    ("Site", "A place that holds data, for example a hospital. Its examples never leave it."),
    (
        "Round",
        "The sites train the shared model on their own examples and send the updates, which the server combines.",
    ),
    ("Site mean", "The mean of the sites' results; every site counts the same, however small."),
    ("Pooled", "All sites' held-out examples counted together; large sites weigh more."),
    ("Rejected", "An update that the server's checks refused. It did not enter the model."),
    (
        "Loss",
        "How wrong the model's predictions are, by the measure that training lowers. Smaller is better.",
    ),
    ("Parity", "Whether the exported model computes the same outputs as the trained one."),
    (
        "Agreement",
        "The share of rows to which the device gave the same label as the trained model.",
    ),
)


@cache
def _data(name: str) -> str:
    return resources.files("fedge.server.report").joinpath(name).read_text(encoding="utf-8")


def _moment(stamp: str) -> str:
    """``2026-11-21T20:00:00Z`` as people write it."""
    return stamp.replace("T", " ").replace("Z", " UTC")


def _provenance(run: Run) -> str:
    rows = [
        ("run", f"<code>{esc(run.name)}</code>"),
        ("state", run.state),
        ("started", esc(_moment(run.started))),
        ("finished", esc(_moment(run.ended))),
        ("task", esc(run.task)),
        ("strategy", esc(run.strategy)),
        *((name, esc(version)) for name, version in run.versions.items()),
        ("model SHA-256", hash_html(run.model_sha256)),
    ]
    body = fmt.card("Origin", fmt.definitions(rows))
    if run.config:
        shown = "\n".join(esc(line, MAX_CONFIG) for line in run.config[:MAX_CONFIG].split("\n"))
        more = "\n…" if len(run.config) > MAX_CONFIG else ""
        body += (
            "<details class='card'><summary>Configuration, resolved</summary>"
            f'<pre tabindex="0">{shown}{more}</pre></details>'
        )
    glossary = (*GLOSSARY, *WORDS) if run.masked else GLOSSARY
    glossary = (*glossary, *PRIVACY_WORDS) if private(run) else glossary
    words = fmt.definitions((term, esc(meaning)) for term, meaning in glossary)
    body += f"<details class='card glossary'><summary>Words used here</summary>{words}</details>"
    return fmt.section("origin", "Origin and configuration", "", body)


def _notes(run: Run) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{esc(note)}</li>" for note in run.notes[:20])
    return f'<div class="card warn"><h3>What could not be read</h3><ul>{items}</ul></div>'


def _stopped(run: Run) -> str:
    if run.state != "stopped":
        return ""
    return (
        f'<div class="card warn"><h3>The run was stopped</h3><p>{esc(run.stopped, 1000)}</p></div>'
    )


def render(run_dir: Path) -> str:
    """The report of a run directory, finished or not, as one HTML document.

    Raises:
        ConfigError: 209, the directory holds no run.json.
    """
    run = read(run_dir)
    sections = [
        learning(run),
        site_results(run),
        participation(run),
        secure(run),
        privacy(run),
        sweep(run),
        cost(run),
        compiled(run),
        release(run),
        device(run),
    ]
    names = (
        "learning", "sites", "participation", "secure", "privacy", "sweep", "cost", "compiled", "release",
        "device",
    )  # fmt: skip
    titles = (
        "Learning",
        "Sites",
        "Participation",
        "Masked sums",
        "Privacy",
        "Sweep",
        "Cost",
        "Compiled",
        "Bundle",
        "Device",
    )
    links = [(n, t) for n, t, body in zip(names, titles, sections, strict=True) if body]
    links.append(("origin", "Origin"))
    when = run.ended if run.finished and run.ended else run.started
    return Template(_data("page.html")).substitute(
        title=esc(f"{run.task}, {run.strategy}, {run.name}"),
        style=_data("page.css") + (_data("secure.css") if run.masked else ""),
        headline=esc(headline(run)),
        run=esc(run.name),
        state=run.state,
        when=f"<time>{esc(_moment(when))}</time>" if when else "",
        nav="".join(f'<a href="#{n}">{t}</a>' for n, t in links),
        body="".join(
            [_stopped(run), _notes(run), tiles(run), brief(run), *sections, _provenance(run)]
        ),
    )


def write(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all, and return its path.

    Raises:
        ConfigError: 209, the directory holds no run.json.
        OSError: the directory cannot be written.
    """
    path = run_dir / "report.html"
    content = render(run_dir).encode()
    write_atomically(path, content)
    return path
