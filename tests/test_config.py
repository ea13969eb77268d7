"""Configuration: what is read, what is refused, and that every problem is told at once with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from src.config import AggregatorConfig, PartyConfig, load_aggregator_config, load_client_config, load_party_config
from src.config_sections import (
    AggregatorPolicy,
    AggregatorPrivacy,
    Budget,
    DatasetSection,
    JobQuotas,
    PartyBudgets,
    PartyPolicy,
    PartyPrivacy,
    is_loopback,
    split_address,
)
from src.config_yaml import parse_yaml, read_document
from src.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
AGGREGATOR = {
    "version": 1,
    "federation": "demo",
    "server": {"insecure": True},
    "keys": {"custody": "aggregator"},
}
PARTY = AGGREGATOR | {"name": "a"}


def write(path: Path, content: object) -> Path:
    """YAML text as it is, anything else as JSON (which is YAML)."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def aggregator(tmp_path: Path, content: object, **environ: str) -> AggregatorConfig:
    return load_aggregator_config(write(tmp_path / "aggregator.yaml", content), environ=environ)


def party(tmp_path: Path, content: object, *, name: str | None = None, **environ: str) -> PartyConfig:
    return load_party_config(write(tmp_path / "party.yaml", content), name=name, environ=environ)


def problems(tmp_path: Path, content: object, *, role: Any = aggregator, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        role(tmp_path, content, **environ)
    return list(caught.value.problems)


# ----------------------------------------------------------------------------------------------- what is shipped


def test_the_shipped_files_load_as_they_are() -> None:
    config = load_aggregator_config(ROOT / "config/aggregator.yaml", environ={})
    assert config.keys.custody == "aggregator"
    assert config.server.insecure
    assert config.server.tls is None
    assert config.state_dir == ROOT / "config/../var/aggregator"
    assert config.privacy.budget.delta == 1e-5
    assert config.keys.private_key == config.state_dir / "private_key.json"


def test_unsigned_jobs_are_taken_by_the_classic_set_up_and_by_nobody_else(tmp_path: Path) -> None:
    for load, shipped in ((load_aggregator_config, "aggregator"), (load_party_config, "party")):
        assert load(ROOT / f"config/{shipped}.yaml", environ={}).policy.allow_unsigned_jobs
    assert not aggregator(tmp_path, AGGREGATOR).policy.allow_unsigned_jobs
    assert not party(tmp_path, PARTY).policy.allow_unsigned_jobs


def test_the_shipped_files_show_every_setting_of_privacy_and_policy() -> None:
    shown = read_document(ROOT / "config/aggregator.yaml")
    assert set(shown["privacy"]) == set(AggregatorPrivacy.model_fields)
    assert set(shown["policy"]) == set(AggregatorPolicy.model_fields)
    shown = read_document(ROOT / "config/party.yaml")
    assert set(shown["policy"]) == set(PartyPolicy.model_fields)
    assert set(shown["privacy"]) == set(PartyPrivacy.model_fields)
    assert set(shown["privacy"]["budgets"]) == set(PartyBudgets.model_fields)
    assert set(shown["privacy"]["budgets"]["per_job"]) == set(JobQuotas.model_fields)
    assert set(shown["datasets"]["randhie"]) == set(DatasetSection.model_fields)


@pytest.mark.parametrize(("name", "index"), [("a", 0), ("b", 1), ("z", 25)])
def test_one_party_file_serves_several_parties(name: str, index: int) -> None:
    config = load_party_config(ROOT / "config/party.yaml", name=name, environ={})
    assert config.name == name
    assert config.state_dir == ROOT / f"config/../var/party-{name}"
    assert config.keys.signing_key == config.state_dir / "signing.key"
    assert config.datasets["randhie"].options == {"party": index, "parties": 3, "seed": 0}


def test_an_index_needs_a_one_letter_name(tmp_path: Path) -> None:
    dataset = {"randhie": {"declared_rows": 10, "options": {"party": "{index}", "file": "rows-{name}.csv"}}}
    with pytest.raises(ConfigError) as caught:
        party(tmp_path, PARTY | {"datasets": dataset}, name="hospital-b")
    assert caught.value.problems == (
        'datasets.randhie.options.party: "{index}" needs a one-letter name (a is 0); write the number',
    )
    assert party(tmp_path, PARTY | {"datasets": dataset}).datasets["randhie"].options["file"] == "rows-a.csv"


def test_options_may_be_lists_and_mappings_with_placeholders_in_them(tmp_path: Path) -> None:
    options = {
        "columns": {"age": {"mean": 41.5, "codes": ["a", "{name}", None]}, "sex": None},
        "tables": [{"file": "rows-{name}.csv", "party": "{index}"}, []],
    }
    found = party(tmp_path, PARTY | {"datasets": {"randhie": {"declared_rows": 10, "options": options}}}, name="c")
    assert found.datasets["randhie"].options == {
        "columns": {"age": {"mean": 41.5, "codes": ["a", "c", None]}, "sex": None},
        "tables": [{"file": "rows-c.csv", "party": 2}, []],
    }
    shared = aggregator(tmp_path, AGGREGATOR | {"evaluation": {"randhie": {"columns": {"age": {"mean": 1}}}}})
    assert shared.evaluation["randhie"] == {"columns": {"age": {"mean": 1}}}


@pytest.mark.parametrize("value", ["{index}", "[rows, {name}]", "{a: [{index}]}", "[" * 11 + "]" * 11])
def test_an_option_that_could_not_be_handed_on_as_it_is_gets_refused(tmp_path: Path, value: str) -> None:
    """Placeholders without quotes are mappings, for YAML."""
    text = json.dumps(PARTY)[:-1] + f', "datasets": {{"t": {{"declared_rows": 9, "options": {{"which": {value}}}}}}}}}'
    (found,) = problems(tmp_path, text, role=party)
    assert found.startswith("datasets.t.options.which: must be a text, a number, true, false, null, or lists and map")
    assert "at most 10 inside each other (placeholders need quotes" in found


def test_defaults_are_validated_and_placed_like_anything_written(tmp_path: Path) -> None:
    config = aggregator(tmp_path, AGGREGATOR)
    assert config.state_dir == tmp_path / "state"
    assert config.database_path == tmp_path / "state/aggregator.sqlite"
    assert config.blobs_dir == tmp_path / "state/blobs"
    assert config.keys.signing_key == tmp_path / "state/signing.key"
    assert (config.workers.size, config.privacy.budget.max_rounds, config.server.listen) == (
        3,
        10_000,
        "127.0.0.1:50051",
    )


def test_a_loaded_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = aggregator(tmp_path, AGGREGATOR)
    with pytest.raises(ValidationError):
        config.privacy.budget.delta = 0.5


# ------------------------------------------------------------------------------------------------- what is refused


def test_every_problem_is_told_at_once_with_its_path_and_what_is_allowed(tmp_path: Path) -> None:
    content = AGGREGATOR | {
        "fedration": "demo",
        "privacy": {"noise_by": "all", "budget": {"delta": 3, "delt": 0.1, "max_rounds": 0}},
        "server": {"insecure": True, "listen": "0.0.0.0:1"},
        "workers": 3,
        "logging": {"level": None},
    }
    assert problems(tmp_path, content) == [
        "server.insecure: must be false for 0.0.0.0:1: without TLS only localhost, 127.0.0.0/8 and [::1] are allowed",
        "privacy.noise_by: must be 'both' or 'parties' or 'aggregator' (got 'all')",
        "privacy.budget.max_rounds: must be >= 1 (got 0)",
        "privacy.budget.delta: must be > 0 and < 1 (got 3)",
        "privacy.budget.delt: unknown key; did you mean 'delta'?; allowed here: max_rounds, epsilon, delta",
        "workers: must be a section with the keys size, min_size, max_size, nice, recycle_after, "
        "idle_s, health_interval_s, memory_limit_mb, cpu_limit_s (got 3)",
        "logging.level: must be 'DEBUG' or 'INFO' or 'WARNING' or 'ERROR' (got null)",
        "fedration: unknown key; did you mean 'federation'?; allowed here: version, federation, state_dir, "
        "database, server, keys, privacy, policy, limits, jobs, workers, logging, evaluation",
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"federation": "Demo"}, "federation: must be a lower-case letter, then up to 31"),
        ({"state_dir": 5}, "state_dir: must be a path (got something else)"),
        ({"server": {"insecure": "yes"}}, "server.insecure: must be true or false (got 'yes')"),
        ({"server": {"insecure": True, "listen": "localhost"}}, "server.listen: must be host:port"),
        ({"server": {"insecure": True, "listen": "::1:50051"}}, "server.listen: must be host:port"),
        ({"server": {"insecure": True, "listen": "a:70000"}}, "server.listen: must be host:port"),
        ({"server": {"insecure": True, "reflection": 1}}, "server.reflection: must be true or false (got 1)"),
        (
            {"server": {"insecure": True, "heartbeat_interval_s": 0}},
            "server.heartbeat_interval_s: must be > 0 and <= 300",
        ),
        ({"keys": {"custody": "nobody"}}, "keys.custody: must be 'threshold' or 'aggregator' (got 'nobody')"),
        ({"keys": {"custody": "aggregator", "modulus_bits": 1024}}, "keys.modulus_bits: must be >= 2048 (got 1024)"),
        (
            {"keys": {"custody": "aggregator", "modulus_bits": 3000}},
            "keys.modulus_bits: must be >= 256 and <= 8192 and a",
        ),
        ({"limits": {"max_parties": True}}, "limits.max_parties: must be an integer >= 1 (got true)"),
        ({"limits": {"max_parties": 2.0}}, "limits.max_parties: must be an integer >= 1 (got 2.0)"),
        ({"privacy": {"budget": {"epsilon": -1}}}, "privacy.budget.epsilon: must be > 0 (got -1)"),
        ({"privacy": {"budget": {"epsilon": "4"}}}, "privacy.budget.epsilon: must be a number > 0, or null (got '4')"),
        (
            {"privacy": {"budget": {"delta": 1e-6}}},
            "privacy.budget: must limit something: epsilon: null means no limit",
        ),
        ({"evaluation": {"randhie": {"rows": {"name": None}}}}, "evaluation.randhie.rows: must be a text, a number"),
        ({"evaluation": {"randhie": None}}, "evaluation.randhie: must be a mapping (got null)"),
        ({"version": 2}, "version: must be 1: this Sotto reads no other version"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    found = problems(tmp_path, AGGREGATOR | changes)
    assert len(found) == 1
    assert found[0].startswith(problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "operator"}, "name: must not be 'operator': that name is reserved"),
        ({"name": "a b"}, "name: must be a lower-case letter"),
        ({"name": None}, "name: must be a text (got null)"),
        ({"server": {"insecure": True, "address": "127.0.0.1:0"}}, "server.address: must name the port"),
        (
            {"server": {"insecure": True, "address": "example.org:1"}},
            "server.insecure: must be false for example.org:1",
        ),
        ({"datasets": {"randhie": {}}}, "datasets.randhie.declared_rows: required: an integer >= 1"),
        (
            {"datasets": {"randhie": {"declared_rows": 1, "opts": 1}}},
            "datasets.randhie.opts: unknown key; did you mean",
        ),
        ({"policy": {"min_quorum": 1}}, "policy.min_quorum: must be >= 2 (got 1)"),
        ({"privacy": {"budgets": {"example": {}}}}, "privacy.budgets.example: must limit something"),
    ],
)
def test_a_wrong_value_of_a_party_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    found = problems(tmp_path, PARTY | changes, role=party)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_missing_files_of_a_kit_are_told_with_whoever_has_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        party(tmp_path, {"version": 1, "federation": "demo", "name": "a"})
    files = {
        "server.tls.certificate": "tls/cert.pem",
        "server.tls.key": "tls/key.pem",
        "server.tls.ca": "tls/ca.pem",
        "keys.public_key": "public_key.json",
        "keys.roster": "roster.json",
        "keys.signing_key": "signing.key",
        "keys.share": "share.json",
    }
    assert list(caught.value.problems) == [f"{key}: no such file: {tmp_path / file}" for key, file in files.items()]
    advice = "what is missing is in the kit that the federation's operator made for this party"
    assert f"cannot be used (7 problems; {advice}): " in caught.value.message
    assert "sotto provision" not in caught.value.message  # whose kits would fit nobody else's


