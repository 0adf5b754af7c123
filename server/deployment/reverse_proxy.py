"""The TLS reverse proxy: nginx before Flower's SuperLink, so that sites reach the Fleet API and nothing else.

The SuperLink serves three APIs on one port, and its Control API, which starts and stops runs, has no
authentication. So the SuperLink listens on loopback, and the proxy passes on ``POST /v1/fleet/NAME`` alone, compared
with the request line as it came: no decoding, no ``..``, no query. Everything else gets 404 and an empty body. The
connection to the SuperLink is TLS too, and verified, as another user of the machine could hold the port while the
SuperLink is down.

Files, all in the home: ``front/nginx.conf``, the pid file, and ``front/temp/`` for bodies that are still arriving.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from fedge.server.deployment.certificates import authority_path, certificate_path, key_path
from fedge.shared.errors import DeployError
from fedge.shared.files import reason, write_atomically

#: Largest request, MiB: Flower cuts arrays into objects of 5 MiB.
BODY_MIB: Final = 16
#: Most connections of one address at a time. Several sites may share one address, each with up to six.
CONNECTIONS: Final = 256
#: Requests a second of one address, and how many may come at once. A site asks every 3 s, and for each object.
RATE, BURST = 200, 400
#: Seconds without progress, in any phase of a request, until its connection is closed. A handshake over a link
#: with 20 s of latency must succeed.
TIMEOUT: Final = 60
#: The name that the SuperLink's certificate is checked for; every certificate has it.
UPSTREAM_NAME: Final = "localhost"

_CHECK_TIMEOUT: Final = 30.0
# What stands between quotes in nginx's language without being read as anything else.
_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9_./+@:, =-]*")
_ROUTE: Final = "^POST /v1/fleet/[a-z-]{1,64}$"

_TEXT: Final = """\
# Written by fedge; changes are lost at the next start.
# One process in the foreground: a worker would outlive a master that is killed, and hold the port.
daemon off;
master_process off;
pid "{folder}/nginx.pid";
error_log stderr warn;
events {{
    worker_connections 4096;
}}
http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path "{folder}/temp/body";
    proxy_temp_path "{folder}/temp/proxy";
    fastcgi_temp_path "{folder}/temp/fastcgi";
    uwsgi_temp_path "{folder}/temp/uwsgi";
    scgi_temp_path "{folder}/temp/scgi";

    # The request as it came: a path that must be decoded or shortened first is none of ours.
    map "$request_method $request_uri" $fleet {{
        default 0;
        "~{route}" 1;
    }}
    # An empty text in its place would bring nginx's own page.
    map "" $nothing {{
        default "";
    }}
    limit_conn_zone $binary_remote_addr zone=connections:4m;
    limit_req_zone $binary_remote_addr zone=requests:4m rate={rate}r/s;

    upstream superlink {{
        server {upstream} max_fails=0;
        keepalive 64;
        # Shorter than the SuperLink's 5 s, so that no request goes into a connection that it is closing.
        keepalive_timeout 4s;
    }}
    server {{
        listen {listen} ssl so_keepalive=30s:10s:3;
        server_name _;

        ssl_certificate "{certificate}";
        ssl_certificate_key "{key}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305;
        ssl_session_cache shared:fleet:4m;
        ssl_session_tickets off;

        client_header_timeout {timeout}s;
        client_body_timeout {timeout}s;
        send_timeout {timeout}s;
        keepalive_timeout {timeout}s;
        reset_timedout_connection on;
        client_header_buffer_size 2k;
        large_client_header_buffers 4 8k;
        client_max_body_size {body}m;
        client_body_buffer_size 64k;
        limit_conn connections {connections};
        limit_req zone=requests burst={burst} nodelay;

        # Refusals of nginx's own, without its pages. 503 stays 503: sites try again after it.
        error_page 400 403 404 405 408 411 412 413 414 415 416 421 429 431 494 495 496 497 /refused;
        error_page 500 501 502 503 504 505 507 /refused;
        location = /refused {{
            internal;
            return 404 $nothing;
        }}
        location / {{
            if ($fleet = 0) {{
                return 404 $nothing;
            }}
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Upgrade "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_redirect off;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 1;
            proxy_ssl_trusted_certificate "{authority}";
            proxy_ssl_name {name};
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_connect_timeout 5s;
            proxy_send_timeout {timeout}s;
            proxy_read_timeout {timeout}s;
            proxy_max_temp_file_size 64m;
        }}
    }}
}}
"""


def configuration(listen: tuple[str, int], upstream: str, home: Path) -> str:
    """The configuration of nginx, as text.

    Args:
        listen: the IP address and port that sites connect to; ``0.0.0.0`` or ``::`` for all addresses.
        upstream: the SuperLink, ``127.0.0.1:PORT`` or ``[::1]:PORT``.
        home: the server's home, with the certificates.

    Raises:
        DeployError: 904, an address is not one, or the upstream is not on loopback; 910, the home's
            path has characters that the configuration cannot hold.
    """
    root = str(home.absolute())
    if _PLAIN_PATH.fullmatch(root) is None:
        raise DeployError(
            910, f"home: must be a path of letters, digits and ' _./+@:,=-', got {root!r}"
        )
    host, _, port = upstream.rpartition(":")
    return _TEXT.format(
        folder=_folder(home.absolute()),
        route=_ROUTE,
        listen=_address("listen", *listen),
        upstream=_address("upstream", host.strip("[]"), _port(port), loopback=True),
        certificate=certificate_path(home.absolute()),
        key=key_path(home.absolute()),
        authority=authority_path(home.absolute()),
        name=UPSTREAM_NAME,
        body=BODY_MIB,
        connections=CONNECTIONS,
        rate=RATE,
        burst=BURST,
        timeout=TIMEOUT,
    )


def write(home: Path, listen: tuple[str, int], upstream: str) -> Path:
    """Write the configuration and make the folders that it names.

    Returns:
        The configuration's path.

    Raises:
        DeployError: 904 and 910 as ``configuration``; 901, the home cannot be written.
    """
    text = configuration(listen, upstream, home)
    path = _file(home)
    try:
        (_folder(home) / "temp").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise DeployError(901, f"{path}: cannot be written ({reason(error)})") from None
    return path


def check(home: Path) -> None:
    """Have nginx test the configuration, the certificate and the key.

    Raises:
        DeployError: 909, nginx is not installed; 910, it refuses, with the line that it gives.
    """
    try:
        done = subprocess.run(
            [*command(home), "-t", "-q"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CHECK_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise DeployError(910, f"nginx: must answer within {_CHECK_TIMEOUT:g} s") from None
    except OSError as error:
        raise DeployError(909, f"nginx: cannot be started ({reason(error)})") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines() or ["no output"]
        # Warnings may come first; the line that decides is an [emerg] one, after a time and numbers.
        line = next((line for line in lines if "[emerg]" in line), lines[0])
        raise DeployError(910, re.sub(r"^.*?\[emerg\] [0-9#]+: ", "nginx: ", line))


def command(home: Path) -> list[str]:
    """The command that runs nginx as one process in the foreground; SIGTERM ends it.

    It logs to standard error. The limit of open files should be twice its 4,096 connections.

    Raises:
        DeployError: 909, nginx is not installed.
    """
    # Where daemons lie is often not on the PATH of a user.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    nginx = shutil.which("nginx", path=path)
    if nginx is None:
        raise DeployError(909, "nginx: must be installed, got none on PATH")
    arguments = [nginx, "-p", str(_folder(home.absolute())), "-c", str(_file(home.absolute()))]
    if os.geteuid() == 0:
        # Started by root, nginx would give its folders to another user.
        arguments += ["-g", "user root;"]
    return arguments


def _folder(home: Path) -> Path:
    return home / "front"


def _file(home: Path) -> Path:
    return _folder(home) / "nginx.conf"


def _port(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0


def _address(key: str, host: str, port: int, *, loopback: bool = False) -> str:
    """An address as nginx writes it."""
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        raise DeployError(904, f"{key}: must be an IP address, got {host[:80]!r}") from None
    if not 1 <= port <= 65535:
        raise DeployError(904, f"{key}: must have a port of 1 to 65535, got {port}")
    if loopback and not parsed.is_loopback:
        raise DeployError(904, f"{key}: must be a loopback address, got {host}")
    return f"[{parsed}]:{port}" if parsed.version == 6 else f"{parsed}:{port}"


__all__ = ["check", "command", "configuration", "write"]
