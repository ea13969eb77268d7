#!/usr/bin/env bash
# grpcio 1.85.1: grpc.keepalive_timeout_ms does not bound how long a server waits for the answer to a keepalive ping.
#
# Valid input: a server with grpc.keepalive_time_ms = 1000 and grpc.keepalive_timeout_ms = 1000 streams to a client through a
# small relay. Then the relay carries nothing more, as a cable that is pulled: both connections stay open and silent. By the
# names of the two options the server should know after two or three seconds; it takes a minute. With grpc.http2.ping_timeout_ms
# = 1000 beside them, an option of another part of the library with a default of 60 s, it takes about two seconds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "grpcio==1.85.1"
no_grpc_proxy=127.0.0.1 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import contextlib
import time

import grpc

KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
]
PATIENCE_S = 90.0


class Relay:
    """Carries bytes between two sockets until its cable is pulled."""

    def __init__(self, port):
        self.port, self.whole, self.tasks = port, True, set()

    async def connected(self, reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        for source, sink in ((reader, back), (there, writer)):
            self.tasks.add(asyncio.create_task(self.carry(source, sink)))

    async def carry(self, source, sink):
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if self.whole:
                    sink.write(data)
                    await sink.drain()


async def seconds_until_noticed(more):
    ended = asyncio.Event()

    async def numbers(request, context):
        try:
            while True:
                yield b"x"
                await asyncio.sleep(4)
        finally:
            ended.set()

    server = grpc.aio.server(options=[*KEEPALIVE, *more])
    handler = grpc.unary_stream_rpc_method_handler(numbers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("finding", {"Numbers": handler}),))
    relay = Relay(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    door = await asyncio.start_server(relay.connected, "127.0.0.1", 0)
    async with grpc.aio.insecure_channel("127.0.0.1:%d" % door.sockets[0].getsockname()[1]) as channel:
        call = channel.unary_stream("/finding/Numbers")(b"")
        await call.read()
        relay.whole, begun = False, time.monotonic()
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        seconds = time.monotonic() - begun
        for task in relay.tasks:
            task.cancel()
        door.close()
        await server.stop(0)
    return seconds


alone = asyncio.run(seconds_until_noticed([]))
both = asyncio.run(seconds_until_noticed([("grpc.http2.ping_timeout_ms", 1000)]))
print(f"grpcio {grpc.__version__}: a silent client is noticed after {alone:.0f} s, with ping_timeout_ms after {both:.0f} s")
seen = alone > 30 and both < 15
print("as described" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
