"""`sotto train` without its command line: what it costs is settled and reserved first, and paid before it is shown."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.errors import (
    BudgetError,
    DigestError,
    EvaluationError,
    InvalidInput,
    JobFailed,
    LimitError,
    PolicyError,
    Refused,
    SignatureError,
)
from src.learning import dpsgd
from src.learning.flatten import from_safetensors
from src.learning.standalone import Configured, Plan, Source, Trained, find_source, plan_run, run_plan
from src.learning.standalone_artifact import MODEL_FILE, artifact_hash, build_artifact, build_mock, verify_artifact
from src.learning.standalone_job import TrainJob, parse_job
from src.learning.synthetic import FEATURES, HOLDOUT_ROWS, ROWS, SyntheticTask
from src.learning.task import Dataset
from src.privacy.accounting import epsilon
from src.privacy.entropy import DeterministicEntropy
from src.privacy.events import DpSgdSteps, Event, NonPrivate
from src.protocol.signing import SigningKey

CREATED_AT = "2026-01-31T12:00:00.000000Z"
HEAD = "ab" * 32
FIRST_ROW = [0.4205783, 1.4169683, -1.7417291]
FIRST_LABELS = [1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0]
"""Of seed 0: whoever changes the generator changes what earlier artifacts say of their data."""


def job(**fields: Any) -> TrainJob:
    return parse_job(json.dumps({"job_id": "j", "dp": {"epsilon": 1.0}, **fields}).encode())


def plan(*, allow_without_dp: bool = False, **fields: Any) -> Plan:
    asked = job(**fields)
    return plan_run(asked, find_source(asked, {}), allow_without_dp=allow_without_dp)


class Witness:
    """A purse that writes down in which order things happen."""

    def __init__(self, log: list[str], *, refuses: bool = False, keeps: bool = False) -> None:
        self.log = log
        self.events: list[Event] = []
        self._refuses = refuses
        self._keeps = keeps

    def reserve(self, job_id: str, event: Event) -> None:
        self.log.append("reserve")
        if self._refuses:
            raise BudgetError("no")
        self.events.append(event)

    def give_back(self, reason: str) -> bool:
        self.log.append("given back")
        return not self._keeps

    def finalise(self, figures: Mapping[str, str]) -> str:
        self.log.append("final" if "failure" not in figures else f"final: {figures['failure']}")
        assert set(figures) in ({"model_sha256"}, {"failure"})
        return HEAD


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the private rows and to the model is noted."""
    noted: list[str] = []
    load = SyntheticTask.load_data

    def loading(self: SyntheticTask, options: Any) -> Dataset:
        noted.append("data")
        return load(self, options)

    monkeypatch.setattr(SyntheticTask, "load_data", loading)
    return noted


def trained(made: Plan, log: list[str], **options: Any) -> Trained:
    entropy = DeterministicEntropy(b"tests", purpose="standalone")
    return run_plan(made, purse=Witness(log), entropy=entropy, **options)


# ------------------------------------------------------------------------------------------------------------ prices


@pytest.mark.parametrize("asked", [0.5, 1.0, 4.0])
def test_the_noise_for_an_epsilon_keeps_within_it_and_wastes_little(asked: float) -> None:
    made = plan(dp={"epsilon": asked})
    assert 0.99 * asked < made.epsilon <= asked
    assert made.epsilon == epsilon([made.event], delta=1e-5)


def test_steps_and_sampling_rate_follow_from_epochs_and_batch_size() -> None:
    made = plan(epochs=3, batch_size=1000)
    assert (made.local.steps, made.local.sampling_rate) == (13, 1000 / ROWS)  # 3 · 4096 / 1000, rounded up
    assert made.event == DpSgdSteps(
        sampling_rate=1000 / ROWS, noise_multiplier=made.local.noise_multiplier, steps=made.local.steps
    )


def test_a_noise_multiplier_alone_says_what_it_costs() -> None:
    made = plan(dp={"noise_multiplier": 1.1, "delta": 1e-6})
    event = DpSgdSteps(sampling_rate=1 / 16, noise_multiplier=1.1, steps=80)
    assert (made.event, made.epsilon) == (event, epsilon([event], delta=1e-6))


