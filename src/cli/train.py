"""`sotto train`: one training on this node, without a federation; the artifact is one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .budget_source import PartyName, StateDir
from .screen import echo, echo_json

if TYPE_CHECKING:
    from ..config import PartyConfig
    from ..learning.standalone import Configured, Plan
    from ..privacy.budget import Limits
    from ..protocol.signing import SigningKey
    from ..storage.location import Location
    from .train_ledger import LedgerPurse

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_STDIN: Final = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """This node, as far as training on it goes.

    Attributes:
        name: what it signs artifacts as.
        state_dir: where ledger and key are, unless a configuration names other places.
        location: of the database that has the ledger.
        key_file: of the key that signs ledger and artifacts; made where there is none.
        datasets: by name.
        users: whose data a dataset is, by its name, where the configuration says it.
        limits: of budgets.
        allow_without_dp: the policy.
        advice: what to do where nothing can be written into `state_dir`; "" where the configuration says where it is.
    """

    name: str
    state_dir: Path
    location: Location
    key_file: Path
    datasets: Mapping[str, Configured]
    users: Mapping[str, str]
    limits: Limits
    allow_without_dp: bool
    advice: str = ""


@app.command()
def train(
    user: Annotated[str, typer.Option("--user", help="Whose data it is: the run is charged to their budget.")],
    file: Annotated[
        Path | None, typer.Argument(help="The job, one JSON object; stdin without it, or for -.", show_default=False)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="The same as FILE.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="party.yaml: datasets, budgets, ledger; else the user's own ledger."),
    ] = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write artifact.json and model.safetensors into this directory.")
    ] = None,
    mock: Annotated[
        bool, typer.Option("--mock", envvar="MOCK_DP", help="Train nothing, charge nothing; the artifact says so.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report errors as JSON, and nothing else on stderr.")] = False,
) -> None:
    """Train on this node alone, with differential privacy, and print the artifact as one JSON object.

    The job is checked and priced, the price reserved, the model trained, the charge made final; then it is shown.
    """
    from ..extras import require
    from ..jobs.states import utc
    from ..learning.standalone import find_source, plan_run
    from ..learning.standalone_artifact import build_mock
    from ..learning.standalone_job import parse_job

    job = parse_job(_read_job(file, json_file))
    node = _node(config, name=name, state_dir=state_dir)
    _check_user(user, node.users.get(job.dataset))
    plan = plan_run(job, find_source(job, node.datasets), allow_without_dp=node.allow_without_dp)
    target = None if out is None else _Target(out)
    if mock:
        artifact, model = build_mock(plan, created_at=utc(time.time())), None
        _say("MOCK: nothing was trained and nothing charged", quiet=as_json)
    else:
        require("party", "training")
        with contextlib.redirect_stdout(sys.stderr):  # a task may print as it likes: there is one object on stdout
            artifact, model = _train(plan, node, user, inline=target is None, quiet=as_json)
    text = json.dumps(artifact, ensure_ascii=False)
    if target is not None:
        target.write(text, model, secret=not job.private)  # without privacy a model may hold rows
    echo_json(artifact)


def _train(plan: Plan, node: Node, user: str, *, inline: bool, quiet: bool) -> tuple[dict[str, Any], bytes]:
    """The artifact and the model of a run that was paid for."""
    from ..jobs.states import utc
    from ..learning.standalone import run_plan
    from ..learning.standalone_artifact import MAX_INLINE_BYTES, build_artifact
    from ..privacy.entropy import SystemEntropy
    from ..protocol.signing import SigningKey

    for change in _open_state(node):
        _say(change, quiet=quiet)
    key = SigningKey.load_or_make(node.key_file)
    purse = _purse(node, plan, user, key)
    limit = MAX_INLINE_BYTES if inline else None
    trained = run_plan(plan, purse=purse, entropy=SystemEntropy(), max_model_bytes=limit)
    artifact = build_artifact(
        plan, trained, created_at=utc(time.time()), in_file=not inline, signing_key=key, signer=node.name
    )
    for warning in purse.warnings:
        _say(warning, quiet=quiet)
    for each in purse.spent():
        _say(_balance(each.subject, each.epsilon, limit=each.limit, delta=each.delta), quiet=quiet)
    return artifact, trained.model


def _read_job(file: Path | None, json_file: Path | None) -> bytes:
    from ..errors import InvalidInput, NotFoundError
    from ..learning.standalone_job import MAX_JOB_BYTES

    if file is not None and json_file is not None:
        raise InvalidInput("a job comes from FILE or from --json-file, not from both")
    path = json_file if file is None else file
    if path is not None and str(path) != _STDIN:
        try:
            with path.open("rb") as stream:
                return stream.read(MAX_JOB_BYTES + 1)
        except OSError as error:
            raise NotFoundError(f"the job {path} cannot be read: {error.strerror}") from error
    if sys.stdin.isatty():
        raise InvalidInput("no job: name a file, or pipe one JSON object into stdin")
    return sys.stdin.buffer.read(MAX_JOB_BYTES + 1)


def _check_user(user: str, owner: str | None) -> None:
    """Raise InvalidInput for a name that is none, and for another than the dataset's owner."""
    from ..config_sections import USER_PATTERN, USER_RULE
    from ..errors import InvalidInput

    problem = ""
    if not USER_PATTERN.fullmatch(user):
        problem = f"must be {USER_RULE}"
    elif owner not in (None, user):
        problem = f"the dataset is configured as the data of {owner!r}"
    if problem:
        raise InvalidInput(f"--user: {problem}", violations={"--user": problem})


