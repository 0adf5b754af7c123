"""The gRPC methods: each takes bytes and a call, and gives bytes or refuses with a status and one line.

ModelInfer and the others are registered as taking a stream of one message. On the wire that is the same as taking
one; here it means that a call is known before its message has arrived, so that one that never arrives can be ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from fedge.edge.serving import codec
from fedge.edge.serving.inference_protocol import HEALTH_SERVICE, SERVICE, message, varint
from fedge.edge.serving.loaded_model import Served
from fedge.edge.serving.usage_counters import Counts
from fedge.shared.errors import FedgeError, InputError, UsageError, one_line

Method: TypeAlias = Callable[[bytes, Any], bytes]

_log = logging.getLogger(__name__)

_NAME: Final = "fedge-edge"
_EXTENSIONS: Final = ("model_configuration", "statistics")
_RESPONSE: Final = b"\x12"  # field 2 of ModelStreamInferResponse, length-delimited
_SERVING: Final = 1
_NOT_SERVING: Final = 2
#: Errors that are the server's own, and so worth a line in its log.
_OWN_FAULT: Final = (104, 708, 710)
#: Most bytes of a request other than ModelInfer.
_SMALL: Final = 4096
#: Seconds that a message has to arrive, and those that each byte adds to them: a megabyte a second.
_ARRIVAL: Final = 2.0
_ARRIVAL_PER_BYTE: Final = 2.0**-20

_STATUS: Final = {
    708: grpc.StatusCode.INTERNAL,
    709: grpc.StatusCode.OUT_OF_RANGE,
    710: grpc.StatusCode.INTERNAL,
    808: grpc.StatusCode.RESOURCE_EXHAUSTED,
    809: grpc.StatusCode.DEADLINE_EXCEEDED,
    104: grpc.StatusCode.INTERNAL,
}


def status(error: FedgeError) -> Any:
    """The gRPC status of a refusal; INVALID_ARGUMENT where the request alone is at fault."""
    if isinstance(error, codec.UnknownNameError):
        return grpc.StatusCode.NOT_FOUND
    return _STATUS.get(error.code, grpc.StatusCode.INVALID_ARGUMENT)


class Service:
    """The gRPC methods and their shared state.

    Args:
        served: the first model.
        deadline: most seconds of one request, its arrival included.
        counts: records each ModelInfer.

    Attributes:
        served: the current model; may be replaced at any time, calls in progress keep theirs.
        ready: whether the server accepts requests.
        max_arriving: most calls that wait for their message, each of which holds a thread; one more ends the oldest.
    """

    def __init__(self, served: Served, deadline: float, counts: Counts) -> None:
        self.served = served
        self.ready = True
        self.max_arriving = 32
        self._deadline = deadline
        self._counts = counts
        self._lock = threading.Lock()
        #: Calls that wait for a message: since when, and whether an earlier one of the call may have been answered.
        self._arriving: dict[int, tuple[Any, float, bool]] = {}

    def handlers(self) -> tuple[Any, ...]:
        """Handlers for ``grpc.Server.add_generic_rpc_handlers``."""
        methods: dict[str, Method] = {
            "ServerLive": lambda _data, _call: _bytes("ServerLiveResponse", live=True),
            "ServerReady": lambda _data, _call: _bytes("ServerReadyResponse", ready=self.ready),
            "ServerMetadata": lambda _data, _call: _bytes(
                "ServerMetadataResponse", name=_NAME, version=_version(), extensions=_EXTENSIONS
            ),
            "ModelReady": self._model_ready,
            "ModelMetadata": lambda data, _call: (
                self._requested_model(data).metadata().SerializeToString()
            ),
            "ModelConfig": lambda data, _call: (
                self._requested_model(data).configuration().SerializeToString()
            ),
            "ModelStatistics": self._statistics,
        }
        inference = {name: self._handler(method, _SMALL) for name, method in methods.items()}
        inference["ModelInfer"] = grpc.stream_unary_rpc_method_handler(self._infer)
        inference["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        health = {"Check": self._handler(self._check_health, _SMALL)}
        return (
            grpc.method_handlers_generic_handler(SERVICE, inference),
            grpc.method_handlers_generic_handler(HEALTH_SERVICE, health),
        )

    def end_stalled(self) -> int:
        """Cancel the calls whose message is late; returns their number."""
        allowed = _ARRIVAL + _ARRIVAL_PER_BYTE * self.served.max_bytes
        before = time.monotonic() - min(self._deadline, allowed)
        with self._lock:
            stalled = [
                call
                for call, since, stream in self._arriving.values()
                if since < before and not stream
            ]
        for call in stalled:
            call.cancel()
        return len(stalled)

    def end_streams(self) -> None:
        """Cancel the streams that wait for a request, which a client may keep open for ever."""
        with self._lock:
            waiting = [call for call, _, stream in self._arriving.values() if stream]
        for call in waiting:
            call.cancel()

    def _infer(self, messages: Iterator[bytes], call: Any) -> bytes:
        try:
            return self._answer(messages, call)
        except grpc.RpcError:
            raise
        except Exception as error:
            refusal = _refusal(error)
            call.abort(status(refusal), one_line(refusal))
            raise

    def _stream(self, messages: Iterator[bytes], call: Any) -> Iterator[bytes]:
        """Answer one request after the other, in their order; a refused one does not end the stream."""
        while self.ready:
            try:
                answer = self._answer(messages, call, stream=True)
            except _StreamEnd:
                return
            except grpc.RpcError:
                raise
            except Exception as error:
                yield _bytes("ModelStreamInferResponse", error_message=one_line(_refusal(error)))
            else:
                # The response as it is: a length-delimited field of the message around it.
                yield _RESPONSE + varint(len(answer)) + answer

    def _answer(self, messages: Iterator[bytes], call: Any, *, stream: bool = False) -> bytes:
        start = time.perf_counter()
        try:
            data = self._receive(messages, call, stream=stream)
            if stream:
                # A client thinks between two requests of a stream; a single one arrives within its time.
                start = time.perf_counter()
            seconds = self._deadline - (time.perf_counter() - start)
            if (left := call.time_remaining()) is not None:  # the client's own deadline
                seconds = min(seconds, left)
            served = self._enter()
            try:
                answer = served.infer(data, seconds, call.is_active)
            finally:
                served.leave()
        except _StreamEnd:
            raise
        except grpc.RpcError:  # the client disconnected before its message had arrived
            if not stream:
                self._counts.answered("CANCELLED", time.perf_counter() - start)
            raise
        except Exception as error:
            refusal = _refusal(error)
            self._counts.answered(refusal.label, time.perf_counter() - start)
            if refusal.code in _OWN_FAULT:
                _log.warning("%s", one_line(refusal))
            raise
        self._counts.answered("OK", time.perf_counter() - start)
        return answer

    def _enter(self) -> Served:
        while True:
            # Between these two steps the model may have been replaced.
            served = self.served
            if served.enter():
                return served
            if served is self.served:
                raise InputError(808, "server: must be running, it is stopping")

    def _receive(self, messages: Iterator[bytes], call: Any, *, stream: bool = False) -> bytes:
        key, oldest = id(call), None
        with self._lock:
            if len(self._arriving) >= self.max_arriving:
                oldest, *_ = self._arriving.pop(next(iter(self._arriving)))
            self._arriving[key] = call, time.monotonic(), stream
        if oldest is not None:
            oldest.cancel()
        if stream and not self.ready:
            # It began to wait after ``end_streams`` had looked.
            call.cancel()
        try:
            return next(messages)
        except StopIteration:
            if stream:
                raise _StreamEnd from None
            raise InputError(810, "request: must be one message, got none") from None
        finally:
            with self._lock:
                self._arriving.pop(key, None)

    def _handler(self, method: Method, max_bytes: int) -> Any:
        def behaviour(messages: Iterator[bytes], call: Any) -> bytes:
            try:
                data = self._receive(messages, call)
                if len(data) > max_bytes:
                    raise InputError(
                        805, f"request: must be at most {max_bytes} bytes, got {len(data)}"
                    )
                return method(data, call)
            except grpc.RpcError:
                raise
            except Exception as error:
                refusal = _refusal(error)
                call.abort(status(refusal), one_line(refusal))
                raise

        return grpc.stream_unary_rpc_method_handler(behaviour)

    def _requested_model(self, data: bytes) -> Served:
        """The model that a ModelRequest names."""
        request, served = _parsed("ModelRequest", data), self.served
        codec.check_model(request.name, request.version, served.signature)
        return served

    def _model_ready(self, data: bytes, _call: Any) -> bytes:
        request = _parsed("ModelRequest", data)
        try:
            codec.check_model(request.name, request.version, self.served.signature)
            ready = self.ready
        except InputError:
            ready = False
        return _bytes("ModelReadyResponse", ready=ready)

    def _statistics(self, data: bytes, _call: Any) -> bytes:
        request, served = _parsed("ModelRequest", data), self.served
        if request.name:  # without one, all models are meant
            codec.check_model(request.name, request.version, served.signature)
        return bytes(served.statistics(self._counts.snapshot()).SerializeToString())

    def _check_health(self, data: bytes, _call: Any) -> bytes:
        service = _parsed("HealthCheckRequest", data).service
        if service not in ("", SERVICE):
            raise codec.UnknownNameError(810, f"service: must be empty or {SERVICE}, got another")
        return _bytes("HealthCheckResponse", status=_SERVING if self.ready else _NOT_SERVING)


class _StreamEnd(Exception):  # noqa: N818 - no error
    """The client has sent the last request of a stream."""


def _refusal(error: Exception) -> FedgeError:
    if isinstance(error, FedgeError):
        return error
    # Only the type: the text may quote what the client sent.
    return UsageError(104, f"request: unexpected {type(error).__name__}")


def _parsed(name: str, data: bytes) -> Any:
    try:
        return message(name).FromString(data)
    except DecodeError:
        raise InputError(810, f"request: must be a {name}, got other bytes") from None


def _bytes(kind: str, /, **fields: Any) -> bytes:
    return bytes(message(kind)(**fields).SerializeToString())


def _version() -> str:
    try:
        return version("fedge")
    except PackageNotFoundError:
        return "unknown"
