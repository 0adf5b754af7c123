"""Checks with a TLS handshake whether the server is reachable, and how long its certificate is valid."""

from __future__ import annotations

import json
import socket
import ssl
import time
from pathlib import Path
from typing import Any

from fedge.shared.daemon.home import split_address

TIMEOUT = 10.0


def check(address: str, ca: Path) -> dict[str, Any]:
    """Do a TLS handshake with the server.

    Args:
        address: host:port.
        ca: PEM file of the server's CA.

    Returns:
        ``reachable``, ``at`` (seconds since 1970), ``days_left`` of the certificate, and ``problem`` as text.
    """
    host, port = split_address(address)
    result: dict[str, Any] = {"at": round(time.time()), "reachable": False, "days_left": None}
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with (
            socket.create_connection((host, port), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            certificate = secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return result | {"problem": f"FE-907 certificate: {error.verify_message}"}
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        return result | {"problem": f"FE-912 the server cannot be reached: {why}"}
    expires = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = int((expires - time.time()) // 86_400)
    return result | {"reachable": True, "days_left": days, "problem": ""}


def write(address: str, ca: Path, path: Path) -> None:
    """Run ``check``, and write its result to the JSON file ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(check(address, ca)), encoding="utf-8")
    temporary.replace(path)
