"""Provisioning: whole kits or none, secrets for their owner alone, and kits that fit together."""

from __future__ import annotations

import json
import os
import shutil
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store
from pydantic import BaseModel

from src.aggregator.federation import open_federation
from src.config import AggregatorConfig, PartyConfig, load_aggregator_config, load_client_config, load_party_config
from src.config_sections import DatasetSection
from src.config_yaml import parse_yaml, read_document
from src.encryption.keys import KeyShare, ThresholdKey, check_kit
from src.errors import ConfigError, SignatureError
from src.party.home import Home
from src.protocol.roster import load_roster
from src.protocol.signing import SigningKey
from src.provisioning import Summary, provision
from src.provisioning.certificates import VALID_DAYS, Authority

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"modulus_bits": 512, "insecure_small": True, "processes": 1}
PARTIES = ("a", "b", "hospital-c")


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Made where files are for everybody, if nothing else is said of them."""
    out = tmp_path_factory.mktemp("provision") / "kits"
    wish = {"parties": PARTIES, "address": "fl.example.org:443", "scientists": ("scientist", "eve"), **SMALL}
    before = os.umask(0)
    try:
        return provision(out, federation="demo", **wish)
    finally:
        os.umask(before)


def certificate(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "tls/cert.pem").read_bytes())


# ------------------------------------------------------------------------------------------------ what lies in them


def test_every_kit_has_what_its_role_needs_and_nothing_else(kits: Summary) -> None:
    found = {
        kit.name: sorted(path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file())
        for kit in sorted(kits.out.iterdir())
    }
    tls = ["tls/ca.pem", "tls/cert.pem", "tls/key.pem"]
    party = ["party.yaml", "public_key.json", "roster.json", "share.json", "signing.key", *tls]
    assert found == {
        "aggregator": ["aggregator.yaml", "public_key.json", "roster.json", "signing.key", *tls],
        "operator": ["ca/ca-key.pem", "ca/ca.pem", "client.yaml", "roster.json", "signing.key", *tls],
        "party-a": party,
        "party-b": party,
        "party-hospital-c": party,
        "scientist": ["client.yaml", "roster.json", "signing.key", *tls],
        "scientist-eve": ["client.yaml", "roster.json", "signing.key", *tls],
    }


def test_every_configuration_loads_as_it_lies_there(kits: Summary) -> None:
    aggregator = load_aggregator_config(kits.out / "aggregator/aggregator.yaml", environ={})
    assert aggregator.server.listen == "0.0.0.0:443"  # the parties dial another host than this one
    assert aggregator.keys.roster == kits.out / "aggregator/roster.json"
    assert aggregator.evaluation == {"randhie": {"seed": 0}}
    for index, name in enumerate(PARTIES):
        party = load_party_config(kits.out / f"party-{name}/party.yaml", environ={})
        assert (party.name, party.server.address) == (name, "fl.example.org:443")
        assert party.state_dir == kits.out / f"party-{name}/state"
        assert party.datasets["randhie"].options == {"party": index, "parties": 3, "seed": 0}
    assert load_client_config(kits.out / "scientist-eve/client.yaml", environ={}).name == "eve"
    assert load_client_config(kits.out / "operator/client.yaml", environ={}).role == "operator"


def test_every_setting_in_a_kit_is_explained(kits: Summary) -> None:
    lines = (kits.out / "party-a/party.yaml").read_text().splitlines()
    free = {"randhie", "party", "parties", "seed"}  # names of tasks and of their options
    for number, line in enumerate(lines):
        key = line.strip().partition(":")[0]
        if ":" in line and not line.lstrip().startswith("#") and key not in free:
            assert lines[number - 1].lstrip().startswith("#"), line


@pytest.mark.parametrize("role", ["aggregator", "party"])
def test_a_kit_shows_settings_that_are_null_unless_said_otherwise(kits: Summary, role: str) -> None:
    model: type[BaseModel] = AggregatorConfig if role == "aggregator" else PartyConfig
    kit = {"aggregator": "aggregator", "party": "party-a"}[role]
    written = read_document(kits.out / kit / f"{role}.yaml")

    def missing(section: type[BaseModel], values: dict[str, Any], where: str) -> list[str]:
        found = [f"{where}{name}" for name in section.model_fields if name not in values]
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(values.get(name), dict):
                found += missing(inner, values[name], f"{where}{name}.")
        return found

    of_custody_aggregator = {"keys.modulus_bits", "keys.private_key"}
    assert set(missing(model, written, "")) <= of_custody_aggregator
    if role == "party":
        assert set(written["datasets"]["randhie"]) == set(DatasetSection.model_fields)


def test_a_party_trains_for_users_with_its_kit_as_the_shipped_file_does(kits: Summary) -> None:
    shipped = load_party_config(ROOT / "config/party.yaml", environ={}).privacy.budgets
    made = load_party_config(kits.out / "party-a/party.yaml", environ={}).privacy.budgets
    assert (made.default_user_epsilon, made.default_user_delta) == (
        shipped.default_user_epsilon,
        shipped.default_user_delta,
    )
    assert made.default_user_epsilon is not None


def test_the_certificate_of_another_party_is_noticed_at_the_start(kits: Summary, tmp_path: Path) -> None:
    kit = shutil.copytree(kits.out / "party-a", tmp_path / "kit")
    Home(load_party_config(kit / "party.yaml", environ={}))
    shutil.copytree(kits.out / "party-b/tls", kit / "tls", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="contradict") as caught:
        Home(load_party_config(kit / "party.yaml", environ={}))
    assert caught.value.problems == ("server.tls.certificate: is party/b's of demo, not party/a's of this federation",)
    shutil.copytree(kits.out / "aggregator/tls", kit / "tls", dirs_exist_ok=True)
    with pytest.raises(ConfigError) as caught:
        Home(load_party_config(kit / "party.yaml", environ={}))
    assert "is aggregator/aggregator's" in caught.value.problems[0]


def test_every_kit_pins_the_same_roster_signed_by_the_operator(kits: Summary) -> None:
    operator = SigningKey.load(kits.out / "operator/signing.key").verify_key
    for kit in kits.out.iterdir():
        signed, roster = load_roster(kit / "roster.json")
        assert signed.signer == "operator"
        assert json.loads((kit / "roster.json").read_text())["operator_verify_key"] == operator.hex()
        assert roster.digest == kits.roster_digest
    assert (roster.federation, roster.custody, roster.threshold, roster.key_id) == ("demo", "threshold", 2, kits.key_id)
    assert roster.names == PARTIES
    assert [member.share_index for member in roster.members] == [1, 2, 3]
    for name in PARTIES:
        assert roster.verify_key(name) == SigningKey.load(kits.out / f"party-{name}/signing.key").verify_key
    assert roster.aggregator_verify_key == SigningKey.load(kits.out / "aggregator/signing.key").verify_key


def test_a_changed_roster_is_noticed(kits: Summary, tmp_path: Path) -> None:
    text = (kits.out / "party-a/roster.json").read_text().replace("hospital-c", "hospital-d")
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(SignatureError):
        load_roster(tmp_path / "roster.json")


def _start(role: str, kit: Path) -> None:
    if role == "aggregator":
        open_federation(load_aggregator_config(kit / "aggregator.yaml", environ={}), now=0)
    else:
        Home(load_party_config(kit / "party.yaml", environ={}))


VERIFICATION: dict[str, Any] = {
    "v": lambda key: {"v": key["verification"][0]},
    "the value of another holder": lambda key: {"verification": [*key["verification"][:2], key["v"]]},
    "one's own value": lambda key: {"verification": [key["v"], *key["verification"][1:]]},
    "the order of the values": lambda key: {"verification": key["verification"][::-1]},
    "how many are needed": lambda key: {"threshold": 3},
}


@pytest.mark.parametrize("what", VERIFICATION)
def test_what_shares_are_verified_with_is_what_the_operator_signed_for(
    kits: Summary, tmp_path: Path, what: str
) -> None:
    """In a party's kit and in the aggregator's; the key id stays the same with all of it."""
    for role in ("party-a", "aggregator"):
        kit = shutil.copytree(kits.out / role, tmp_path / role)
        key = json.loads((kit / "public_key.json").read_text())
        changed = {**key, **VERIFICATION[what](key)}
        (kit / "public_key.json").write_text(json.dumps(changed))
        assert ThresholdKey.from_json(changed, insecure_small=True).key_id == kits.key_id
        with pytest.raises(ConfigError) as caught:
            _start(role, kit)
        expected = "keys.public_key: the verification values of its key are not those that the roster was signed for"
        assert expected in caught.value.problems


def test_every_share_is_the_one_that_the_public_values_commit_to(kits: Summary) -> None:
    for index, name in enumerate(PARTIES, start=1):
        kit = kits.out / f"party-{name}"
        key = ThresholdKey.from_json(json.loads((kit / "public_key.json").read_text()), insecure_small=True)
        share = KeyShare.from_json(json.loads((kit / "share.json").read_text()))
        assert (share.index, key.key_id, key.threshold) == (index, kits.key_id, 2)
        check_kit(key, share)


def test_the_aggregator_and_the_scientists_get_no_share_and_no_authority(kits: Summary) -> None:
    values = [json.loads(path.read_text())["value"] for path in kits.out.rglob("share.json")]
    authority = (kits.out / "operator/ca/ca-key.pem").read_bytes()
    assert len(set(values)) == 3
    for path in kits.out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert (authority in content) == (path.name == "ca-key.pem")
            assert sum(value.encode() in content for value in values) == (path.name == "share.json")


def test_who_may_order_jobs_stands_in_the_roster_with_a_key_that_lies_in_no_other_kit(kits: Summary) -> None:
    """The operator signs jobs with the key that signs the roster: it has one already."""
    _, roster = load_roster(kits.out / "aggregator/roster.json")
    assert [each.name for each in roster.scientists] == ["scientist", "eve", "operator"]
    for scientist in roster.scientists:
        kit = {"eve": "scientist-eve"}.get(scientist.name, scientist.name)
        config = load_client_config(kits.out / kit / "client.yaml", environ={})
        assert config.keys.signing_key is not None
        assert config.name == scientist.name
        assert SigningKey.load(config.keys.signing_key).verify_key == scientist.verify_key
    keys = [path.read_bytes() for path in kits.out.rglob("signing.key")]
    assert len(set(keys)) == len(keys) == 7


def test_a_scientist_may_be_called_as_a_party_is(tmp_path: Path) -> None:
    made = provision(tmp_path / "kits", federation="demo", parties=("a", "b"), scientists=("a",), **SMALL)
    _, roster = load_roster(made.out / "party-a/roster.json")
    assert roster.scientist("a").verify_key != roster.verify_key("a")


def test_no_secret_is_in_what_is_printed(kits: Summary) -> None:
    printed = json.dumps(kits.to_json()) + repr(kits) + repr(Authority("demo").certificate)
    for path in kits.out.rglob("share.json"):
        assert json.loads(path.read_text())["value"] not in printed
    assert "PRIVATE" not in printed


def test_secrets_are_readable_by_their_owner_alone(kits: Summary) -> None:
    secret = {"key.pem", "ca-key.pem", "signing.key", "share.json"}
    for path in (kits.out, *kits.out.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.name in secret else mode & 0o666), path


# ----------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize(
    ("kit", "identity"),
    [
        ("party-hospital-c", "party/hospital-c"),
        ("scientist-eve", "scientist/eve"),
        ("scientist", "scientist/scientist"),
        ("operator", "operator/operator"),
    ],
)
def test_a_client_certificate_says_who_it_is_and_verifies(kits: Summary, kit: str, identity: str) -> None:
    leaf = certificate(kits.out / kit)
    authority = x509.load_pem_x509_certificate((kits.out / kit / "tls/ca.pem").read_bytes())
    verified = PolicyBuilder().store(Store([authority])).build_client_verifier().verify(leaf, [])
    assert verified.subjects == [x509.UniformResourceIdentifier(f"spiffe://demo/{identity}")]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize(
    "subject", [x509.DNSName("localhost"), x509.DNSName("fl.example.org"), x509.IPAddress(IPv4Address("127.0.0.1"))]
)
def test_the_servers_certificate_is_good_for_every_way_to_dial_it(kits: Summary, subject: Any) -> None:
    leaf = certificate(kits.out / "aggregator")
    authority = x509.load_pem_x509_certificate((kits.out / "party-a/tls/ca.pem").read_bytes())
    PolicyBuilder().store(Store([authority])).build_server_verifier(subject).verify(leaf, [])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://demo/aggregator/aggregator"]


def test_certificates_are_valid_for_825_days_from_a_bit_ago(kits: Summary) -> None:
    now = datetime.now(UTC)
    for kit in kits.out.iterdir():
        leaf = certificate(kit)
        assert timedelta(minutes=30) < now - leaf.not_valid_before_utc < timedelta(hours=2)
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=VALID_DAYS)
        key = load_pem_private_key((kit / "tls/key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.public_key() == leaf.public_key()


def test_another_federations_authority_vouches_for_nobody_here(kits: Summary) -> None:
    other = x509.load_pem_x509_certificate(Authority("demo").certificate.pem)
    verifier = PolicyBuilder().store(Store([other])).build_client_verifier()
    with pytest.raises(x509.verification.VerificationError):
        verifier.verify(certificate(kits.out / "party-a"), [])


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parties": ("a", "B")}, "party: must be a lower-case letter, then up to 31"),
        ({"parties": ("a", "b" * 33)}, "party: must be a lower-case letter, then up to 31"),
        ({"parties": ("a", "../b")}, "party: must be a lower-case letter, then up to 31"),
        ({"parties": ("a", "b\n")}, "party: must be a lower-case letter, then up to 31"),
        ({"parties": ("a", "aggregator")}, "party: 'aggregator' is reserved"),
        ({"parties": ("a", "operator")}, "party: 'operator' is reserved"),
        ({"parties": ("a", "b", "a")}, "party: 'a' is named 2 times"),
        ({"parties": ("a",)}, "party: a federation has at least 2 (got 1)"),
        ({"scientists": ("Eve",)}, "scientist: must be a lower-case letter"),
        ({"federation": "De mo"}, "federation: must be a lower-case letter"),
        ({"threshold": 1}, "threshold: 1 would let one holder open alone"),
        ({"threshold": 4}, "threshold: 4 is more than the 3 holders"),
        ({"threshold": 2, "colluders": 1}, "threshold: 2 is refused: 2·threshold > parties + colluders"),
        ({"parties": tuple("abcd"), "threshold": 2}, "threshold: 2 is refused: 2·threshold > parties + colluders"),
        ({"colluders": -1}, "colluders: must be >= 0 and < 3"),
        ({"colluders": 3}, "colluders: must be >= 0 and < 3"),
        ({"modulus_bits": 1024, "insecure_small": False}, "modulus_bits: 1024 bits are too short"),
        ({"modulus_bits": 1000}, "modulus_bits: 1000 is not a multiple of 64"),
        ({"custody": "mine"}, "custody: must be 'threshold' or 'aggregator' (got 'mine')"),
        ({"custody": "aggregator", "threshold": 2}, "threshold: with custody aggregator there are no shares"),
        ({"address": "nowhere"}, "address: must be host:port"),
        ({"address": f"{'x' * 64}.org:1"}, "address: the host is not a name that DNS can have"),
    ],
)
def test_a_bad_request_makes_nothing_and_says_why(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    request = {"federation": "demo", "parties": ("a", "b", "c")} | SMALL | changes
    with pytest.raises(ConfigError) as caught:
        provision(tmp_path / "kits", **request)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        provision(tmp_path, federation="X", parties=("a", "A", "a"), threshold=1, address="", modulus_bits=1)
    assert len(caught.value.problems) == 6


def test_kits_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits/precious").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        provision(tmp_path / "kits", federation="demo", parties=("a", "b"), **SMALL)
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        provision(tmp_path / "kits/precious", federation="demo", parties=("a", "b"), **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["kits", "precious"]


def test_an_interrupted_provisioning_leaves_nothing_behind(tmp_path: Path) -> None:
    class Impatient(BaseException):
        pass

    def stop(line: str) -> None:
        if line == "writing the kits":
            raise Impatient

    with pytest.raises(Impatient):
        provision(tmp_path / "kits", federation="demo", parties=("a", "b"), progress=stop, **SMALL)
    # A value that no YAML can hold fails while the kits are being written.
    with pytest.raises(TypeError):
        provision(tmp_path / "kits", federation="demo", parties=("a", "b"), party_overrides={"x": {1, 2}}, **SMALL)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- other wishes


@pytest.mark.parametrize(
    ("count", "colluders", "threshold", "tolerated"),
    [(2, 0, 2, 1), (3, 0, 2, 0), (3, 1, 3, 2), (4, 0, 3, 1), (5, 1, 4, 2)],
)
def test_the_default_threshold_is_the_least_that_the_rule_allows(
    tmp_path: Path, count: int, colluders: int, threshold: int, tolerated: int
) -> None:
    made = provision(tmp_path / "kits", federation="demo", parties="abcde"[:count], colluders=colluders, **SMALL)
    assert (made.threshold, made.tolerated_colluders) == (threshold, tolerated)
    assert load_roster(tmp_path / "kits/aggregator/roster.json")[1].colluders == colluders
    assert load_party_config(tmp_path / "kits/party-a/party.yaml", environ={}).privacy.colluders == colluders


def test_custody_aggregator_deals_no_shares(tmp_path: Path) -> None:
    made = provision(tmp_path / "kits", federation="demo", parties=("a", "b"), custody="aggregator")
    assert (made.threshold, made.tolerated_colluders, made.key_id) == (0, None, "")
    assert not list(made.out.rglob("share.json")) + list(made.out.rglob("public_key.json"))
    aggregator = load_aggregator_config(made.out / "aggregator/aggregator.yaml", environ={})
    assert (aggregator.keys.custody, aggregator.keys.modulus_bits) == ("aggregator", 3072)
    assert aggregator.keys.private_key == made.out / "aggregator/state/private_key.json"
    party = load_party_config(made.out / "party-b/party.yaml", environ={})
    assert (party.keys.share, party.keys.signing_key) == (None, made.out / "party-b/signing.key")


def test_overrides_are_laid_over_the_written_configurations(tmp_path: Path) -> None:
    made = provision(
        tmp_path / "kits",
        federation="demo",
        parties=("a", "b"),
        aggregator_overrides={"server": {"listen": "127.0.0.1:0", "address_file": tmp_path / "address"}},
        party_overrides={
            "privacy": {"budgets": {"example": {"epsilon": 8.5}}},
            "datasets": {"iris": {"declared_rows": 5}},
        },
        **SMALL,
    )
    server = load_aggregator_config(made.out / "aggregator/aggregator.yaml", environ={}).server
    assert (server.listen, server.address_file) == ("127.0.0.1:0", tmp_path / "address")
    party = load_party_config(made.out / "party-b/party.yaml", environ={})
    assert (party.privacy.budgets.example.epsilon, party.privacy.budgets.party.max_rounds) == (8.5, 10_000)
    assert sorted(party.datasets) == ["iris", "randhie"]


def test_an_override_that_no_configuration_has_is_named_when_the_kit_is_used(tmp_path: Path) -> None:
    provision(tmp_path / "kits", federation="demo", parties=("a", "b"), party_overrides={"polcy": {"x": 1}}, **SMALL)
    with pytest.raises(ConfigError, match="polcy: unknown key; did you mean 'policy'"):
        load_party_config(tmp_path / "kits/party-a/party.yaml", environ={})


def test_many_parties_fit_the_aggregators_limit_and_bring_no_demonstration_data(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(101)]
    made = provision(tmp_path / "kits", federation="demo", parties=names, custody="aggregator")
    config, complaints = parse_yaml((made.out / "aggregator/aggregator.yaml").read_text())
    assert (config["limits"]["max_parties"], complaints) == (101, [])
    assert load_party_config(made.out / "party-p7/party.yaml", environ={}).datasets == {}