def test_a_noise_multiplier_that_costs_less_than_the_epsilon_asked_for_is_used_as_it_is() -> None:
    made = plan(dp={"epsilon": 1.0, "noise_multiplier": 5.0})
    assert made.local.noise_multiplier == 5.0
    assert made.epsilon < 1.0


def test_a_noise_multiplier_that_costs_more_than_the_epsilon_asked_for_is_refused() -> None:
    with pytest.raises(
        Refused, match=r"noise_multiplier 1 costs epsilon .* more than dp.epsilon 1, which takes a noise_multiplier of "
    ):
        plan(dp={"epsilon": 1.0, "noise_multiplier": 1.0})


def test_without_dp_needs_the_nodes_policy_and_is_entered_as_non_private() -> None:
    with pytest.raises(PolicyError, match="allow_without_dp"):
        plan(dp={"enabled": False})
    made = plan(dp={"enabled": False}, allow_without_dp=True)
    assert made.event == NonPrivate(unit="example", reason="dp.enabled: false")
    assert math.isinf(made.epsilon)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "patients"}, "dataset"),
    ({"task": "randhie"}, "task"),
    ({"batch_size": ROWS + 1}, "batch_size"),
    ({"batch_size": 1, "epochs": 1000}, "epochs"),
    ({"dp": {"epsilon": 1.0, "delta": 1 / ROWS}}, "dp.delta"),
]


