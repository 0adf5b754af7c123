"""A real nginx before an upstream that keeps every request line it sees, and before a real SuperLink."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedge.client.deployment import node_key
from fedge.server.deployment import certificates, reverse_proxy, site_registry
from fedge.shared.daemon import home as homes
from fedge.shared.errors import DeployError

FLEET = "/v1/fleet/pull-messages"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def wait_for(ready: Callable[[], object], seconds: float, failure: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(30)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def process(
    command: list[str | Path], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(60)


class Upstream(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, int]]

    def do_POST(self) -> None:
        size = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.seen.append((self.requestline, size))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def upstream(home: Path, port: int) -> Iterator[list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate_path(home), certificates.key_path(home))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), type("Handler", (Upstream,), {"seen": seen})
    )
    server.handle_error = lambda *_: None
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(
    home: Path, superlink: int, change: Callable[[str], str] = str
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = homes.free_port()
    path = reverse_proxy.write(home, ("127.0.0.1", port), f"127.0.0.1:{superlink}")
    path.write_text(change(path.read_text()))
    reverse_proxy.check(home)
    with process(reverse_proxy.command(home), home / "front.log") as child:
        wait_for(lambda: answers(port), 120, "nginx does not listen")
        yield port, child


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("server home")
    certificates.create(home, ["fed.example.org"])
    return home


@pytest.fixture(scope="module")
def pair(home) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """The front's port, and what arrives behind it."""
    port = homes.free_port()
    with upstream(home, port) as seen, serving(home, port) as (front_port, _):
        yield front_port, seen


def connect(home: Path, port: int, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    context = context or ssl.create_default_context(cafile=certificates.authority_path(home))
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    try:
        return context.wrap_socket(plain, server_hostname="fed.example.org")
    except BaseException:
        plain.close()
        raise


def everything(stream: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionError, ssl.SSLError):
        while part := stream.recv(65536):
            parts.append(part)
    return b"".join(parts)


def exchange(home: Path, port: int, request: bytes) -> bytes:
    with connect(home, port) as stream:
        # Refused before it was all sent, perhaps; the answer is there to read.
        with suppress(ConnectionError, ssl.SSLError):
            stream.sendall(request)
        return everything(stream)


def post(path: str, body: bytes = b"", method: str = "POST", headers: str = "") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: fed.example.org\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    ).encode("latin-1") + body


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


@needs_nginx
@pytest.mark.parametrize("size", [0, 5, 6 * 2**20])
def test_a_fleet_request_passes(home, pair, size):
    port, seen = pair
    before = len(seen)
    answer = exchange(home, port, post(FLEET, b"x" * size))
    assert (status(answer), body(answer)) == (200, b"ok")
    assert seen[before:] == [(f"POST {FLEET} HTTP/1.1", size)]


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/start-run",
        "/v1/runtime/pull-task",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2E%2E%2Fcontrol%2Fstart-run",
        "/v1/fleet/./pull-messages",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//control/start-run",
        "/v1/%66leet/pull-messages",
        "/V1/FLEET/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=/v1/control",
        "/v1/fleet/pull-messages#/v1/control",
        "/v1/fleet/pull-messages;/../../control/start-run",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet\\..\\control",
        "/v1/fleet/" + "a" * 65,
        "https://127.0.0.1/v1/control/start-run",
        "https://127.0.0.1/v1/fleet/../control/start-run",
        "*",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_other_path_reaches_the_upstream(home, pair, path):
    port, seen = pair
    before = len(seen)
    answer = exchange(home, port, post(path))
    assert status(answer) in (400, 404)
    assert body(answer) == b""
    assert len(seen) == before


@needs_nginx
@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "X"]
)
def test_no_other_method_reaches_the_upstream(home, pair, method):
    port, seen = pair
    before = len(seen)
    answer = exchange(home, port, post(FLEET, method=method))
    assert status(answer) in (400, 404, 405)
    assert body(answer) == b""
    assert len(seen) == before


