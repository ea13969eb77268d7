"""A connection that a proxy of the environment keeps from coming about says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import grpc
import pytest

from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import _Channel, _Other
from src.communication.options import client_options
from src.communication.proxies import advice
from src.errors import UnavailableError

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_the_error_names_the_variable_and_what_to_do(
    variable: str, monkeypatch: pytest.MonkeyPatch, reserved_address: Callable[[], AbstractContextManager[str]]
) -> None:
    """With gRPC's own idea of when it goes through a proxy: where nobody listens. The password is not told."""
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    with reserved_address() as proxy:
        monkeypatch.setenv(variable, f"http://ann:secret@{proxy}")
        address = "192.0.2.1:50051"  # of nobody (RFC 5737)
        channel = grpc.aio.insecure_channel(address, options=client_options(1000))
        stub = jobs_pb2_grpc.JobServiceStub(_Channel(channel, _Other(address, None), (), call_timeout_s=None))
        with pytest.raises(UnavailableError) as raised:
            await stub.GetStatus(jobs_pb2.GetStatusRequest())
        await channel.close(None)
    assert f"proxy {proxy} that the environment variable {variable} names" in raised.value.message
    assert "add 192.0.2.1 to no_proxy" in raised.value.message
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("address", "environ", "named"),
    [
        ("aggregator.example.org:1", {"http_proxy": "http://proxy:3128"}, "http_proxy"),
        ("aggregator.example.org:1", {"http_proxy": "http://a:1", "https_proxy": "http://b:1"}, "https_proxy"),
        ("aggregator.example.org:1", {"grpc_proxy": "http://a:1", "https_proxy": "http://b:1"}, "grpc_proxy"),
        ("aggregator.example.org:1", {"http_proxy": "http://a:1", "no_proxy": "other.org"}, "http_proxy"),
        ("aggregator.example.org:1", {"http_proxy": "http://a:1", "no_proxy": "localhost, .Example.org"}, ""),
        (
            "aggregator.example.org:1",
            {"http_proxy": "http://a:1", "no_grpc_proxy": "x", "no_proxy": "org"},
            "http_proxy",
        ),
        ("aggregator.example.org:1", {"http_proxy": "http://a:1", "no_grpc_proxy": "aggregator.example.org"}, ""),
        ("10.1.2.3:1", {"http_proxy": "http://a:1", "no_proxy": "10.0.0.0/8"}, ""),
        ("[2001:db8::1]:1", {"http_proxy": "http://a:1", "no_proxy": "2001:db8::/32"}, ""),
        ("[2001:db8::1]:1", {"http_proxy": "http://a:1", "no_proxy": "10.0.0.0/8"}, "http_proxy"),
        ("aggregator.example.org:1", {"https_proxy": "https://a:1"}, ""),  # gRPC speaks to none of these
        ("aggregator.example.org:1", {"https_proxy": "", "http_proxy": "http://a:1"}, ""),  # the first that is set
        ("aggregator.example.org:1", {"HTTP_PROXY": "http://a:1"}, ""),  # gRPC reads lower case
        ("aggregator.example.org:1", {"http_proxy": "http://[x"}, ""),  # no address at all
        ("aggregator.example.org:1", {}, ""),
        ("127.0.0.1:1", {"http_proxy": "http://a:1"}, ""),
        ("localhost:1", {"http_proxy": "http://a:1"}, ""),
    ],
)
def test_only_a_proxy_that_stands_in_the_way_is_named(address: str, environ: dict[str, str], named: str) -> None:
    said = advice(address, environ)
    assert (named in said, "no_proxy" in said) == (True, True) if named else said == ""
