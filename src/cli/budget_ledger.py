"""`sotto budget history | export | verify`: the entries of a ledger, out of its database and after that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from .budget_source import (
    AsJson,
    ConfigFile,
    PartyName,
    StateDir,
    SubjectOption,
    UnitOption,
    as_entered,
    asked_for,
    head_of,
    load,
    read_entries,
    verify_key_of,
)
from .prose import counted, say
from .screen import echo, echo_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..errors import LedgerError
    from ..privacy.ledger import Entry
    from .budget_source import Source

WORTH_SEEING = 50
"""Entries that `history` shows unless asked for more."""
CUT_OFF = (
    "whether its end was cut off was not checked: such a ledger is whole in itself. Only a head that was recorded "
    "elsewhere (a manifest, a transcript, what `sotto budget show` said) finds it: --head"
)
HANG = " " * 7
"""Before the further lines of an entry: as wide as its number."""


def history(
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    unit: UnitOption = None,
    subject: SubjectOption = None,
    job: Annotated[str | None, typer.Option("--job", help="Of this job only.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="reservation, final, release, refusal, …")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many.")] = WORTH_SEEING,
    as_json: AsJson = False,
) -> None:
    """The ledger's entries, oldest first. Reads beside the running role and writes nothing."""
    source = load(config, name=name, state_dir=state_dir)
    entries, subject = read_entries(source), as_entered(source, subject)
    job = job and (as_entered(source, f"job:{job}") or "").removeprefix("job:")
    asked_for(source, entries, unit=unit, subject=subject)
    if job is not None:
        asked_for(source, entries, unit=unit, subject=f"job:{job}")
    _check_kind(kind)
    found = [
        entry
        for entry in entries
        if _asked(entry, unit=unit, subject=subject) and job in (None, entry.job_id) and kind in (None, entry.kind)
    ]
    shown = found[-limit:]
    if as_json:
        body = {
            "role": source.role,
            "head": head_of(entries),
            "found": len(found),
            "entries": [as_object(entry) for entry in shown],
        }
        echo_json(body)
        return
    for entry in shown:
        say(describe(entry), hang=HANG)
    if entries and not found:
        say("no entry is all that was asked for")
    earlier = f"; the {len(shown)} newest of {len(found)}: --limit shows more" if len(shown) < len(found) else ""
    say(f"{counted(len(entries), 'entry', 'entries')}, chain verified, head {head_of(entries)}{earlier}")


def _check_kind(kind: str | None) -> None:
    from ..errors import InvalidInput
    from ..privacy.entries import Kind

    known = ", ".join(get_args(Kind))
    if kind is not None and kind not in get_args(Kind):
        raise InvalidInput(f"--kind must be one of {known}", violations={"kind": known})


def _asked(entry: Entry, *, unit: str | None, subject: str | None) -> bool:
    from ..privacy.budget import concerns

    if subject is not None:
        return unit in (None, entry.unit) and concerns(entry, (entry.unit, subject))
    return unit in (None, entry.unit)


def as_object(entry: Entry) -> dict[str, Any]:
    """An entry as its line has it."""
    from ..privacy.ledger import to_line

    found: dict[str, Any] = json.loads(to_line(entry))
    return found


def describe(entry: Entry) -> str:
    """One paragraph for people: when, what, for whom."""
    where = f"job {entry.job_id}" if entry.job_id else ""
    where += f" round {entry.round}" if entry.round is not None else ""
    parts = [
        f"{entry.sequence:>5}  {entry.at[:19]}  {entry.kind:<15} {entry.unit:<7} {entry.subject}",
        f"user {entry.user}" if entry.user else "",
        f"ordered by {entry.scientist}" if entry.scientist else "",
        where.strip(),
        _mechanism(entry),
        " ".join(f"{figure}={_shown(value)}" for figure, value in entry.figures),
        f"{entry.correction.action}: {entry.correction.limit or 'a new accounting period'}" if entry.correction else "",
        json.dumps(entry.reason, ensure_ascii=False) if entry.reason else "",
    ]
    return "  ".join(part for part in parts if part)


def _mechanism(entry: Entry) -> str:
    from ..privacy.events import event_to_json

    if entry.event is None:
        return ""
    fields = {key: value for key, value in event_to_json(entry.event).items() if key not in {"type", "version"}}
    return f"{entry.event.type}({', '.join(f'{key}={_shown(value)}' for key, value in fields.items())})"


def _shown(value: object) -> object:
    """An infinity as people are shown it everywhere."""
    return "∞" if value in ("inf", float("inf")) else value


def export(
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new file; stdout if left out.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --out: print one JSON object. (Lines are JSON anyway.)")
    ] = False,
) -> None:
    """The whole ledger as JSON lines, which `sotto budget verify FILE` replays anywhere.

    Reads beside the running role and writes nothing to its database.
    """
    from ..errors import ConflictError
    from ..files import write_new
    from ..privacy.ledger import to_line

    entries = read_entries(load(config, name=name, state_dir=state_dir))
    text = "".join(f"{to_line(entry)}\n" for entry in entries)
    if out is None:
        echo(text.splitlines())
        return
    try:
        write_new(out, text.encode("ascii"), secret=True)
    except FileExistsError:
        raise ConflictError(f"{out} exists: an export does not overwrite") from None
    if as_json:
        echo_json({"file": str(out), "entries": len(entries), "head": head_of(entries)})
    else:
        say(f"{counted(len(entries), 'entry', 'entries')} in {out}, head {head_of(entries)}")