@needs_nginx
@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (post(FLEET, headers=f"X-Long: {'y' * 9000}\r\n"), {400}),
        (post(FLEET, headers="".join(f"X-{i}: {'y' * 4000}\r\n" for i in range(12))), {400}),
        (post("/v1/fleet/" + "a" * 40_000), {400, 414}),
        (post(FLEET, b"x" * (reverse_proxy.BODY_MIB * 2**20 + 1)), {413}),
        (post(FLEET, headers="Transfer-Encoding: chunked\r\n"), {400}),
        (post(FLEET, headers="Transfer-Encoding: gzip\r\n"), {400, 501}),
        (b"POST " + FLEET.encode() + b" HTTP/1.1\r\n\r\n", {400}),
        (b"\x00\x01\x02\r\n\r\n", {400}),
    ],
    ids=["long-header", "headers", "uri", "body", "smuggling", "encoding", "no-host", "junk"],
)
def test_what_is_too_large_or_malformed_is_refused(home, pair, request_bytes, expected):
    port, seen = pair
    before = len(seen)
    answer = exchange(home, port, request_bytes)
    assert status(answer) in expected
    assert body(answer) == b""
    assert len(seen) == before


@needs_nginx
def test_a_second_request_on_the_line_is_judged_by_itself(home, pair):
    port, seen = pair
    before = len(seen)
    first = post(FLEET, b"12345").replace(b"Connection: close\r\n", b"")
    answer = exchange(home, port, first + post("/v1/control/start-run", b"67"))
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404"]
    assert seen[before:] == [(f"POST {FLEET} HTTP/1.1", 5)]


@needs_nginx
def test_plaintext_is_refused(home, pair):
    port, seen = pair
    before = len(seen)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as plain:
        plain.sendall(post(FLEET))
        answer = everything(plain)
    assert status(answer) == 400
    assert body(answer) == b""
    assert len(seen) == before


@needs_nginx
@pytest.mark.parametrize(
    ("version", "accepted"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)]
)
def test_old_tls_is_refused(home, pair, version, accepted):
    port, _ = pair
    context = ssl.create_default_context(cafile=certificates.authority_path(home))
    # The client would refuse TLS 1.1 by itself otherwise.
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    if accepted:
        with connect(home, port, context) as stream:
            assert stream.version() == version.replace("_", ".")
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"):
            connect(home, port, context).close()


@needs_nginx
def test_an_upstream_of_another_authority_gets_nothing(home, tmp_path):
    certificates.create(tmp_path / "other", [])
    port = homes.free_port()
    with upstream(tmp_path / "other", port) as seen, serving(home, port) as (front_port, _):
        answer = exchange(home, front_port, post(FLEET, b"secret"))
    assert status(answer) == 502
    assert body(answer) == b""
    assert seen == []


@pytest.mark.slow
@needs_nginx
def test_half_open_connections_go_away(home):
    def hasty(text: str) -> str:
        return text.replace(f"{reverse_proxy.TIMEOUT}s;", "1s;")

    port = homes.free_port()
    with upstream(home, port) as seen, serving(home, port, hasty) as (front_port, _):
        silent = socket.create_connection(("127.0.0.1", front_port), timeout=60)
        streams = [connect(home, front_port) for _ in range(2)]
        started = time.monotonic()
        streams[0].sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        streams[1].sendall(post(FLEET, b"x" * 100)[:-50])
        for stream in (silent, *streams):
            everything(stream)
            stream.close()
        # By itself nginx waits for 60 s.
        assert time.monotonic() - started < 30
        assert seen == []


@needs_nginx
@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (f"rate={reverse_proxy.RATE}r/s", "rate=1r/m"),
        (f"limit_conn connections {reverse_proxy.CONNECTIONS}", "limit_conn connections 1"),
    ],
    ids=["rate", "connections"],
)
def test_a_flood_is_told_to_come_again(home, found, instead):
    """503 is a status after which Flower's node tries again."""

    def strict(text: str) -> str:
        assert found in text
        return text.replace(found, instead).replace(f"burst={reverse_proxy.BURST}", "burst=1")

    port = homes.free_port()
    with (
        upstream(home, port) as seen,
        serving(home, port, strict) as (front_port, _),
        connect(home, front_port) as held,
    ):
        held.sendall(post(FLEET, b"x" * 10)[:-5])
        told: list[bytes] = []

        def refused() -> bool:
            told.append(exchange(home, front_port, post(FLEET)))
            return status(told[-1]) == 503

        wait_for(refused, 60, "nothing is refused")
        assert body(told[-1]) == b""
        held.sendall(b"xxxxx")
        assert status(everything(held)) == 200
    assert len(seen) == len(told)  # without the last of these, and with what was held


