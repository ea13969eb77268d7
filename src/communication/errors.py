"""Errors on the wire, after the richer error model (AIP-193; `google.rpc.Status`).

Out: a `SottoError` becomes the status of its row in `errors.CATALOGUE`, its public message, and details: `ErrorInfo`
(reason, domain, metadata) and, for invalid input, `BadRequest` with the fields. Everything else becomes INTERNAL and an
incident number that is also in the log. In: the same class comes back, found by `ErrorInfo.reason`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ..errors import (
    BY_REASON,
    DOMAIN,
    PASSING,
    UNEXPECTED,
    AbandonedError,
    AccessError,
    AuthenticationError,
    ConflictError,
    DeadlineError,
    InvalidInput,
    LedgerError,
    LimitError,
    NotFoundError,
    Refused,
    SottoError,
    StorageError,
    UnavailableError,
    VersionError,
    WorkerError,
    meaning,
    public_texts,
)
from ..logs import Seldom
from .handlers import Handler, around
from .proxies import advice

LOG: Final = logging.getLogger("sotto.communication")

DETAILS_KEY: Final = "grpc-status-details-bin"
MAX_STATUS_BYTES: Final = 4096
"""Of a whole status. On the wire it is base64 (a third longer) beside the message once more, percent-encoded (up to
three times as long); gRPC's soft limit for all trailers of a call is 8 KiB (`grpc.max_metadata_size`)."""

_MAX_MESSAGE_BYTES: Final = 768
_MAX_TEXT_BYTES: Final = 512  # of one metadata value or field violation

_WITHOUT_DETAILS: Final[dict[grpc.StatusCode, type[SottoError]]] = {
    grpc.StatusCode.CANCELLED: AbandonedError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.UNIMPLEMENTED: VersionError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.INTERNAL: UnavailableError,
}
"""What a status means that no servant of ours wrote: the channel's own, or another server's. INTERNAL is what gRPC says
where a stream breaks off, now and then also where a server had refused it in the middle of an upload."""

_VERBS: Final = {
    grpc.StatusCode.UNAVAILABLE: "cannot be reached",
    grpc.StatusCode.INTERNAL: "broke the call off",
    grpc.StatusCode.DEADLINE_EXCEEDED: "did not answer in time",
    grpc.StatusCode.UNIMPLEMENTED: "does not know this method",
}

_OF_A_CONNECTION: Final = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""What a channel says that does not come through to a server; a proxy may be why."""


def to_status(error: SottoError) -> status_pb2.Status:
    """The public half of `error`, at most `MAX_STATUS_BYTES` long: texts are cut and the last details left out."""
    row = meaning(error)
    status = status_pb2.Status(
        code=grpc.StatusCode[row.status].value[0], message=_cut(error.message, _MAX_MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)
    room = MAX_STATUS_BYTES // 2
    for key, value in error.metadata.items():
        text = _cut(value, _MAX_TEXT_BYTES)
        room -= len(key.encode()) + len(text.encode()) + _ENTRY_OVERHEAD
        if room < 0:
            break
        info.metadata[key] = text
    status.details.add().Pack(info)
    if isinstance(error, InvalidInput) and error.violations:
        bad = error_details_pb2.BadRequest()
        room = MAX_STATUS_BYTES - status.ByteSize() - _ANY_OVERHEAD
        for field, text in error.violations.items():
            field, text = _cut(field, _MAX_TEXT_BYTES), _cut(text, _MAX_TEXT_BYTES)
            room -= len(field.encode()) + len(text.encode()) + _ENTRY_OVERHEAD
            if room < 0:
                break
            bad.field_violations.add(field=field, description=text)
        status.details.add().Pack(bad)
    return status


_ENTRY_OVERHEAD: Final = 16  # tags and lengths of one entry
_ANY_OVERHEAD: Final = 80  # type URL, tags and lengths of one packed detail


def _cut(text: str, limit: int) -> str:
    """`text` with at most `limit` bytes in UTF-8, marked where it was cut."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def from_status(status: status_pb2.Status) -> SottoError | None:
    """The error in a status of ours; None if it carries no `ErrorInfo` of our domain."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad):
            if detail.Is(message.DESCRIPTOR):
                with contextlib.suppress(DecodeError):
                    detail.Unpack(message)
    if info.domain != DOMAIN:
        return None
    error = BY_REASON.get(info.reason, SottoError)(status.message)
    error.metadata, error.remote = public_texts(dict(info.metadata)), True
    if isinstance(error, InvalidInput):
        error.violations = public_texts({each.field: each.description for each in bad.field_violations})
    return error


def from_rpc_error(error: grpc.aio.AioRpcError, *, address: str) -> SottoError:
    """What a failed call raises: the servant's own error, or what the channel has to say about `address`."""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                found = from_status(status_pb2.Status.FromString(value))
                if found is not None:
                    return found
    code = error.code()
    text = _cut(error.details() or code.name, _MAX_TEXT_BYTES)  # made printable by the error that quotes it
    verb = _VERBS.get(code, f"answered {code.name}")
    hint = advice(address) if code in _OF_A_CONNECTION else ""
    said = _WITHOUT_DETAILS.get(code, SottoError)(f"{address} {verb}: {text}{hint and f'; {hint}'}", address=address)
    said.remote = True
    return said


class ServerErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Translates whatever a handler, or an interceptor inside this one, raises. To be the outermost interceptor."""

    def __init__(self) -> None:
        self._seldom = Seldom(LOG)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Handler:
        """Wraps the method's handler."""
        handler: Handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method
        return around(handler, lambda context: self._translate(method, context))

    @contextlib.asynccontextmanager
    async def _translate(self, method: str, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:  # a status set on purpose, by a service that is not ours
            raise
        except SottoError as error:
            row = meaning(error)
            level = logging.ERROR if isinstance(error, _OWN_FAULTS) or row == UNEXPECTED else logging.INFO
            fields = _fields(context, error.message, error.private)
            if level == logging.ERROR and isinstance(error, PASSING):  # a full disk fails every call until it is not
                self._seldom.log(level, row.reason, "%s: %s", method, row.reason, extra=fields)
            else:
                LOG.log(level, "%s: %s", method, row.reason, extra=fields)
            await _abort(context, to_status(error))
        except Exception:
            incident = secrets.token_hex(8)
            LOG.exception("%s failed unexpectedly", method, extra={**_fields(context), "incident": incident})
            await _abort(context, to_status(_Unexpected(f"internal error (incident {incident})", incident=incident)))


_OWN_FAULTS: Final = (StorageError, LedgerError, WorkerError)


class _Unexpected(SottoError):
    """Stands for an exception that nobody raised on purpose."""


def _fields(context: Any, public: str = "", private: str = "") -> dict[str, str]:
    fields = {"peer": context.peer(), "public": public, "private": private}
    return {key: value for key, value in fields.items() if value}


async def _abort(context: Any, status: status_pb2.Status) -> None:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
