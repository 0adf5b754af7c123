"""Measuring one contender of edge.py: a server of its own, client processes, and what both took."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import edge_process
import edge_servers
import memory
from edge_servers import Contender
from flower_side import free_port, stop, wait_open

CLIENT: Final = Path(__file__).resolve().parent / "edge_client.py"
#: Seconds: until a server listens, until clients are ready, and what they may take beyond the time they send.
OPEN_WITHIN, READY_WITHIN, SLACK = 60.0, 90.0, 60.0
#: Tries of one measurement; a port may have been taken meanwhile.
TRIES: Final = 2


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-part * len(ordered) // 1) - 1))]


async def load(
    contender: Contender, port: int, folder: Path, count: int, seconds: float, server: int | None
) -> dict[str, float]:
    """Let ``count`` clients send for a time.

    Args:
        contender: whose protocol they speak.
        port: of the server.
        folder: of edge_model.py.
        count: of client processes.
        seconds: that they send.
        server: its process; None where the client does the work.

    Returns:
        ``p50_ms``, ``p99_ms``, ``requests_s``, ``requests``, ``cpu_ms`` a request of the server with its children,
        ``client_cpu_ms`` a request, ``client_peak_rss_mib`` of the largest client.

    Raises:
        RuntimeError: a client failed; the message says how.
        TimeoutError: they do not get ready, or do not end.
    """
    command = [
        sys.executable,
        str(CLIENT),
        contender.protocol,
        str(port),
        str(folder),
        str(seconds),
    ]
    clients: list[asyncio.subprocess.Process] = []
    pipe = asyncio.subprocess.PIPE
    try:
        for _ in range(count):  # one by one: those that did start are ended where the next does not
            clients.append(  # noqa: PERF401
                await asyncio.create_subprocess_exec(
                    *command, stdin=pipe, stdout=pipe, stderr=pipe, env=edge_servers.environment()
                )
            )
        async with asyncio.timeout(READY_WITHIN):
            for client in clients:
                assert client.stdout is not None
                if await client.stdout.readline() != b"ready\n":
                    raise RuntimeError(_last_line(await client.communicate()))
        before = _cpu(server)
        async with asyncio.timeout(seconds + SLACK):
            outputs = await asyncio.gather(*(client.communicate(b"go\n") for client in clients))
        spent = _cpu(server) - before
    finally:
        for client in clients:
            if client.returncode is None:
                client.kill()
                await client.wait()
    if any(client.returncode for client in clients):
        raise RuntimeError("; ".join(map(_last_line, outputs)))
    results = [json.loads(output) for output, _ in outputs]
    taken = [ms for one in results for ms in one["ms"]]
    own = sum(one["cpu_s"] for one in results)
    return {
        "p50_ms": quantile(taken, 0.5),
        "p99_ms": quantile(taken, 0.99),
        "requests_s": sum(len(one["ms"]) / one["seconds"] for one in results),
        "requests": len(taken),
        "cpu_ms": 1e3 * (own if server is None else spent) / len(taken),
        "client_cpu_ms": 1e3 * own / len(taken),
        "client_peak_rss_mib": max(one["peak_rss_mib"] for one in results),
    }


def _cpu(server: int | None) -> float:
    return 0.0 if server is None else sum(map(edge_process.cpu_seconds, memory.tree([server])))


def _last_line(output: tuple[bytes, bytes]) -> str:
    lines = output[1].decode(errors="replace").strip().splitlines() or ["no word from the client"]
    return lines[-1][:500]


def measure(contender: Contender, folder: Path, seconds: float) -> dict[str, Any]:
    """One repetition of one contender: a server of its own, each number of clients in turn.

    Returns:
        ``clients``: by their number, as ``load``; ``peak_rss_mib``: each process's largest, summed; ``processes``.

    Raises:
        RuntimeError, TimeoutError, OSError: it failed; the message ends with the server's last lines.
    """
    server: subprocess.Popen[bytes] | None = None
    port = free_port()
    log = folder / "server.log"
    log.unlink(missing_ok=True)
    result: dict[str, Any] = {"clients": {}}
    try:
        if contender.command is not None:
            server = edge_servers.start(contender, folder, port, log)
            wait_open(f"127.0.0.1:{port}", server, OPEN_WITHIN)
        pid = server.pid if server else None
        for count in contender.clients:
            result["clients"][str(count)] = asyncio.run(
                load(contender, port, folder, count, seconds, pid)
            )
        pids = memory.tree([pid]) if pid else []
        result["processes"] = max(1, len(pids))
        alone = result["clients"][str(contender.clients[0])]["client_peak_rss_mib"]
        result["peak_rss_mib"] = sum(map(edge_process.peak_rss, pids)) if pid else alone
    except (RuntimeError, TimeoutError, OSError) as error:
        log_tail = log.read_text(errors="replace")[-1500:].strip() if log.exists() else ""
        raise RuntimeError(f"{type(error).__name__}: {error}\n{log_tail}".strip()) from error
    finally:
        if server is not None:
            stop(server)
    return result


def play(
    chosen: Sequence[Contender], folder: Path, repetitions: int, seconds: float
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """All repetitions, the contenders in turn within each, so that a drift of the machine meets them alike.

    Returns:
        Each contender's repetitions, and what went wrong on the way.
    """
    results: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in chosen}
    problems: list[str] = []
    for number in range(repetitions):
        for contender in chosen:
            if number and not results[contender.name]:
                continue  # it never worked, and waiting for it again would only cost minutes
            for _ in range(TRIES):
                try:
                    results[contender.name].append(measure(contender, folder, seconds))
                except RuntimeError as error:
                    problems.append(f"{contender.name}, repetition {number + 1}: {error}")
                    print(problems[-1], file=sys.stderr, flush=True)
                    continue
                one = results[contender.name][-1]["clients"]
                rates = " ".join(f"{at['requests_s']:.0f}/s" for at in one.values())
                print(
                    f"repetition {number + 1}, {contender.name}: {one['1']['p50_ms']:.2f} ms, {rates}",
                    file=sys.stderr,
                    flush=True,
                )
                break
    return results, problems