@needs_nginx
def test_a_killed_front_starts_again_at_once(home):
    port = homes.free_port()
    with upstream(home, port), serving(home, port) as (front_port, child):
        child.send_signal(signal.SIGKILL)
        child.wait(60)
        assert not answers(front_port)
        with process(reverse_proxy.command(home), home / "front.log"):
            wait_for(lambda: answers(front_port), 120, "nginx does not listen again")
            assert status(exchange(home, front_port, post(FLEET))) == 200


@needs_nginx
def test_nginx_names_the_line_that_it_refuses(home):
    path = reverse_proxy.write(home, ("127.0.0.1", 8443), "127.0.0.1:8000")
    reverse_proxy.check(home)
    path.write_text(path.read_text().replace("server_tokens", "sever_tokens"))
    with pytest.raises(DeployError, match=r'unknown directive "sever_tokens" in .*nginx.conf:\d+'):
        reverse_proxy.check(home)


@needs_nginx
def test_a_missing_certificate_is_noticed(tmp_path):
    reverse_proxy.write(tmp_path, ("127.0.0.1", 8443), "127.0.0.1:8000")
    with pytest.raises(DeployError, match="server.crt") as caught:
        reverse_proxy.check(tmp_path)
    assert caught.value.code == 910


def test_a_missing_nginx_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(DeployError, match="nginx") as caught:
        reverse_proxy.command(tmp_path)
    assert caught.value.code == 909


@pytest.mark.parametrize(
    ("listen", "superlink", "code"),
    [
        (("fed.example.org", 8443), "127.0.0.1:8000", 904),
        (("192.0.2.1", 0), "127.0.0.1:8000", 904),
        (("192.0.2.1", 65536), "127.0.0.1:8000", 904),
        (("192.0.2.1; }", 8443), "127.0.0.1:8000", 904),
        (("192.0.2.1", 8443), "10.0.0.1:8000", 904),
        (("192.0.2.1", 8443), "127.0.0.1", 904),
        (("192.0.2.1", 8443), "127.0.0.1:x", 904),
    ],
)
def test_addresses_are_checked(tmp_path, listen, superlink, code):
    with pytest.raises(DeployError) as caught:
        reverse_proxy.configuration(listen, superlink, tmp_path)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ['a"b', "a$b", "a;b", "a{b", "a\nb", "a\\b", "a'b", "ä"])
def test_a_home_that_nginx_would_misread_is_refused(tmp_path, name):
    with pytest.raises(DeployError) as caught:
        reverse_proxy.configuration(("192.0.2.1", 8443), "127.0.0.1:8000", tmp_path / name)
    assert caught.value.code == 910


def test_ipv6_addresses_are_bracketed(tmp_path):
    text = reverse_proxy.configuration(("::", 8443), "[::1]:8000", tmp_path)
    assert "listen [::]:8443 ssl" in text
    assert "server [::1]:8000 " in text


BIN = Path(sys.executable).parent


