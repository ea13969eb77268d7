"""What both ends of a connection must agree on."""

from __future__ import annotations

from typing import Final

DEFAULT_MAX_MESSAGE_BYTES: Final = 4 << 20
"""gRPC's own default. Everything larger travels in chunks."""

CLIENT_PING_INTERVAL_S: Final = 20
"""How often a client asks a silent server whether it is there: below the minute after which NATs forget."""

MIN_PING_INTERVAL_S: Final = 10
"""What the server tolerates: half of the above, so that jitter is no offence. gRPC's default of 300 s would answer our
clients with GOAWAY "too_many_pings"."""

PING_TIMEOUT_S: Final = 10
"""After a ping without an answer the connection counts as lost."""

LONGEST_RECONNECT_PAUSE_S: Final = 5
"""gRPC's own two minutes are longer than anybody here waits for an aggregator that restarts."""

Options = list[tuple[str, int]]


def _common(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
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


def server_options(max_message_bytes: int, *, ping_interval_s: float) -> Options:
    """Channel arguments of a server, which pings its clients every `ping_interval_s`."""
    return [
        *_common(max_message_bytes),
        ("grpc.keepalive_time_ms", int(ping_interval_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_S * 1000),
        # Else a second server binds the same port, and every other call ends up there.
        ("grpc.so_reuseport", 0),
    ]