@pytest.mark.parametrize(
    ("load", "shipped", "whose"),
    [
        (load_party_config, "aggregator", "an aggregator's configuration"),
        (load_client_config, "aggregator", "an aggregator's configuration"),
        (load_aggregator_config, "party", "a party's configuration"),
        (load_client_config, "party", "a party's configuration"),
        (load_party_config, "client", "a scientist's or operator's configuration"),
        (load_aggregator_config, "client", "a scientist's or operator's configuration"),
    ],
)
def test_the_file_of_another_role_is_named_as_what_it_is(load: Any, shipped: str, whose: str) -> None:
    path = ROOT / f"config/{shipped}.yaml"
    with pytest.raises(ConfigError, match=f"^{path} is {whose} .*: what is needed here is ") as caught:
        load(path, environ={})
    assert caught.value.problems == ()


def test_a_file_with_keys_of_two_roles_is_read_as_the_one_asked_for(tmp_path: Path) -> None:
    found = problems(tmp_path, AGGREGATOR | {"jobs": {}, "datasets": {}})
    assert len(found) == 1
    assert found[0].startswith("datasets: unknown key")


def test_private_files_that_others_may_read_are_named_with_their_mode(tmp_path: Path) -> None:
    for name in ("signing.key", "share.json", "password"):
        (tmp_path / name).touch(mode=0o600)
    keys = {"signing_key": "signing.key", "share": "share.json"}
    config = party(
        tmp_path,
        PARTY | {"keys": PARTY["keys"] | keys, "database": {"password_file": "password"}},  # type: ignore[operator]
    )
    assert config.exposed() == []
    (tmp_path / "share.json").chmod(0o640)
    (tmp_path / "password").chmod(0o604)
    assert config.exposed() == [
        f"{tmp_path / name} is secret, and others than its owner can read it (mode {mode}): chmod 600"
        for name, mode in (("share.json", "0640"), ("password", "0604"))
    ]