def _open_state(node: Node) -> list[str]:
    """Make and check the directory of ledger and key; what was changed about it.

    Raises:
        ConfigError: nothing can be written there.
    """
    from ..errors import ConfigError
    from ..files import open_state_directory

    hint = node.advice and f"; {node.advice}"
    try:
        changed = open_state_directory(node.state_dir)
        probe = node.state_dir / f".{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except ConfigError as error:
        raise ConfigError(f"{error.message}{hint}") from error
    except OSError as error:
        raise ConfigError(f"nothing can be written into {node.state_dir}: {error.strerror}{hint}") from error
    return changed


def _node(config: Path | None, *, name: str | None, state_dir: Path | None) -> Node:
    """The node of a party's configuration; without one, a node that has generated rows and the default budget."""
    from ..errors import InvalidInput
    from .train_ledger import ANOTHER_PLACE, DATABASE_FILE, DEFAULT_LIMITS, KEY_FILE, default_state_dir

    if config is not None and state_dir is not None:
        raise InvalidInput("--config says where the ledger is: it does not go together with --state-dir")
    if config is not None:
        from ..config import load_party_config

        return _configured(load_party_config(config, name=name))
    if name is not None:
        raise InvalidInput("--name says which party of a configuration: it needs --config")
    state = default_state_dir() if state_dir is None else state_dir
    return Node(
        name="standalone",
        state_dir=state,
        location=state / DATABASE_FILE,
        key_file=state / KEY_FILE,
        datasets={},
        users={},
        limits=DEFAULT_LIMITS,
        allow_without_dp=False,
        advice=ANOTHER_PLACE,
    )


def _configured(config: PartyConfig) -> Node:
    from ..config_budgets import party_limits
    from ..config_database import located
    from ..learning.standalone import Configured

    return Node(
        name=config.name,
        state_dir=config.state_dir,
        location=located(config),
        key_file=config.keys.signing_key,
        datasets={
            task: Configured(declared_rows=dataset.declared_rows, options=dataset.options, directory=config.directory)
            for task, dataset in config.datasets.items()
        },
        users={task: dataset.user for task, dataset in config.datasets.items() if dataset.user is not None},
        limits=party_limits(config),
        allow_without_dp=config.policy.allow_without_dp,
    )


def _purse(node: Node, plan: Plan, user: str, key: SigningKey) -> LedgerPurse:
    """What the run spends: the budget of the rows and the user's; of generated rows, which are nobody's, the latter."""
    from ..privacy.budget import subject_of
    from .train_ledger import LedgerPurse

    dataset = plan.source.dataset
    own = dataset in node.datasets
    return LedgerPurse(
        node.location,
        key=key,
        limits=node.limits,
        account=node.limits.dataset(dataset) if own else ("example", subject_of("user", user)),
        dataset=dataset if own else "",
        user=user,
        stated_delta=plan.job.delta,
    )


class _Target:
    """The directory that an artifact goes to; checked before anything is charged."""

    def __init__(self, directory: Path) -> None:
        from ..errors import ConflictError, StorageError
        from ..learning.standalone_artifact import ARTIFACT_FILE, MODEL_FILE

        self._artifact, self._model = directory / ARTIFACT_FILE, directory / MODEL_FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(f"nothing can be written into {directory}: {error.strerror}") from error
        for path in (self._artifact, self._model):
            if path.exists():
                raise ConflictError(f"{path} is there already: it is not overwritten")

    def write(self, artifact: str, model: bytes | None, *, secret: bool) -> None:
        """The model first: an artifact that is there vouches for a model that is there."""
        from ..files import write_over

        if model is not None:
            write_over(self._model, model, secret=secret)
        write_over(self._artifact, artifact.encode() + b"\n", secret=secret)


def _balance(subject: str, epsilon: float, *, limit: float | None, delta: float) -> str:
    spent = f"{epsilon:.4g}" if math.isfinite(epsilon) else "∞"
    of = "" if limit is None else f" of {limit:g}"
    return f"{subject}: ε = {spent}{of} spent at δ = {delta:g}"


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        echo(f"sotto: {text}", err=True)