def verify(
    file: Annotated[Path | None, typer.Argument(help="What `sotto budget export` wrote.", show_default=False)] = None,
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    verify_key: Annotated[
        str | None, typer.Option("--verify-key", help="Who must have signed: 64 hex digits of an Ed25519 public key.")
    ] = None,
    roster: Annotated[
        Path | None, typer.Option("--roster", help="roster.json of a kit: the key of --signer is taken from it.")
    ] = None,
    signer: Annotated[
        str, typer.Option("--signer", help="With --roster: aggregator, or a party's name.")
    ] = "aggregator",
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="A head that was recorded elsewhere (manifest, transcript): must be in it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a ledger: its form, its chain, its rules, its signatures, and heads recorded elsewhere.

    Needs no server. The first bad entry is named, by its line. FILE by itself: signatures must hold, whoever made them;
    with --config or --state-dir they must be of the key that is found there.
    """
    from ..errors import LedgerError

    source = _source_of(file, config, name=name, state_dir=state_dir)
    key = _key(verify_key, roster, signer=signer) or (None if source is None else verify_key_of(source))
    heads = [_hex(each, "--head") for each in head or []]
    try:
        if file is not None:
            report = replay(_lines(file), key=key, heads=heads)
        elif source is not None:
            report = _verify_source(source, key=key, heads=heads)
    except LedgerError as error:
        if roster is not None and verify_key is None:
            _name_signer(error, roster)
        raise
    if as_json:
        echo_json(report)
        return
    say(f"{counted(report['entries'], 'entry', 'entries')}, chain verified, head {report['head']}")
    for line in _about_signatures(report):
        say(line)
    if heads:
        say(f"{counted(len(heads), 'head')} recorded elsewhere {'is' if len(heads) == 1 else 'are'} in it")
    else:
        say(CUT_OFF)


def _about_signatures(report: dict[str, Any]) -> list[str]:
    signed, old = report["signed"], report["version_1"]
    by = ", ".join(report["signed_by"]) or "nobody"
    lines = [f"{counted(signed, 'signature')} {'holds' if signed == 1 else 'hold'}, by {by}"]
    if not report["whose_is_checked"]:
        lines.append("whose key that is was not checked: say --config, --state-dir, --roster or --verify-key")
    if old:
        entries, carry = counted(old, "entry", "entries"), "carries" if old == 1 else "carry"
        lines.append(
            f"{entries} of version 1 {carry} no signature; a signed entry after that vouches for what was before"
        )
    if report["entries"] > old + signed or (old and not signed):
        lines.append("the last entry is not signed: compare the head with one that was recorded elsewhere (--head)")
    return lines


def replay(lines: Sequence[str | bytes], *, key: bytes | None, heads: list[str]) -> dict[str, Any]:
    """Verify the lines of a ledger, each in its turn by all there is to verify; what was found.

    Raises:
        LedgerError: names the first bad line, or says that a head is missing.
    """
    from ..privacy.ledger import verify_lines
    from ..protocol.ledger import Signatures

    signatures = Signatures([key] if key else [])
    entries = verify_lines(lines, known_heads=heads, judge=signatures)
    return _what_was_found(entries, signed=signatures.signed, key=key, heads=heads)


def _verify_source(source: Source, *, key: bytes | None, heads: list[str]) -> dict[str, Any]:
    """The same of the ledger in a role's database, its rows and lines."""
    from sqlalchemy import MetaData

    from ..protocol.ledger import Signatures
    from ..storage.database import read_only
    from ..storage.ledger import LedgerStore
    from ..storage.migrations import Migrations

    store, signatures = LedgerStore(MetaData()), Signatures([key] if key else [])
    with read_only(source.location, schema=Migrations(source.history)) as connection:
        store.verify(connection, known_heads=heads, judge=signatures)
        entries = store.entries(connection)
    return _what_was_found(entries, signed=signatures.signed, key=key, heads=heads)


def _what_was_found(entries: list[Entry], *, signed: int, key: bytes | None, heads: list[str]) -> dict[str, Any]:
    from ..protocol.ledger import signed_by

    return {
        "entries": len(entries),
        "head": head_of(entries),
        "signed": signed,
        "signed_by": list(signed_by(entries)),
        "whose_is_checked": key is not None,
        "version_1": sum(entry.version == 1 for entry in entries),
        "heads": heads,
    }


def _source_of(file: Path | None, config: Path | None, *, name: str | None, state_dir: Path | None) -> Source | None:
    """Whose ledger it is said to be; of a file by itself nobody's."""
    by_itself = file is not None and (config, name, state_dir) == (None, None, None)
    return None if by_itself else load(config, name=name, state_dir=state_dir)


def _lines(file: Path) -> list[bytes]:
    from ..errors import NotFoundError

    try:
        content = file.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{file} cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _key(verify_key: str | None, roster: Path | None, *, signer: str) -> bytes | None:
    from ..errors import NotFoundError
    from ..protocol.roster import load_roster

    if verify_key is not None:
        return bytes.fromhex(_hex(verify_key, "--verify-key"))
    if roster is None:
        return None
    if not roster.is_file():
        raise NotFoundError(f"there is no file {roster}")
    _, found = load_roster(roster)
    return found.verify_key(signer)


def _name_signer(error: LedgerError, roster: Path) -> None:
    """Raise the same, saying whose the key of an unexpected signature is, if it is of somebody in the roster."""
    from ..errors import LedgerError
    from ..protocol.roster import AGGREGATOR, load_roster

    _, found = load_roster(roster)
    for name in (AGGREGATOR, *found.names):
        if found.verify_key(name).hex() == error.metadata.get("verify_key"):
            raise LedgerError(f"{error.message}, that of {name}: --signer {name}", **error.metadata) from error


def _hex(text: str, option: str) -> str:
    from ..errors import InvalidInput

    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise InvalidInput(f"{option} must be 64 hex digits, in lower case", violations={option: "64 hex digits"})
    return text