def test_custody_aggregator_needs_no_kit_but_a_kit_has_to_be_whole(tmp_path: Path) -> None:
    assert party(tmp_path, PARTY).keys.roster is None
    keys = {"custody": "aggregator", "roster": "roster.json", "signing_key": "signing.key"}
    found = problems(tmp_path, PARTY | {"keys": keys}, role=party)
    assert [line.partition(":")[0] for line in found] == ["keys.roster", "keys.signing_key"]


@pytest.mark.parametrize("secret", ["ab" * 32, "-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n", "x" * 5000])
def test_a_secret_pasted_where_a_path_belongs_is_not_shown(tmp_path: Path, secret: str) -> None:
    content = AGGREGATOR | {"keys": {"custody": "aggregator", "signing_key": secret}}
    with pytest.raises(ConfigError) as caught:
        aggregator(tmp_path, content)
    assert caught.value.problems == ("keys.signing_key: must be the path of a file, not its content",)
    assert secret[:16] not in str(caught.value)


def test_a_model_built_by_hand_is_held_to_the_same_rules() -> None:
    with pytest.raises(ValidationError, match="must limit something"):
        Budget(delta=1e-5)
    with pytest.raises(ValidationError, match=r"server\.tls\.certificate: no such file"):
        AggregatorConfig.model_validate({"version": 1, "federation": "demo", "keys": {"custody": "aggregator"}})


