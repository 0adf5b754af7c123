"""Abuse of `fedge-edge serve`: does it live, stay small, and fall back?

One server process on a small network. 100,000 generated and mutated requests by four clients, bytes that are no
requests between them; 100 clients killed in the middle of requests; then bundles in which a better artefact than the
fp32 graph is damaged although signed, taken by a reload under load and by a start. Prints a table, writes
benchmarks/results/edge_abuse.json, exits 1 where the server crashes or fails by a defect, a good request is not
answered, its memory grows by more than 20 MB, or the graph takes longer than 2 s to answer in the artefact's place.

    python benchmarks/edge_abuse.py                 everything
    python benchmarks/edge_abuse.py --requests 5000  for a quick look: no file is written
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from edge_abuse_requests import good
from edge_abuse_server import LIMIT, Server, flipped, network, serving, write

from fedge.shared.crypto.dsse import new_key

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "edge_abuse.json"
REQUESTS: Final = 100_000
#: Of the same kinds, before memory is measured for the first time.
WARM_UP: Final = 10_000
CLIENTS: Final = 4
KILLED: Final = 100
#: What memory may grow by, in MB of 10^6 bytes, and what falling back may take, in seconds.
GROWTH: Final = 20.0
FALLBACK: Final = 2.0
#: Statuses without a number that are right: grpc's own refusals, and what the client itself decided.
EXPECTED: Final = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED")


def abuse(server: Server, requests: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Let the clients send, each its share; gives outcomes by kind, and those that no good request may have."""
    script = str(HERE / "edge_abuse_client.py")

    def client(number: int) -> dict[str, Any]:
        words = map(str, (server.port, seed + number, requests // CLIENTS, LIMIT))
        done = subprocess.run(
            [sys.executable, script, *words], capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            return {"outcomes": [], "wrong": [f"client: {done.stderr[-500:]}"]}
        return json.loads(done.stdout)

    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for result in pool.map(client, range(CLIENTS)):
            wrong += result["wrong"]
            for kind, outcome, number in result["outcomes"]:
                counts[kind, outcome] += number
    return counts, wrong


def kill_clients(server: Server, request: Path, count: int) -> int:
    """Kill clients with SIGKILL while their requests are under way; gives how many were."""
    script = str(HERE / "edge_abuse_client.py")
    random = np.random.default_rng(0)

    def one(delay: float) -> int:
        argv = [sys.executable, script, "doomed", str(server.port), str(request)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        with process.stdout:
            sent = process.stdout.readline() == b"sent\n"
        time.sleep(delay)
        process.kill()
        return int(sent and process.wait(10) == -signal.SIGKILL)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(one, random.uniform(0, 0.05, count).tolist()))


def fall_back(folder: Path, trust: Path, key: Path, request: bytes) -> list[dict[str, Any]]:
    """Seconds until the fp32 graph answers in the place of each damaged artefact."""
    graph, random = network(0), np.random.default_rng(0)
    damaged = {
        "random bytes": random.bytes(len(graph)),
        "cut in half": graph[: len(graph) // 2],
        "one byte of its weights": flipped(graph),
        "other weights": network(1),
    }
    bundle, results = folder / "fall.fedge", []
    write(bundle, key)
    with serving(bundle, trust, folder / "plain.log") as server:
        plain = server.start_s
        expected = _logits(server.infer(request))
    for name, data in damaged.items():
        write(bundle, key)
        with serving(bundle, trust, folder / "fall.log") as server:
            version = write(bundle, key, data, run=name)
            began = time.monotonic()
            server.process.send_signal(signal.SIGHUP)
            while not server.ready(version) and time.monotonic() < began + 20:
                # Meanwhile the old model answers.
                np.testing.assert_allclose(
                    _logits(server.infer(request)), expected, rtol=1e-3, atol=1e-5
                )
            reload_s = time.monotonic() - began
            np.testing.assert_allclose(
                _logits(server.infer(request)), expected, rtol=1e-3, atol=1e-5
            )
        with serving(bundle, trust, folder / "again.log") as server:
            np.testing.assert_allclose(
                _logits(server.infer(request)), expected, rtol=1e-3, atol=1e-5
            )
            start_s = server.start_s - plain
        line = next(
            (ln for ln in (folder / "again.log").read_text().splitlines() if "FE-" in ln), ""
        )
        results.append(
            {
                "artefact": name,
                "reload_s": round(reload_s, 2),
                "start_s": round(start_s, 2),
                "told": line.partition("FE-")[2] and "FE-" + line.partition("FE-")[2][:160],
                "passed": max(reload_s, start_s) <= FALLBACK,
            }
        )
    return results


def _logits(answer: Any) -> Any:
    return np.frombuffer(answer.raw_output_contents[0], np.float32)


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    kinds = Counter(), {}
    for kind, outcome, number in result["outcomes"]:
        kinds[0][kind] += number
        kinds[1].setdefault(kind, []).append(f"{outcome} {number}")
    lines = [f"{'requests':16} {'sent':>7}  answers"]
    lines += [f"{kind:16} {kinds[0][kind]:>7}  {', '.join(kinds[1][kind])}" for kind in kinds[1]]
    lines += [
        "",
        f"{result['requests']} requests in {result['seconds']:.0f} s, exit status {result['exit']}",
        f"memory {result['rss_before_mb']:.1f} MB after {result['warm_up']}, {result['rss_after_mb']:.1f} MB"
        f" at the end: {result['growth_mb']:+.1f} MB (allowed {GROWTH:g})",
        f"{result['killed']} clients killed in the middle; {result['threads']} threads afterwards,"
        f" {result['rss_killed_mb']:.1f} MB",
    ]
    for row in result["fallback"]:
        lines.append(
            f"damaged artefact, {row['artefact']}: reload {row['reload_s']:.2f} s,"
            f" start {row['start_s']:+.2f} s (allowed {FALLBACK:g}); {row['told']}"
        )
    lines += [f"PROBLEM: {problem}" for problem in result["problems"]]
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])


def measure(folder: Path, requests: int, killed: int) -> dict[str, Any]:
    """Everything, in order."""
    key, bundle, sent = folder / "key", folder / "model.fedge", folder / "request.bin"
    new_key(key)
    trust = key.with_name("key.pub")
    write(bundle, key)
    good_request = good(np.random.default_rng(0))
    del good_request.outputs[:]
    sent.write_bytes(good_request.SerializeToString())
    warm_up = min(WARM_UP, requests)
    server = Server(bundle, trust, folder / "serve.log")
    try:
        expected = _logits(server.infer(sent.read_bytes()))
        abuse(server, warm_up, seed=10**6)
        before, began = server.rss_mb(), time.monotonic()
        outcomes, wrong = abuse(server, requests, seed=0)
        seconds, after = time.monotonic() - began, server.rss_mb()
        np.testing.assert_allclose(
            _logits(server.infer(sent.read_bytes())), expected, rtol=1e-3, atol=1e-5
        )
        dead = kill_clients(server, sent, killed)
        np.testing.assert_allclose(
            _logits(server.infer(sent.read_bytes())), expected, rtol=1e-3, atol=1e-5
        )
        threads, rss_killed = server.status("Threads:"), server.rss_mb()
    finally:
        status = server.stop()
    problems = [f"a good request: {text}" for text in wrong]
    for (kind, outcome), number in sorted(outcomes.items()):
        if outcome not in EXPECTED and not (outcome.startswith("FE-8") or outcome == "FE-709"):
            problems.append(f"{kind}: {outcome}, {number} times")
    log = (folder / "serve.log").read_text()
    problems += ["a trace in the log"] if "Traceback" in log else []
    problems += [f"exit status {status}"] if status else []
    problems += [f"only {dead} of {killed} clients were killed"] if dead < killed else []
    problems += ["memory grew"] if after - before > GROWTH else []
    fallback = fall_back(folder, trust, key, sent.read_bytes())
    problems += [f"fall-back: {row['artefact']}" for row in fallback if not row["passed"]]
    return {
        "requests": sum(outcomes.values()),
        "warm_up": warm_up,
        "seconds": round(seconds, 1),
        "outcomes": [[kind, label, number] for (kind, label), number in sorted(outcomes.items())],
        "rss_before_mb": round(before, 1),
        "rss_after_mb": round(after, 1),
        "growth_mb": round(after - before, 1),
        "killed": dead,
        "rss_killed_mb": round(rss_killed, 1),
        "threads": threads,
        "exit": status,
        "log_lines": len(log.splitlines()),
        "fallback": fallback,
        "problems": problems,
        "passed": not problems,
    }


def main() -> int:
    """Measure, print, write."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--killed", type=int, default=KILLED)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedge-abuse-") as name:
        result = measure(Path(name), arguments.requests, arguments.killed)
    print(table(result))
    if (arguments.requests, arguments.killed) == (REQUESTS, KILLED):
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        RESULTS.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