class SuperLink:
    """A real SuperLink with node authentication, on loopback."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.home, self.port, self.log = home, homes.free_port(), folder / "superlink.log"
        self.folder = folder
        flower = folder / "operator"
        flower.mkdir()
        self.environment = {
            "FLWR_HOME": str(flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "NO_COLOR": "1",
            # Tells of every request.
            "FLWR_LOG_LEVEL": "DEBUG",
            "PYTHONUNBUFFERED": "1",
        }
        (flower / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "localhost:{self.port}"\n'
            f'root-certificates = "{certificates.authority_path(home)}"\n'
        )
        secret = folder / "secret"
        secret.write_bytes(os.urandom(32))
        self.command = [
            BIN / "flower-superlink",
            *("--ssl-certfile", certificates.certificate_path(home)),
            *("--ssl-keyfile", certificates.key_path(home)),
            *("--ssl-ca-certfile", certificates.authority_path(home)),
            *("--enable-supernode-auth", "--isolation", "process"),
            *("--superexec-auth-secret-file", secret),
            "--disable-runtime-dependency-installation",
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]

    def flwr(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def node(self, port: int, key: Path, name: str) -> Iterator[tuple[subprocess.Popen, Path]]:
        log, runtime = self.folder / f"{name}.log", homes.free_port()
        flower = self.folder / name
        flower.mkdir()
        command = [
            BIN / "flower-supernode",
            *("--root-certificates", certificates.authority_path(self.home)),
            *("--superlink", f"localhost:{port}", "--auth-supernode-private-key", key),
            *("--isolation", "process", "--host", "127.0.0.1", "--port", str(runtime)),
        ]
        with process(command, log, {**self.environment, "FLWR_HOME": str(flower)}) as child:
            yield child, log


@pytest.fixture(scope="module")
def superlink(tmp_path_factory, home) -> Iterator[SuperLink]:
    found = SuperLink(tmp_path_factory.mktemp("flower"), home)
    with process(found.command, found.log, found.environment):
        wait_for(lambda: answers(found.port), 300, "the SuperLink does not listen")
        yield found


@pytest.mark.soak
@needs_nginx
def test_an_admitted_site_comes_through_the_front_and_no_other(home, superlink, tmp_path):
    north, stranger = tmp_path / "north", tmp_path / "stranger"
    key = site_registry.admit(home, "north", node_key.create(north))
    node_key.create(stranger)
    superlink.flwr("supernode", "register", key, "lab", "--name", "north")
    with serving(home, superlink.port) as (port, _):
        with superlink.node(port, north / "site.key", "north") as (child, log):
            wait_for(lambda: "SuperNode ID" in log.read_text(), 300, "the node has no number")
            # It has asked for messages, too.
            wait_for(lambda: FLEET in superlink.log.read_text(), 300, "the node asks for nothing")
            listed = superlink.flwr("supernode", "list", "lab", "--format", "json")
            assert '"online"' in listed
            assert child.poll() is None
        before = superlink.log.read_text()
        with superlink.node(port, stranger / "site.key", "stranger") as (child, log):
            wait_for(lambda: child.poll() is not None, 300, "the stranger is not turned away")
            assert "SuperNode ID" not in log.read_text()
        said = superlink.log.read_text()[len(before) :]
        assert re.search(r'"POST /v1/fleet/activate-node HTTP/1.1" 4\d\d', said)
    assert superlink.flwr("supernode", "list", "lab", "--format", "json").count('"online"') <= 1


@needs_nginx
@pytest.mark.slow
def test_the_control_api_answers_here_and_not_through_the_front(home, superlink):
    def reached() -> int:
        return len(re.findall(r'"[A-Z]+ \S*(control|runtime|%2e)', superlink.log.read_text()))

    asked = post("/v1/control/list-runs", headers="Content-Type: application/protobuf\r\n")
    before = reached()
    assert status(exchange(home, superlink.port, asked)) not in (0, 401, 404)
    wait_for(lambda: reached() == before + 1, 120, "the SuperLink keeps no account of requests")
    with serving(home, superlink.port) as (port, _):
        for path in (
            "/v1/control/list-runs",
            "/v1/runtime/pull-task",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "/v1/fleet/..%2fcontrol/list-runs",
            "//v1/control/list-runs",
        ):
            answer = exchange(home, port, asked.replace(b"/v1/control/list-runs", path.encode()))
            assert (status(answer), body(answer)) == (404, b"")
        # A fleet request without a site's key passes the front and is refused behind it.
        assert status(exchange(home, port, post(FLEET))) not in (0, 200, 404, 502)
    assert reached() == before + 1