@pytest.mark.parametrize(("fields", "path"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_a_job_that_does_not_go_with_the_data_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        plan(**fields)
    assert list(refused.value.violations) == [path]


def test_a_configured_dataset_counts_the_rows_that_its_owner_declared_and_leaves_out_open_options() -> None:
    offers = {"randhie": Configured(declared_rows=5000, options={"party": 1, "seed": None})}
    source = find_source(job(dataset="randhie"), offers)
    assert (source.n, source.n_is, source.options) == (5000, "declared by the owner", {"party": 1})
    assert source.task.name == "randhie"


# ------------------------------------------------------------------------------------------------------------- order


def test_reserved_before_data_is_touched_and_final_before_the_model_is_there(log: list[str]) -> None:
    made = plan(epochs=1)
    found = trained(made, log)
    assert log == ["reserve", "data", "final"]
    assert found.ledger_head == HEAD


def test_over_budget_no_data_is_touched(log: list[str]) -> None:
    with pytest.raises(BudgetError):
        run_plan(plan(), purse=Witness(log, refuses=True), entropy=DeterministicEntropy(b"t", purpose="t"))
    assert log == ["reserve"]


def test_a_training_that_fails_is_charged_and_shows_nothing(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(dpsgd, "train_dpsgd", breaks)
    with pytest.raises(JobFailed, match=r"OSError.*; what it cost is charged") as caught:
        trained(plan(), log)
    assert "disk" not in caught.value.message  # it could as well be a row
    assert log == ["reserve", "data", "final: JOB_FAILED"]


class Tabular:
    """A task of four numbers and two classes, with a fault of the caller's."""

    name, description = "tabular", "made up"

    def __init__(self, **faults: Any) -> None:
        self._faults = faults

    def _model(self) -> torch.nn.Module:
        return torch.nn.Linear(4, 2)

    def _rows(self, labels: Any = np.int64) -> Dataset:
        return Dataset(np.ones((64, 4), np.float32), np.zeros(64, labels), "made up")

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model: torch.nn.Module = self._faults.get("model", self._model)()
        return model

    def load_data(self, options: Any) -> Any:
        return self._faults.get("rows", self._rows)()

    def loss(self, outputs: Any, labels: Any) -> Any:
        reduction = self._faults.get("reduction", "none")
        return torch.nn.functional.cross_entropy(outputs, labels, reduction=reduction)


class WithHoldout(Tabular):
    """Of which some rows are public."""

    def load_holdout(self, options: Any) -> Any:
        return self._rows()


def dropping() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))


def of_text() -> Dataset:
    return Tabular()._rows(np.str_)


def lost() -> Dataset:
    raise FileNotFoundError(2, "no such file", str(Path.cwd() / "gone.csv"))


def without_option() -> Dataset:
    options: dict[str, str] = {}
    options["table"]
    raise AssertionError


WITH_DP, BOTH = (True,), (True, False)
NOT_CHARGED: list[tuple[dict[str, Any], tuple[bool, ...], str]] = [
    ({"model": dropping}, WITH_DP, "random"),
    ({"reduction": "mean"}, BOTH, "one value for each example"),
    ({"rows": of_text}, BOTH, "labels|TypeError"),
    ({"model": lambda: torch.nn.Linear(5, 2)}, BOTH, r"features of shape \(4,\)|RuntimeError"),
    ({"rows": lost}, BOTH, r"options.table: /.*/gone.csv: No such file|FileNotFoundError"),
    ({"rows": without_option}, BOTH, "options.table is not set|KeyError"),
    ({"rows": lambda: "no rows"}, BOTH, "returns no|AttributeError"),
]


@pytest.mark.parametrize("kind", [Tabular, WithHoldout])
@pytest.mark.parametrize(
    ("faults", "private", "says"),
    [(faults, private, says) for faults, which, says in NOT_CHARGED for private in which],
    ids=[f"{says}, private: {private}" for _, which, says in NOT_CHARGED for private in which],
)
def test_what_follows_from_code_options_and_dtypes_costs_nothing(
    faults: Any, private: bool, says: str, kind: type[Tabular]
) -> None:
    dp = {"noise_multiplier": 1.0, "delta": 1e-3} if private else {"enabled": False}
    options = {"table": "gone.csv"} if faults.get("rows") is lost else {}
    source = Source(
        dataset="tabular", task=kind(**faults), options=options, n=64, n_is="declared", directory=Path.cwd()
    )
    made = plan_run(job(dataset="tabular", batch_size=8, dp=dp), source, allow_without_dp=True)
    log: list[str] = []
    with pytest.raises((JobFailed, InvalidInput, EvaluationError), match=says) as caught:
        trained(made, log)
    assert "nothing was charged" in caught.value.message
    assert log in ([], ["reserve", "given back"])


def test_of_too_many_that_were_given_back_it_is_said_that_this_one_is_charged(log: list[str]) -> None:
    source = Source(dataset="tabular", task=Tabular(rows=lambda: "none"), options={}, n=64, n_is="declared")
    made = plan_run(
        job(dataset="tabular", batch_size=8, dp={"noise_multiplier": 1.0, "delta": 1e-3}),
        source,
        allow_without_dp=False,
    )
    with pytest.raises(JobFailed, match="it is charged"):
        run_plan(made, purse=Witness(log, keeps=True), entropy=DeterministicEntropy(b"t", purpose="t"))


def without_dp() -> Plan:
    return plan(dp={"enabled": False}, allow_without_dp=True)


def test_without_dp_a_row_that_is_not_finite_is_told_of_and_costs_nothing(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all of the budget is asked for, nothing is protected: a refusal may tell, and need not be paid for."""
    load = SyntheticTask.load_data

    def broken(self: SyntheticTask, options: Any) -> Dataset:
        rows = load(self, options)
        rows.features[[3, 5], 0] = np.nan
        return rows

    monkeypatch.setattr(SyntheticTask, "load_data", broken)
    with pytest.raises(InvalidInput) as caught:
        trained(without_dp(), log)
    assert log == ["data"]
    assert caught.value.message == (
        f"every feature and label must be finite: of {ROWS} rows 2 have one that is not; nothing was charged "
        "(sotto party --check-data says more)"
    )
    log.clear()
    assert trained(plan(epochs=1), log).ledger_head == HEAD  # with DP they count for nothing, and nobody hears of them
    assert log == ["reserve", "data", "final"]


def test_without_dp_data_that_cannot_be_loaded_costs_nothing(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: object, options: object) -> Dataset:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticTask, "load_data", breaks)
        with pytest.raises(JobFailed, match=r"OSError at .*; nothing was charged") as caught:
            trained(without_dp(), log)
    assert "disk" not in caught.value.message
    assert log == []
    trained(without_dp(), log)
    assert log == ["data", "reserve", "final"]


def test_a_model_too_large_to_print_is_refused_before_it_costs_anything(log: list[str]) -> None:
    with pytest.raises(LimitError, match="--out"):
        trained(plan(), log, max_model_bytes=100)
    assert log == []


def test_a_training_that_diverges_is_charged_and_shows_no_model(log: list[str]) -> None:
    made = plan(dp={"noise_multiplier": 10_000.0, "clip": 1e6}, learning_rate=1000, epochs=1)
    object.__setattr__(made.local, "learning_rate", 1e38)
    with pytest.raises(JobFailed, match="diverged"):
        trained(made, log)
    assert log == ["reserve", "data", "final"]


# --------------------------------------------------------------------------------------------------------- synthetic


def test_the_seed_decides_the_synthetic_rows_and_the_hold_out_is_of_others() -> None:
    task = SyntheticTask()
    rows, again, other = (task.load_data({"seed": seed}) for seed in (1, 1, 2))
    holdout = task.load_holdout({"seed": 1})
    assert rows.features.shape == (ROWS, FEATURES)
    assert len(holdout) == HOLDOUT_ROWS
    assert np.array_equal(rows.features, again.features)
    assert np.array_equal(rows.labels, again.labels)
    assert not np.array_equal(rows.features, other.features)
    assert {row.tobytes() for row in rows.features}.isdisjoint(row.tobytes() for row in holdout.features)


def test_synthetic_rows_are_the_same_on_every_machine() -> None:
    rows = SyntheticTask().load_data({"seed": 0})
    assert rows.features[0, :3] == pytest.approx(FIRST_ROW, abs=1e-6)
    assert rows.labels[:16].tolist() == FIRST_LABELS


def test_it_learns_with_privacy_and_says_how_well_on_public_rows(log: list[str]) -> None:
    found = trained(plan(), log)
    assert found.metrics is not None
    assert found.metrics["accuracy"] > 0.8  # 0.86 is the most that anybody reaches, 0.5 is chance
    assert set(found.metrics) == {"accuracy", "auc"}
    assert set(from_safetensors(found.model)) == {"weight", "bias"}


# ---------------------------------------------------------------------------------------------------------- artifact


@pytest.fixture(scope="module")
def run() -> tuple[Plan, Trained]:
    """One training, for all that is done with its artifact."""
    made = plan(epochs=1)
    return made, trained(made, [])


def artifact(run: tuple[Plan, Trained], **options: Any) -> dict[str, Any]:
    return build_artifact(*run, created_at=CREATED_AT, **{"in_file": False, **options})


def check(value: dict[str, Any], **options: Any) -> Any:
    return verify_artifact(json.dumps(value).encode(), **{"directory": None, "allow_unsigned": True, **options})


def test_an_artifact_says_what_was_done_and_verifies(run: tuple[Plan, Trained]) -> None:
    made = artifact(run)
    assert (made["job_id"], made["dataset"], made["task"], made["seed"]) == ("j", "synthetic", "synthetic", 0)
    assert made["dp"] == {
        "enabled": True,
        "epsilon": run[0].epsilon,
        "delta": 1e-5,
        "clip": 1.0,
        "noise_multiplier": run[0].local.noise_multiplier,
    }
    assert made["epsilon"] == run[0].epsilon <= 1.0
    assert (made["n"], made["provenance"]) == (ROWS, {"accuracy": "public rows, exact", "n": "generated rows"})
    assert made["evaluation"]["rows"] == HOLDOUT_ROWS
    assert base64.b64decode(made["model"]["base64"]) == run[1].model
    assert made["privacy"]["ledger_head"] == HEAD
    found = check(made)
    assert (found.job_id, found.hash, found.epsilon, found.signer) == ("j", made["hash"], made["epsilon"], "")


def test_white_space_order_and_the_way_a_number_is_written_do_not_matter(run: tuple[Plan, Trained]) -> None:
    made = artifact(run)
    text = json.dumps(dict(reversed(made.items())), indent=3).replace('"clip": 1.0', '"clip": 1')
    assert '"clip": 1,' in text
    assert verify_artifact(text.encode(), directory=None, allow_unsigned=True).hash == made["hash"]


def test_the_model_may_lie_in_a_file_beside(run: tuple[Plan, Trained], tmp_path: Path) -> None:
    made = artifact(run, in_file=True)
    assert "base64" not in made["model"]
    with pytest.raises(DigestError, match="cannot be read"):
        check(made, directory=tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(run[1].model)
    assert check(made, directory=tmp_path).job_id == "j"
    (tmp_path / MODEL_FILE).write_bytes(run[1].model[:-1] + b"\0")
    with pytest.raises(DigestError, match="not the one"):
        check(made, directory=tmp_path)
    with pytest.raises(InvalidInput, match="beside which it lies"):
        check(made)


def resealed(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "hash": artifact_hash(value)}


def put(path: str, new: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def change(value: dict[str, Any]) -> None:
        for name in parents:
            value = value[name]
        value[last] = new

    return change


CHANGES = {
    "job_id": "k",
    "epsilon": 0.5,
    "accuracy": 0.99,
    "n": 10,
    "dp.delta": 1e-6,
    "training.steps": 1,
    "model.bytes": 1,
    "created_at": "2027-01-31T12:00:00.000000Z",
    "privacy.ledger_head": "cd" * 32,
}


@pytest.mark.parametrize("path", CHANGES)
def test_whatever_is_changed_the_hash_shows_it(run: tuple[Plan, Trained], path: str) -> None:
    made = artifact(run)
    put(path, CHANGES[path])(made)
    with pytest.raises(DigestError, match="was changed"):
        check(made)


FORGED: list[tuple[str, Any, type[Exception], str]] = [
    ("epsilon", 0.5, InvalidInput, "epsilon is 0.5, but the settings cost 0.99"),
    ("dp.epsilon", 0.5, InvalidInput, "dp.epsilon is 0.5, but the settings cost"),
    ("training.steps", 1, InvalidInput, "contradicts itself"),
    ("training.sampling_rate", 1e-300, InvalidInput, "contradicts itself"),
    ("training.epochs", 4, InvalidInput, "contradicts itself"),
    ("accuracy", 0.99, InvalidInput, "contradicts itself"),
    ("accuracy", None, InvalidInput, "contradicts itself"),
    ("provenance.accuracy", "not evaluated", InvalidInput, "contradicts itself"),
    ("dp.noise_multiplier", 1.5, InvalidInput, "but the settings cost"),
    ("dp.noise_multiplier", 0, InvalidInput, "but the settings cost inf"),
    ("dp.enabled", False, InvalidInput, "but the settings cost inf"),
    ("model.sha256", "0" * 64, DigestError, "not the one"),
    ("model.base64", "AAAA", DigestError, "not the one"),
    ("model.base64", "?", InvalidInput, "not base64"),
    ("model", None, InvalidInput, "not an artifact"),
    ("n", 0, InvalidInput, "not an artifact"),
    ("accuracy", 1.5, InvalidInput, "not an artifact"),
    ("colour", "red", InvalidInput, "not an artifact"),
    ("provenance.accuracy", "private rows", InvalidInput, "not an artifact"),
    ("mock", True, InvalidInput, "MOCK"),
    ("version", 2, InvalidInput, "not an artifact"),
]


@pytest.mark.parametrize(("path", "new", "error", "message"), FORGED, ids=[f"{row[0]}={row[1]}" for row in FORGED])
def test_what_is_hashed_anew_is_still_held_against_itself(
    run: tuple[Plan, Trained], path: str, new: Any, error: type[Exception], message: str
) -> None:
    made = artifact(run)
    put(path, new)(made)
    with pytest.raises(error, match=message):
        check(resealed(made))


def test_a_model_that_is_no_safetensors_is_refused(run: tuple[Plan, Trained]) -> None:
    made, found = run
    odd = Trained(model=b"weights", metrics=None, holdout_rows=0, holdout="", ledger_head=HEAD)
    assert found.model != odd.model
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        check(artifact((made, odd)))


def test_without_public_rows_it_says_not_evaluated(run: tuple[Plan, Trained]) -> None:
    found = Trained(model=run[1].model, metrics=None, holdout_rows=0, holdout="", ledger_head=HEAD)
    made = artifact((run[0], found))
    assert (made["accuracy"], made["evaluation"]) == (None, None)
    assert made["provenance"]["accuracy"] == "not evaluated"
    check(made)


def test_an_artifact_without_privacy_says_so(log: list[str]) -> None:
    made = plan(dp={"enabled": False}, allow_without_dp=True)
    value = artifact((made, trained(made, log)))
    assert value["epsilon"] == value["dp"]["epsilon"] == "inf"
    assert (value["dp"]["enabled"], value["dp"]["noise_multiplier"], value["dp"]["clip"]) == (False, 0.0, None)
    assert value["privacy"]["statements"][0].startswith("NO PRIVACY")
    assert math.isinf(check(value).epsilon)


def test_a_mock_has_no_model_and_cannot_lose_its_mark() -> None:
    made = build_mock(plan(), created_at=CREATED_AT)
    assert (made["mock"], made["model"], made["accuracy"], made["n"], made["epsilon"]) == (True, None, None, 0, 0)
    with pytest.raises(InvalidInput, match="MOCK: nothing was trained"):
        check(made)
    with pytest.raises(InvalidInput) as refused:
        check(resealed({**made, "mock": False, "privacy": {**made["privacy"], "statements": ["all is well"]}}))
    assert {"model", "n"} <= set(refused.value.violations)


def made_up(run: tuple[Plan, Trained], *, said: bool) -> dict[str, Any]:
    """A mock that was given everything that a real artifact has, and hashed anew."""
    real = artifact(run)
    forged = {**build_mock(plan(), created_at=CREATED_AT), "mock": False, "model": real["model"], "n": real["n"]}
    forged |= {"epsilon": real["epsilon"], "provenance": {"accuracy": "not evaluated", "n": "generated rows"}}
    forged["privacy"] = {**forged["privacy"], "ledger_head": "0" * 64}
    if not said:
        forged["privacy"]["statements"] = real["privacy"]["statements"]
    return resealed(forged)


def test_a_mock_never_verifies_as_real_whatever_is_edited(run: tuple[Plan, Trained]) -> None:
    """All of it can be edited but the signature that it lacks, and that of a real one does not fit it."""
    with pytest.raises(InvalidInput, match="MOCK"):
        check(made_up(run, said=True))
    forged = made_up(run, said=False)
    with pytest.raises(SignatureError, match="not signed"):
        verify_artifact(json.dumps(forged).encode(), directory=None)
    key = SigningKey.from_bytes(b"k" * 32)
    real = artifact(run, signing_key=key, signer="a")
    with pytest.raises(SignatureError, match="does not verify"):
        check({**forged, "signature": real["signature"]})
    other = artifact((run[0], run[1]), signing_key=SigningKey.from_bytes(b"o" * 32), signer="a")
    with pytest.raises(SignatureError, match="another key"):
        check(other, verify_key=key.verify_key)


def test_a_signature_says_who_made_it(run: tuple[Plan, Trained]) -> None:
    key, other = SigningKey.from_bytes(b"k" * 32), SigningKey.from_bytes(b"o" * 32)
    made = artifact(run, signing_key=key, signer="a")
    assert made["hash"] == artifact(run)["hash"]
    assert check(made, verify_key=key.verify_key).signer == "a"
    with pytest.raises(SignatureError, match="another key"):
        check(made, verify_key=other.verify_key)
    with pytest.raises(SignatureError, match="not signed"):
        check(artifact(run), verify_key=key.verify_key)
    forged = resealed({**made, "created_at": "2027-01-31T12:00:00.000000Z"})
    with pytest.raises(SignatureError, match="does not verify"):
        check(forged)
