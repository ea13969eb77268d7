"""Provisioning: certificates, signing keys, the roster and the key shares of a federation, as one kit for each node.

Done once, by the operator, anywhere but on the aggregator. The primes live in this process's memory only and are
forgotten when it ends: with custody `threshold` nobody holds the private key afterwards. That the operator's machine
was honest while this ran is an assumption of the whole system.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ..config import AggregatorConfig, ClientConfig, PartyConfig
from ..config_sections import (
    DEFAULT_ADDRESS,
    DEFAULT_MODULUS_BITS,
    NAME_PATTERN,
    NAME_RULE,
    RESERVED_NAMES,
    split_address,
)
from ..encryption.dealer import check_threshold, deal, default_threshold
from ..encryption.keys import KeyShare, ThresholdKey, check_modulus_bits
from ..encryption.primes import generate_safe_primes
from ..errors import ConfigError, KeyMaterialError
from ..files import make_private_directory, write_new
from ..privacy.entropy import SystemEntropy
from ..protocol.roster import AGGREGATOR, OPERATOR, Member, Roster, Scientist, save_roster, sign_roster
from ..protocol.signing import Signed, SigningKey
from . import kits
from .certificates import VALID_DAYS, Authority

THRESHOLD_RULE: Final = (
    "2·threshold > parties + colluders: otherwise two disjoint groups could open two sums that differ by one party"
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """One directory, who gets it, whether it holds secrets of the whole federation, and how it is used."""

    path: Path
    recipient: str
    use: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was made.

    Attributes:
        out: the directory of all kits.
        federation, parties, custody, modulus_bits: as asked for.
        threshold: shares that an opening needs; 0 with custody `aggregator`.
        colluders: corrupt parties that were asked to be tolerated, besides the aggregator.
        tolerated_colluders: the most that `threshold` stands at any quorum; None with custody `aggregator`.
        key_id: of the Paillier key; empty with custody `aggregator`, which makes its key at first start.
        roster_digest: SHA-256 (hex) of the roster in every kit.
        valid_days: of the certificates.
        kits: the aggregator's, the parties', the operator's, the scientists'.
    """

    out: Path
    federation: str
    parties: tuple[str, ...]
    custody: str
    modulus_bits: int
    threshold: int
    colluders: int
    tolerated_colluders: int | None
    key_id: str
    roster_digest: str
    valid_days: int
    kits: tuple[Kit, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; no secrets."""
        value = {name: getattr(self, name) for name in Summary.__slots__ if name not in {"out", "kits", "parties"}}
        kits_json = [{"path": str(kit.path), "recipient": kit.recipient, "use": kit.use} for kit in self.kits]
        return value | {"out": str(self.out), "parties": list(self.parties), "kits": kits_json}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What was asked for, checked."""

    federation: str
    parties: tuple[str, ...]
    scientists: tuple[str, ...]
    custody: str
    threshold: int
    colluders: int
    modulus_bits: int
    insecure_small: bool
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deal:
    """What is dealt out: in memory only until it lies in the kits."""

    key: ThresholdKey | None
    shares: Mapping[str, KeyShare]
    authority: Authority
    signing: Mapping[str, SigningKey]
    scientists: Mapping[str, SigningKey]
    roster: Roster
    signed: Signed


def provision(
    out: Path,
    *,
    federation: str,
    parties: Sequence[str],
    threshold: int | None = None,
    colluders: int = 0,
    custody: str = "threshold",
    modulus_bits: int = DEFAULT_MODULUS_BITS,
    insecure_small: bool = False,
    address: str = DEFAULT_ADDRESS,
    scientists: Sequence[str] = ("scientist",),
    processes: int | None = None,
    progress: Progress | None = None,
    aggregator_overrides: Mapping[str, Any] | None = None,
    party_overrides: Mapping[str, Any] | None = None,
) -> Summary:
    """Make all kits of a federation under `out`, or nothing.

    Args:
        out: a directory that does not exist or is empty.
        federation: its name.
        parties: their names, which become certificates and share holders in this order.
        threshold: shares that an opening needs; by default max(2, ⌊n/2⌋ + 1), or more where `colluders` asks for it.
        colluders: corrupt parties to stand, besides the aggregator.
        custody: "threshold", or "aggregator": then nothing is dealt and the aggregator makes the key at first start.
        modulus_bits: of the Paillier key.
        insecure_small: for tests: allow less than 2048 bits.
        address: host:port under which everybody will dial the aggregator.
        scientists: a client kit for each.
        processes: for the search for primes; by default one per CPU.
        progress: told in words what is being done.
        aggregator_overrides, party_overrides: nested values laid over the configurations that are written.

    Raises:
        ConfigError: every problem with what was asked for.
    """
    request = _check(
        out,
        _Request(
            federation=federation,
            parties=tuple(parties),
            scientists=tuple(scientists),
            custody=custody,
            threshold=_threshold(custody, threshold, len(parties), colluders),
            colluders=colluders,
            modulus_bits=modulus_bits,
            insecure_small=insecure_small,
            address=address,
        ),
    )
    tell = progress or _silent
    dealt = _deal(request, processes=processes or os.cpu_count() or 1, tell=tell)
    tell("writing the kits")
    out = out.absolute()
    made = _write_all(out, request, dealt, aggregator=aggregator_overrides or {}, party=party_overrides or {})
    return _summary(out, request, dealt, made)


def _summary(out: Path, request: _Request, dealt: _Deal, made: list[tuple[str, str, str]]) -> Summary:
    """Of what `_write` returned."""
    return Summary(
        out=out,
        federation=request.federation,
        parties=request.parties,
        custody=request.custody,
        modulus_bits=request.modulus_bits,
        threshold=request.threshold,
        colluders=request.colluders,
        tolerated_colluders=2 * request.threshold - len(request.parties) - 1 if dealt.key else None,
        key_id=dealt.roster.key_id,
        roster_digest=dealt.roster.digest,
        valid_days=VALID_DAYS,
        kits=tuple(Kit(path=out / name, recipient=recipient, use=use) for name, recipient, use in made),
    )


def _silent(_: str) -> None:
    """Tells nobody."""


def _threshold(custody: str, threshold: int | None, parties: int, colluders: int) -> int:
    """What was asked for, or the least that the rule allows."""
    if threshold is not None:
        return threshold
    return 0 if custody == "aggregator" else max(default_threshold(parties), (parties + max(colluders, 0)) // 2 + 1)


def _check(out: Path, request: _Request) -> _Request:
    """`request`, or one error with everything that is wrong with it."""
    problems = [*_name_problems(request), *_number_problems(request)]
    try:
        split_address(request.address)[0].encode("idna")
    except UnicodeError:
        problems.append("address: the host is not a name that DNS can have")
    except ValueError as error:
        problems.append(f"address: {error}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"out: {out} exists and is not an empty directory; kits are never overwritten")
    if problems:
        raise ConfigError("the kits cannot be made: " + "; ".join(problems), problems=tuple(problems))
    return request


def _name_problems(request: _Request) -> list[str]:
    problems = []
    if not NAME_PATTERN.fullmatch(request.federation):
        problems.append(f"federation: must be {NAME_RULE} (got {request.federation!r})")
    for kind, names in (("party", request.parties), ("scientist", request.scientists)):
        for name in dict.fromkeys(names):
            if not NAME_PATTERN.fullmatch(name):
                problems.append(f"{kind}: must be {NAME_RULE} (got {name!r})")
            elif name in RESERVED_NAMES:
                problems.append(f"{kind}: {name!r} is reserved")
            if names.count(name) > 1:
                problems.append(f"{kind}: {name!r} is named {names.count(name)} times")
    return problems


def _number_problems(request: _Request) -> list[str]:
    problems = []
    count = len(request.parties)
    if count < 2:
        problems.append(f"party: a federation has at least 2 (got {count})")
    elif not 0 <= request.colluders < count:
        problems.append(f"colluders: must be >= 0 and < {count}, the number of parties (got {request.colluders})")
    elif request.custody == "threshold":
        try:
            # The least quorum that is not everybody: the rule then has to hold by the threshold alone.
            check_threshold(request.threshold, count, colluders=request.colluders, quorum=count - 1, parties=count)
        except KeyMaterialError as error:
            least = (count + request.colluders) // 2 + 1
            advice = f"at least {least} of {count} shares" if least <= count else "fewer colluders"
            rule = f"threshold: {request.threshold} is refused: {THRESHOLD_RULE}; needed: {advice}"
            problems.append(rule if "quorum" in error.message else error.message)
    if request.custody == "aggregator" and request.threshold:
        problems.append("threshold: with custody aggregator there are no shares")
    if request.custody not in ("threshold", "aggregator"):
        problems.append(f"custody: must be 'threshold' or 'aggregator' (got {request.custody!r})")
    try:
        check_modulus_bits(request.modulus_bits, insecure_small=request.insecure_small)
    except KeyMaterialError as error:
        problems.append(error.message)
    return problems


def _deal(request: _Request, *, processes: int, tell: Progress) -> _Deal:
    key: ThresholdKey | None = None
    shares: dict[str, KeyShare] = {}
    if request.custody == "threshold":
        entropy = SystemEntropy()
        tell(f"searching two safe primes of {request.modulus_bits // 2} bits")
        primes = generate_safe_primes(request.modulus_bits, entropy=entropy, processes=processes, progress=tell)
        tell(f"dealing {len(request.parties)} key shares, any {request.threshold} of which open a sum")
        key, dealt = deal(*primes, threshold=request.threshold, holders=len(request.parties), entropy=entropy)
        shares = dict(zip(request.parties, dealt, strict=True))
    signing = {name: SigningKey.generate() for name in (AGGREGATOR, OPERATOR, *request.parties)}
    scientists = {name: SigningKey.generate() for name in request.scientists}  # one may be called as a party is
    roster = Roster(
        federation=request.federation,
        key_id=key.key_id if key else "",
        custody=request.custody,
        threshold=request.threshold,
        colluders=request.colluders,
        aggregator_verify_key=signing[AGGREGATOR].verify_key,
        members=tuple(
            Member(name, signing[name].verify_key, shares[name].index if name in shares else 0)
            for name in request.parties
        ),
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        scientists=tuple(
            Scientist(name, key.verify_key) for name, key in {**scientists, OPERATOR: signing[OPERATOR]}.items()
        ),
        deal_digest=key.digest if key else "",
    )
    return _Deal(
        key=key,
        shares=shares,
        authority=Authority(request.federation),
        signing=signing,
        scientists=scientists,
        roster=roster,
        signed=sign_roster(roster, signing[OPERATOR]),
    )


def _write_all(
    out: Path, request: _Request, dealt: _Deal, *, aggregator: Mapping[str, Any], party: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """`_write` into `out`, or nothing: made beside it, and renamed once all is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))  # mode 0700
    try:
        made = _write(place, request, dealt, aggregator=aggregator, party=party)
        place.rename(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return made


def _write(
    place: Path, request: _Request, dealt: _Deal, *, aggregator: Mapping[str, Any], party: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Every kit; returns (directory, who gets it, how it is used)."""
    made = [_write_aggregator(place, request, dealt, overrides=aggregator)]
    made += [_write_party(place, request, dealt, name=name, overrides=party) for name in request.parties]
    made.append(_write_operator(place, request, dealt))
    made += [_write_client(place, request, dealt, role="scientist", name=name) for name in request.scientists]
    return made


def _start_kit(place: Path, name: str, dealt: _Deal) -> Path:
    """A directory with what every kit has: the pinned roster."""
    kit = make_private_directory(place / name)
    save_roster(kit / "roster.json", dealt.signed, operator_verify_key=dealt.signing[OPERATOR].verify_key)
    return kit


def _write_aggregator(
    place: Path, request: _Request, dealt: _Deal, *, overrides: Mapping[str, Any]
) -> tuple[str, str, str]:
    kit = _start_kit(place, AGGREGATOR, dealt)
    host = split_address(request.address)[0]
    kits.write_tls(kit, dealt.authority.server(AGGREGATOR, hosts=[host]), authority=dealt.authority.certificate)
    dealt.signing[AGGREGATOR].save(kit / "signing.key")
    if dealt.key:
        kits.write_json(kit / "public_key.json", dealt.key.to_json(), secret=False)
    values = kits.aggregator_values(
        request.federation,
        request.address,
        custody=request.custody,
        colluders=request.colluders,
        modulus_bits=request.modulus_bits,
        small=request.insecure_small,
        parties=len(request.parties),
    )
    text = kits.render(AggregatorConfig, kits.merge(values, overrides))
    write_new(kit / "aggregator.yaml", text.encode(), secret=False)
    return kit.name, "the aggregator's machine", "sotto aggregator --config aggregator.yaml"


def _write_party(
    place: Path, request: _Request, dealt: _Deal, *, name: str, overrides: Mapping[str, Any]
) -> tuple[str, str, str]:
    kit = _start_kit(place, f"party-{name}", dealt)
    kits.write_tls(kit, dealt.authority.client("party", name), authority=dealt.authority.certificate)
    dealt.signing[name].save(kit / "signing.key")
    if dealt.key:
        kits.write_json(kit / "public_key.json", dealt.key.to_json(), secret=False)
        kits.write_json(kit / "share.json", dealt.shares[name].to_json(), secret=True)
    values = kits.party_values(
        request.federation,
        request.address,
        names=request.parties,
        name=name,
        custody=request.custody,
        colluders=request.colluders,
        small=request.insecure_small,
    )
    text = kits.render(PartyConfig, kits.merge(values, overrides))
    write_new(kit / "party.yaml", text.encode(), secret=False)
    return kit.name, f"party {name}, and nobody else", "sotto party --config party.yaml"


def _write_operator(place: Path, request: _Request, dealt: _Deal) -> tuple[str, str, str]:
    kit_name, _, _ = _write_client(place, request, dealt, role=OPERATOR, name=OPERATOR)
    kit = place / kit_name
    authority = make_private_directory(kit / "ca")
    write_new(authority / "ca.pem", dealt.authority.certificate.pem, secret=False)
    write_new(authority / "ca-key.pem", dealt.authority.certificate.key_pem, secret=True)
    return kit_name, "the operator: keep it off line", "signs rosters and certificates of this federation"


def _write_client(place: Path, request: _Request, dealt: _Deal, *, role: str, name: str) -> tuple[str, str, str]:
    kit = _start_kit(place, role if name == role else f"{role}-{name}", dealt)
    kits.write_tls(kit, dealt.authority.client(role, name), authority=dealt.authority.certificate)
    (dealt.signing[OPERATOR] if role == OPERATOR else dealt.scientists[name]).save(kit / "signing.key")
    values = kits.client_values(request.federation, request.address, role=role, name=name)
    write_new(kit / "client.yaml", kits.render(ClientConfig, values).encode(), secret=False)
    return kit.name, f"{role} {name}", "sotto jobs submit --config client.yaml …"