def test_a_scientist_needs_a_roster_only_if_it_names_one(tmp_path: Path) -> None:
    content: dict[str, Any] = {"version": 1, "federation": "demo", "server": {"insecure": True}}
    assert load_client_config(write(tmp_path / "client.yaml", content), environ={}).keys.roster is None
    content["keys"] = {"roster": "nowhere.json"}
    with pytest.raises(ConfigError, match=r"keys\.roster: no such file"):
        load_client_config(write(tmp_path / "client.yaml", content), environ={})


# ----------------------------------------------------------------------------------------------------- environment


def test_the_environment_overrides_the_file_and_is_read_as_yaml(tmp_path: Path) -> None:
    config = aggregator(
        tmp_path,
        AGGREGATOR,
        SOTTO__PRIVACY__BUDGET__DELTA="1e-7",
        SOTTO__PRIVACY__BUDGET__MAX_ROUNDS="7",
        SOTTO__SERVER__LISTEN="127.0.0.1:0",
        SOTTO__STATE_DIR="elsewhere",
        SOTTO__EVALUATION__RANDHIE__SEED="3",
        SOTTO_OTHER="not ours",
    )
    assert (config.privacy.budget.delta, config.privacy.budget.max_rounds) == (1e-7, 7)
    assert (config.server.listen, config.state_dir) == ("127.0.0.1:0", tmp_path / "elsewhere")
    assert config.keys.signing_key == tmp_path / "elsewhere/signing.key"
    assert config.evaluation == {"randhie": {"seed": 3}}


