"""`sotto artifact verify`: whether an artifact of `sotto train` is what it says."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .budget_source import PartyName, StateDir
from .prose import say
from .screen import echo_json

if TYPE_CHECKING:
    from ..learning.standalone_artifact import Verified

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Verify what `sotto train` printed.",
)

MAX_ARTIFACT_BYTES: Final = 16 << 20
"""More than twice what a model of `standalone_artifact.MAX_INLINE_BYTES` takes in base64."""
_STDIN: Final = "-"
_KEY_BYTES: Final = 32


@app.callback()
def _group() -> None:
    """Verify what `sotto train` printed."""


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The artifact, one JSON object; - is stdin.", show_default=False)],
    verify_key: Annotated[
        str | None, typer.Option("--verify-key", help="It must be signed with this key: 64 hex digits.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="party.yaml, whose key is this node's; else that of `sotto train`."),
    ] = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take an artifact that nobody has signed.")
    ] = False,
    allow_unknown_key: Annotated[
        bool, typer.Option("--allow-unknown-key", help="Take a signature by a key that nothing here vouches for.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check form, hash, model, ε and signature. A mock, or what is not signed, is refused. The exit code is the answer.

    Whose signature it is follows from its key: the one named, or this node's own. Else nobody vouches for it, and it is
    refused like one without.
    """
    from ..errors import SignatureError
    from ..learning.standalone_artifact import verify_artifact

    stdin = str(file) == _STDIN
    found = verify_artifact(
        _read(file),
        directory=None if stdin else file.parent,
        verify_key=_key(verify_key),
        allow_unsigned=allow_unsigned,
    )
    vouched_by = _vouched_by(
        found.verify_key, named=verify_key is not None, config=config, name=name, state_dir=state_dir
    )
    if found.signer and vouched_by is None and not allow_unknown_key:
        raise SignatureError(
            f"it is signed by who calls itself {found.signer!r}, with key {found.verify_key}, for which nobody vouches "
            "here: get the key from who trained and name it (--verify-key), or say --allow-unknown-key",
            signer=found.signer,
        )
    if as_json:
        echo_json(_as_object(found, vouched_by))
    else:
        _tell(found, vouched_by)


def _as_object(found: Verified, vouched_by: str | None) -> dict[str, object]:
    from ..protocol.canonical import number_or_inf

    return {
        "job_id": found.job_id,
        "hash": found.hash,
        "epsilon": number_or_inf(found.epsilon),
        "delta": found.delta,
        "signer": found.signer or None,
        "verify_key": found.verify_key or None,
        "vouched_by": vouched_by,
    }


def _tell(found: Verified, vouched_by: str | None) -> None:
    private = math.isfinite(found.epsilon)
    costs = f"ε = {found.epsilon:.6g} at δ = {found.delta:g} for each row" if private else "NO PRIVACY: ε is infinite"
    say(f"job {found.job_id}: {costs}")
    say(f"hash {found.hash}: form, hash, model and ε are in order")
    if not found.signer:
        say("NOT SIGNED: the hash shows damage, not who made it")
    elif vouched_by is None:
        say(
            f"signed by who calls itself {found.signer!r}, with key {found.verify_key}: NOBODY VOUCHES FOR THIS KEY, "
            "it is not this node's. Get the key from who trained, and name it (--verify-key)"
        )
    else:
        say(f"signed by {found.signer!r} with {vouched_by}")


def _vouched_by(key: str, *, named: bool, config: Path | None, name: str | None, state_dir: Path | None) -> str | None:
    """Why the key that signed is to be relied on; None if nothing says so."""
    if not key:
        return None
    if named:
        return "the key that was named"
    own = _own_key_file(config, name=name, state_dir=state_dir)
    if not own.exists():
        return None
    from ..protocol.signing import SigningKey

    return "this node's key" if SigningKey.load(own).verify_key.hex() == key else None


def _own_key_file(config: Path | None, *, name: str | None, state_dir: Path | None) -> Path:
    from ..errors import InvalidInput
    from .train_ledger import KEY_FILE, default_state_dir

    if config is None:
        return (default_state_dir() if state_dir is None else state_dir) / KEY_FILE
    if state_dir is not None:
        raise InvalidInput("a key is that of --config or that of --state-dir, not of both")
    from ..config import load_party_config

    return load_party_config(config, name=name).keys.signing_key


def _read(file: Path) -> bytes:
    from ..errors import LimitError, NotFoundError

    if str(file) == _STDIN:
        data = sys.stdin.buffer.read(MAX_ARTIFACT_BYTES + 1)
    else:
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_ARTIFACT_BYTES + 1)
        except OSError as error:
            raise NotFoundError(f"the artifact {file} cannot be read: {error.strerror}") from error
    if len(data) > MAX_ARTIFACT_BYTES:
        raise LimitError(f"an artifact has at most {MAX_ARTIFACT_BYTES} bytes", limit=MAX_ARTIFACT_BYTES)
    return data


def _key(text: str | None) -> bytes | None:
    from ..errors import InvalidInput

    if text is None:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise InvalidInput("--verify-key is not 64 hex digits", violations={"--verify-key": "must be 64 hex digits"})
    return key
