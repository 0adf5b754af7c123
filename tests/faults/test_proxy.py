import contextlib
import socket
import socketserver
import threading
import time

import pytest

from .proxy import CHUNK, HOST, FaultProxy

SHORT = 0.2
WAIT = 60.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)
            # Said after the client's end of stream: proves that half a close is passed on.
            self.request.sendall(b"bye")


@pytest.fixture
def echo():
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server((HOST, 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address
        server.shutdown()


@contextlib.contextmanager
def connected(proxy):
    with socket.create_connection((HOST, proxy.port), WAIT) as client:
        yield client


def receive(client, size):
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def ask(client, data=b"ping"):
    """Seconds until the echo is back."""
    begun = time.monotonic()
    client.sendall(data)
    assert receive(client, len(data)) == data
    return time.monotonic() - begun


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_faults_bytes_pass_unchanged_and_are_counted(echo):
    data = bytes(range(256)) * 4096
    with FaultProxy(echo) as proxy, connected(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert receive(client, len(data)) == data
        sender.join(WAIT)
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 10) == b"bye"
        until(lambda: proxy.open_connections == 0)
        assert proxy.connections == 1
        assert proxy.delivered == {"up": len(data), "down": len(data) + 3}
        assert (proxy.swallowed, proxy.resets) == (0, 0)


def test_latency_delays_each_way_and_ends_when_it_is_set_back(echo):
    with FaultProxy(echo, latency=SHORT) as proxy, connected(proxy) as client:
        assert 2 * SHORT <= ask(client) < 30
        proxy.latency = 0.0
        assert min(ask(client) for _ in range(10)) < 2 * SHORT


def test_latency_does_not_thin(echo):
    # One chunk at a time would take a latency for each: 256 chunks, 51.2 s each way.
    data = bytes(256 * CHUNK)
    with FaultProxy(echo, latency=SHORT) as proxy, connected(proxy) as client:
        assert 2 * SHORT <= ask(client, data) < 25


@pytest.mark.slow
def test_bandwidth_is_shared_by_all_connections(echo):
    data = bytes(4 * CHUNK)
    # Both connections' bytes, one way: 2 * 64 KiB at 2 Mbit/s.
    expected = 2 * len(data) * 8 / 2e6
    with (
        FaultProxy(echo, bandwidth=2e6) as proxy,
        connected(proxy) as one,
        connected(proxy) as two,
    ):
        begun = time.monotonic()
        other = threading.Thread(target=ask, args=(two, data))
        other.start()
        ask(one, data)
        other.join(WAIT)
        assert expected * 0.9 <= time.monotonic() - begun < 30
        proxy.bandwidth = None
        assert min(ask(one, data) for _ in range(50)) < expected * 0.9


@pytest.mark.slow
def test_a_sender_is_held_back_when_the_buffer_is_full(echo):
    size = 64 * 1024 * 1024
    with FaultProxy(echo, latency=60.0, buffer=4 * CHUNK) as proxy, connected(proxy) as client:
        client.settimeout(1.0)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(size))
        assert proxy.delivered["up"] == 0


@pytest.mark.slow
def test_connections_are_reset_again_and_again(echo):
    with FaultProxy(echo) as proxy:
        with connected(proxy) as client:
            ask(client)
            proxy.reset_every = SHORT
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        # The reset may come as early as in connect().
        with pytest.raises(ConnectionResetError), connected(proxy) as client:
            client.recv(1)
        assert proxy.resets >= 2
        proxy.reset_every = None
        with connected(proxy) as client:
            time.sleep(2 * SHORT)
            ask(client)


def test_reset_ends_all_that_are_open_now(echo):
    with FaultProxy(echo) as proxy, connected(proxy) as client:
        ask(client)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@pytest.mark.slow
def test_half_open_swallows_both_ways_on_old_and_new_connections(echo):
    with FaultProxy(echo) as proxy, connected(proxy) as old:
        ask(old)
        proxy.half_open = True
        with connected(proxy) as new:
            for client in (old, new):
                client.sendall(b"lost")
                client.settimeout(SHORT)
                with pytest.raises(TimeoutError):
                    client.recv(1)
            until(lambda: proxy.swallowed == 8)
            proxy.half_open = False
            # Bytes are missing in these: they stay silent. A third one works.
            old.sendall(b"lost")
            with pytest.raises(TimeoutError):
                old.recv(1)
        with connected(proxy) as fresh:
            ask(fresh)


@pytest.mark.slow
def test_half_open_swallows_what_is_on_its_way(echo):
    with FaultProxy(echo, latency=5 * SHORT) as proxy, connected(proxy) as client:
        client.sendall(b"ping")
        until(lambda: proxy.delivered["up"] == 4)
        time.sleep(SHORT)  # the echo is on its way back
        proxy.half_open = True
        client.settimeout(8 * SHORT)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert proxy.delivered == {"up": 4, "down": 0}


def test_refuse_closes_the_port_and_opens_the_same_again(echo):
    with FaultProxy(echo) as proxy, connected(proxy) as old:
        ask(old)
        port = proxy.port
        proxy.refuse = True
        with pytest.raises(ConnectionRefusedError), connected(proxy):
            pass
        ask(old)
        proxy.refuse = False
        assert proxy.port == port
        with connected(proxy) as new:
            ask(new)


def test_a_target_that_refuses_is_a_reset():
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        # The reset may come as early as in connect().
        with (
            FaultProxy(closed.getsockname()) as proxy,
            pytest.raises(ConnectionResetError),
            connected(proxy) as client,
        ):
            client.recv(1)


def test_leaving_ends_open_connections_and_closes_the_port(echo):
    with contextlib.ExitStack() as stack:
        with FaultProxy(echo, latency=60.0) as proxy:
            client = stack.enter_context(connected(proxy))
            client.sendall(b"late")
            until(lambda: proxy.connections == 1)
        assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError), connected(proxy):
            pass