def test_an_unknown_or_unusable_variable_is_named(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        AGGREGATOR,
        SOTTO__SERVR__LISTEN="x",
        SOTTO__SERVER="x",
        SOTTO__LIMITS__MAX_PARTIES__A="1",
        SOTTO__LIMITS__MAX_ROUNDS="[",
        SOTTO__WORKERS__SIZE="0",
    )
    assert found[:-1] == [
        "SOTTO__LIMITS__MAX_PARTIES__A: limits.max_parties has no keys",
        "SOTTO__LIMITS__MAX_ROUNDS: the value is not YAML",
        "SOTTO__SERVER: server is a section; name a key in it: insecure, tls, listen, reflection, "
        "heartbeat_interval_s, address_file, shutdown_s",
        "SOTTO__SERVR__LISTEN: no key 'servr' in the top level; did you mean 'server'?",
    ]
    assert found[-1] == "workers.size: must be >= 1 and <= 256 (got 0) [from SOTTO__WORKERS__SIZE]"


def test_the_name_on_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    assert party(tmp_path, PARTY).name == "a"
    assert party(tmp_path, PARTY, SOTTO__NAME="b").name == "b"
    assert party(tmp_path, PARTY, name="c", SOTTO__NAME="b").name == "c"


# ------------------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("-7", -7),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("~", None),
        ("", None),
        ("True", True),
        ('"1e-5"', "1e-5"),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found, complaints = parse_yaml(text)
    assert complaints == []
    assert found == value
    assert type(found) is type(value)


@settings(deadline=None, max_examples=100)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back_as_the_same_number(value: float) -> None:
    assert parse_yaml(repr(value)) == (value, [])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\n\"{#: '"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:#", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(JSON_VALUES)
def test_json_is_read_as_the_yaml_that_it_is(value: object) -> None:
    assert parse_yaml(json.dumps(value)) == (value, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' appears twice in one section (first in line 1)"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: 'b' appears twice in one section (first in line 2)"),
        ("1: x\n", "line 1: a key must be a text"),
        ("[a]: x\n", "line 1: a key must be a text"),
        ("a: [", "line 1: not YAML: expected the node content, but found '<stream end>'"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: not YAML: could not determine a constructor for the tag"),
        ("a: \x07", "not YAML"),
        ("- a", "the file must hold a mapping of sections"),
        ("", "the file must hold a mapping of sections"),
        ("--- {a: 1}\n--- {b: 1}", "line 2: not YAML: but found another document"),
    ],
)
def test_a_document_that_is_no_configuration_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_document(write(tmp_path / "x.yaml", text))
    assert caught.value.problems[0].startswith(problem)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_document(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_document(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_document(tmp_path)


def test_the_global_loaders_of_yaml_are_left_alone() -> None:
    assert yaml.safe_load("[yes, 2024-01-01]")[0] is True


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("[::1]:0", ("::1", 0)),
        ("fl.example.org:443", ("fl.example.org", 443)),
    ],
)
def test_addresses_are_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", ":1", "a", "a:", "a:-1", "a:65536", "::1:1", "[a:1", "a:１"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


def test_loopback_is_what_never_leaves_the_machine() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io"))
    )
