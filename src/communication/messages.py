"""Between wire messages and the values the rest of the house works with."""

from __future__ import annotations

from ..errors import InvalidInput
from ..protocol.signing import Signed
from .generated import common_pb2


def signed_to_proto(signed: Signed) -> common_pb2.Signed:
    """The message for a signed statement."""
    return common_pb2.Signed(statement=signed.statement, signer=signed.signer, signature=signed.signature)


def signed_from_proto(message: common_pb2.Signed) -> Signed:
    """The signed statement in a message; its signature is not verified here.

    Raises:
        InvalidInput: a field is missing.
    """
    missing = {name: "must not be empty" for name in ("statement", "signer", "signature") if not getattr(message, name)}
    if missing:
        raise InvalidInput("a signed statement is incomplete", violations=missing)
    return Signed(message.statement, message.signer, message.signature)
