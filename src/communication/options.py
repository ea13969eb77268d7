"""What both ends of a connection must agree on."""

from __future__ import annotations

from typing import Final

DEFAULT_MAX_MESSAGE_BYTES: Final = 4 << 20
"""gRPC's own default. Everything larger travels in chunks."""

MAX_MODEL_BYTES: Final = 3 << 20
"""Of a model inside a job: it travels in one message, and a larger one by itself, in chunks, before the job."""
MAX_UPLOAD_BYTES: Final = 256 << 20
"""Of a model that is uploaded before its job."""

CLIENT_PING_INTERVAL_S: Final = 20
"""How often a client asks a silent server whether it is there: below the minute after which NATs forget."""

MIN_PING_INTERVAL_S: Final = 10
"""What the server tolerates: half of the above, so that jitter is no offence. gRPC's default of 300 s would answer our
clients with GOAWAY "too_many_pings"."""

PING_TIMEOUT_S: Final = 10
"""After a ping without an answer the connection counts as lost."""

HANDSHAKE_S: Final = 20
"""Within it a new connection has to be ready for calls: some round trips and 5 KB, on any line that can be worked with.
gRPC's own is two minutes, in which whoever connects and says nothing holds a descriptor."""

IDLE_CONNECTION_S: Final = 300
"""After so long without a call a server lets a connection go; its client dials again when it needs one. A party's has
its stream of assignments, a watcher's its watch: they stay. There is no longest age, which would end these too."""

LONGEST_RECONNECT_PAUSE_S: Final = 5
"""gRPC's own two minutes are longer than anybody here waits for an aggregator that restarts."""

Options = list[tuple[str, int]]


def _common(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
        # By this the answer to a ping is waited for (gRPC 1.85: a minute), and not by the former alone.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(max_message_bytes: int) -> Options:
    """Channel arguments of a client. Nothing is retried by the channel: a caller knows what may be sent twice."""
    return [
        *_common(max_message_bytes),
        ("grpc.keepalive_time_ms", CLIENT_PING_INTERVAL_S * 1000),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_PAUSE_S * 1000),
    ]


def server_options(
    max_message_bytes: int, *, ping_interval_s: float, max_concurrent_streams: int, max_connections: int
) -> Options:
    """Channel arguments of a server, which pings its clients every `ping_interval_s`.

    Args:
        max_concurrent_streams: of one connection; a client keeps further calls back by itself.
        max_connections: at a time; a further one is closed as soon as it is made.
    """
    return [
        *_common(max_message_bytes),
        ("grpc.max_concurrent_streams", max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.http2.settings_timeout", HANDSHAKE_S * 1000),
        ("grpc.max_connection_idle_ms", IDLE_CONNECTION_S * 1000),
        ("grpc.keepalive_time_ms", int(ping_interval_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_S * 1000),
        # Else a second server binds the same port, and every other call ends up there.
        ("grpc.so_reuseport", 0),
    ]
