"""What `sotto jobs` hands in: trainings, evaluations and exports; and waiting for what comes of them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand

from . import connection
from .connection import DEFAULT_CONFIG, ConfigOption, JsonOption
from .prose import say
from .screen import echo

if TYPE_CHECKING:
    from ..client import Job, JobResult, SottoClient

INLINE_WAIT_S: Final = 20.0
"""An evaluation or export is often done by then: the answer to its submission brings the result."""

UNCHECKED: Final = (
    "NO SIGNATURE WAS CHECKED, only digests that the aggregator itself announced: the configuration pins no roster. To "
    "have it checked, name the roster.json of your kit in client.yaml (keys: {roster: roster.json}), and fetch the "
    "result into the same directory again"
)

NameOption = Annotated[str, typer.Option("--name", help="A name to recognise the job by.")]
PriorityOption = Annotated[str | None, typer.Option("--priority", help="high, normal or low.")]
JobTimeoutOption = Annotated[
    float | None, typer.Option("--timeout-s", help="Seconds from now after which the job fails unless it is at rest.")
]
RequestIdOption = Annotated[str | None, typer.Option("--request-id", help="Sent again, it gives the same job.")]
EpsilonOption = Annotated[
    float | None,
    typer.Option(help="What the job may cost a row at most, all spare rounds run: otherwise it ends below."),
]
RoundOption = Annotated[
    str, typer.Option("--round", help="The model of this released round, whatever has become of the job; or last.")
]
InitialModelOption = Annotated[
    Path | None, typer.Option(help="A model to start from (safetensors, up to 256 MiB), as a job's result is.")
]
BestOption = Annotated[
    str, typer.Option("--best", help="Of the released round that is best by this metric of public rows, such as auc.")
]
QuantileOption = Annotated[
    float | None, typer.Option(help="Let it follow this quantile of the updates' norms (20 parties or more).")
]
KeepOption = Annotated[
    str | None, typer.Option("--keep", help="Models of rounds to keep beside the last: every:10, best:auc.")
]
ContinueOption = Annotated[
    str, typer.Option("--continue", help="Start from a released round of an earlier job: JOB, JOB:5, JOB:best:auc.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Stay until the job is at rest, as `jobs wait`.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Wait, then fetch the files into this directory and verify them.")
]


class Submit(TyperCommand):
    """Its help says the defaults of a training: the specification's own, which no other command waits for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Written when it is asked for."""
        defaults = _defaults()
        for parameter in self.params:
            known, text = defaults.get(parameter.name), getattr(parameter, "help", None)
            if known is not None and text and not text.endswith(known):
                parameter.help = f"{text} {known}"  # type: ignore[attr-defined]  # an option has one
        super().format_help(ctx, formatter)


def _defaults() -> dict[str | None, str]:
    """By the name of an option."""
    from ..jobs.spec import FederatedTrainingSpec

    spec = FederatedTrainingSpec(task="any")
    whole = {name: getattr(spec, name) for name in ("strategy", "rounds", "spare_rounds", "quorum", "seed")}
    parts = {**spec.local_training.model_dump(), **spec.party_privacy.model_dump()}
    found = {**parts, **whole, "round_timeout": spec.round_timeout_s}
    return {
        name: f"Default {value:g}." if isinstance(value, int | float) else f"Default {value}."
        for name, value in found.items()
        if value is not None
    }


def submit(  # each parameter is an option of the command
    file: Annotated[Path | None, typer.Argument(help="A job in YAML or JSON.", show_default=False)] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    task: Annotated[str | None, typer.Option(help="Instead of a file: the task to train.")] = None,
    strategy: Annotated[str | None, typer.Option(help="fedavg, or fedsgd: a round is a step.")] = None,
    trusted_aggregator: Annotated[
        bool | None, typer.Option("--trusted-aggregator", help="Let the aggregator alone draw fedsgd's noise.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds that release a model.")] = None,
    spare_rounds: Annotated[int | None, typer.Option(min=0, help="May replace failed ones, and are priced.")] = None,
    quorum: Annotated[int | None, typer.Option(min=0, help="Updates that a round needs; 0: of all invited.")] = None,
    parties: Annotated[str | None, typer.Option(help="Invited, separated by commas; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Local steps a round; of fedsgd 1.")] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="Probability of a row to be in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the local steps.")] = None,
    epsilon: EpsilonOption = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Of fedavg's party-level noise.")] = None,
    clipping_norm: Annotated[float | None, typer.Option(help="Of fedavg: L2 bound of a party's update.")] = None,
    clipping_quantile: QuantileOption = None,
    seed: Annotated[int | None, typer.Option(help="Of split and initialisation.")] = None,
    round_timeout: Annotated[float | None, typer.Option(help="Seconds for a round.")] = None,
    name: NameOption = "",
    priority: PriorityOption = None,
    timeout_s: JobTimeoutOption = None,
    request_id: RequestIdOption = None,
    build_initial_model: Annotated[
        bool,
        typer.Option("--build-initial-model", help="Build the task's model here: for an aggregator without torch."),
    ] = False,
    initial_model: InitialModelOption = None,
    keep: KeepOption = None,
    continues: ContinueOption = "",
    and_wait: WaitOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a job, from FILE or from options, which win. Prints the job's id; on stderr, all that it asks for."""
    training = {
        "task": task,
        "strategy": strategy,
        "trusted_aggregator": trusted_aggregator,
        "rounds": rounds,
        "spare_rounds": spare_rounds,
        "quorum": quorum,
        "parties": None if parties is None else [each.strip() for each in parties.split(",")],
        "seed": seed,
        "round_timeout_s": round_timeout,
        "keep": keep,
    }
    local = {"steps": steps, "sampling_rate": sampling_rate, "learning_rate": learning_rate, "epsilon": epsilon}
    privacy = {
        "noise_by": "aggregator" if trusted_aggregator else None,  # which is what that means
        "noise_multiplier": noise_multiplier,
        "clipping_norm": clipping_norm,
        "adaptive_clipping": None if clipping_quantile is None else {"quantile": clipping_quantile},
    }
    job = _make_job(file, training, sections={"local_training": local, "party_privacy": privacy})
    _start_from(job, continues, config, model=initial_model, build=build_initial_model)
    terms = {"priority": _priority(priority), "timeout_s": timeout_s, "request_id": request_id, "name": name}
    _hand_in(job, config, terms, and_wait=and_wait, out=out, as_json=as_json)


def evaluate(
    job_id: Annotated[str, typer.Argument(help="The training whose model is meant.", show_default=False)] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    model: Annotated[Path | None, typer.Option(help="Instead of a job: a model (safetensors, up to 256 MiB).")] = None,
    task: Annotated[str, typer.Option(help="On whose public rows; by default the job's task.")] = "",
    round_number: RoundOption = "",
    best: BestOption = "",
    name: NameOption = "",
    priority: PriorityOption = None,
    timeout_s: JobTimeoutOption = None,
    request_id: RequestIdOption = None,
    and_wait: WaitOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on the public rows that the aggregator holds. It costs no privacy. Prints the job's id."""
    if bool(job_id) == (model is not None) or (model is not None and not task):
        raise typer.BadParameter("give the id of a JOB, or --model FILE and --task")
    from ..client import Evaluation, Job
    from ..client_messages import choice_of

    meant = choice_of(round_number, best)
    evaluation = Evaluation(job_id=job_id, task=task, model=b"" if model is None else _read(model), round=meant)
    terms = {"priority": _priority(priority), "timeout_s": timeout_s, "request_id": request_id, "name": name}
    _hand_in(Job(evaluation=evaluation), config, terms, and_wait=and_wait, out=out, as_json=as_json)


def export(
    job_id: Annotated[str, typer.Argument(help="The training whose model is meant.", show_default=False)],
    config: ConfigOption = DEFAULT_CONFIG,
    format_name: Annotated[str, typer.Option("--format", help="npz: NumPy's archive of named arrays.")] = "npz",
    round_number: RoundOption = "",
    best: BestOption = "",
    name: NameOption = "",
    priority: PriorityOption = None,
    timeout_s: JobTimeoutOption = None,
    request_id: RequestIdOption = None,
    and_wait: WaitOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a trained model into another format, with a signed manifest. It costs no privacy. Prints the job's id."""
    from ..client import Export, Job
    from ..client_messages import choice_of

    job = Job(export=Export(job_id=job_id, format=format_name, round=choice_of(round_number, best)))
    terms = {"priority": _priority(priority), "timeout_s": timeout_s, "request_id": request_id, "name": name}
    _hand_in(job, config, terms, and_wait=and_wait, out=out, as_json=as_json)


def wait_for(
    job_id: str, config: Path, *, timeout_s: float | None = None, out: Path | None = None, as_json: bool = False
) -> None:
    """Stay until a job is at rest, say how it ended, fetch its files where `out` is given."""
    if as_json or not sys.stdout.isatty():
        with connection.connected(config, patient=True) as client:
            job = client.wait(job_id, timeout_s)
    else:
        from .live import watch_live

        job = watch_live(config, job_id, timeout_s=timeout_s)
    _finish(job, config, out=out, as_json=as_json)


class Fetched(NamedTuple):
    """A job's files, by name, where they lie now; the roster that their signature was checked with, if it was."""

    files: dict[str, Path]
    roster: Path | None

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        paths = {name: str(path) for name, path in self.files.items()}
        return {"paths": paths, "signature_checked": self.roster is not None}


def outcome(job: Job) -> JobResult:
    """What a job brought; else raises what became of it, and says on stderr what it had released and can be had."""
    from ..client import result_of
    from .jobs_view import kept_words

    if kept := kept_words(job):
        say(f"models can be had {kept}", err=True)
    return result_of(job)


def fetch(client: SottoClient, job_id: str, out: Path, *, config: Path, **chosen: Any) -> Fetched:
    """Fetch the files of a job, or of a round that was `chosen`, and verify them by what the configuration pins."""
    from ..client_config import connection_of

    return Fetched(client.fetch_artifact(job_id, out, **chosen), connection_of(config)["roster"])


def print_result(job_id: str, brought: JobResult, *, fetched: Fetched | None, as_json: bool) -> None:
    """A job's result, where its files lie now, and whether anybody's signature vouches for them."""
    if as_json:
        from .plain import plain, print_json

        print_json({**plain(brought), **({"paths": {}} if fetched is None else fetched.to_json())})
        return
    from .jobs_view import result_lines

    planned = brought.rounds_planned
    of_round = f": the model of round {brought.round}; {brought.rounds_released} of {planned} rounds were released"
    echo([f"job {job_id}{of_round if planned else ' succeeded'}", *result_lines(brought)])
    if fetched is None:
        return
    echo(f"wrote {path}" for path in fetched.files.values())
    say(UNCHECKED if fetched.roster is None else f"signed by the aggregator, checked with {fetched.roster}")


# --- inside -----------------------------------------------------------------------------------------------------------


def _hand_in(job: Job, config: Path, terms: dict[str, Any], *, and_wait: bool, out: Path | None, as_json: bool) -> None:
    """Submit, print what was asked for, and stay where that was asked for."""
    job.display_name = terms.pop("name") or job.display_name
    stay = and_wait or out is not None
    inline_wait_s = INLINE_WAIT_S if stay and not job.HasField("federated_training") else 0.0
    with connection.connected(config, patient=stay) as client:
        submitted = client.submit(job, inline_wait_s=inline_wait_s, **terms)
        if job.HasField("federated_training") and not as_json:
            _warn(client, job, submitted.job_id)
        if as_json and not stay:
            submitted = client.get(submitted.job_id)
    if as_json and not stay:
        from .plain import job_to_json, print_json

        print_json(job_to_json(submitted))
    elif not as_json:
        echo(submitted.job_id)
        if job.HasField("federated_training"):
            from .jobs_view import asked

            # On stderr: stdout is the job's id. Nothing is left to the aggregator's defaults: every field was sent.
            say(f"asked: {'; '.join(asked(job.federated_training))}", err=True)
    if stay:
        wait_for(submitted.job_id, config, out=out, as_json=as_json)


def _warn(client: SottoClient, job: Job, job_id: str) -> None:
    """On stderr: who was not connected or has too little ε left, as the job's first event says; who is not ready for
    what was submitted, or has another version of its task."""
    from ..errors import SottoError
    from .tasks_view import warnings

    training = job.federated_training
    with contextlib.suppress(SottoError):  # the job is submitted, whether this can be said or not
        said = client.events(job_id)[0].message.partition("; ")[2]
        for line in [*filter(None, [said]), *warnings(client.status(), training.task, training.parties)]:
            say(f"warning: {line}", err=True)


def _finish(job: Job, config: Path, *, out: Path | None, as_json: bool) -> None:
    """Print a job at rest; raises what became of it unless it succeeded."""
    from .plain import job_to_json, print_json

    fetched = None
    if out is not None and job.HasField("result"):
        with connection.connected(config, patient=True) as client:
            fetched = fetch(client, job.job_id, out, config=config)
    if as_json:
        paths = {} if out is None else {"paths": {}} if fetched is None else fetched.to_json()
        print_json({**job_to_json(job), **paths})
    result = outcome(job)
    if not as_json:
        print_result(job.job_id, result, fetched=fetched, as_json=False)


def _make_job(file: Path | None, training: dict[str, Any], *, sections: dict[str, dict[str, Any]]) -> Job:
    """The job of a file with the options that were given put over it, validated before anything is sent."""
    from ..communication.generated.jobs_pb2 import Job
    from ..communication.options import MAX_UPLOAD_BYTES
    from ..jobs.spec import FederatedTrainingSpec
    from ..jobs.specs import load_job_file, model_bytes, spec_from_proto, spec_into_proto

    job = Job() if file is None else load_job_file(file)
    if file is None and training["task"] is None:
        raise typer.BadParameter("give a FILE, or --task and what else is to differ from the defaults")
    fields = {key: value for key, value in training.items() if value is not None}
    inner = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in sections.items()
    }
    inner = {section: values for section, values in inner.items() if values}
    kind = job.WhichOneof("spec")
    if kind not in (None, FederatedTrainingSpec.kind) and (fields or inner):
        raise typer.BadParameter(f"the job in {file} is of kind {kind}: options of a training do not apply to it")
    if not fields and not inner:
        return job
    known = {} if file is None else spec_from_proto(job, most_bytes=MAX_UPLOAD_BYTES).to_json()
    spec_into_proto(job, FederatedTrainingSpec.from_json(_over(known, {**fields, **inner})), model_bytes(job))
    return job


def _over(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`known` with what was given put over it, section by section."""
    merged = {
        key: _over(known.get(key) or {}, value) if isinstance(value, dict) else value for key, value in given.items()
    }
    return {**known, **merged}


def _start_from(job: Job, continues: str, config: Path, *, model: Path | None, build: bool) -> None:
    """Put in what a training starts from, where that is said: a released round of an earlier job (JOB, of which the
    last is meant, or JOB:ROUND), a model in a file, or the task's own model, built here."""
    if build and model is not None:
        raise typer.BadParameter("give --initial-model or --build-initial-model, not both")
    if (build or model is not None) and not job.HasField("federated_training"):
        raise typer.BadParameter("an initial model is of a training")
    if model is not None:
        job.federated_training.initial_model = _read(model)
    if build:
        _build_initial_model(job)
    if not continues:
        return
    if not job.HasField("federated_training") or job.federated_training.initial_model:
        raise typer.BadParameter("--continue is of a training, and takes the place of an initial model")
    job_id, _, choice = continues.partition(":")
    with connection.connected(config) as client:
        source = client.continued_from(job_id, round=choice)
    job.federated_training.continue_from.CopyFrom(source)


def _build_initial_model(job: Job) -> None:
    """Put the task's own model, as its seed initialises it, into the job."""
    from ..learning.task import find_task
    from ..learning.whole import built, model_file_of

    training = job.federated_training
    model = built(find_task(training.task), training.seed)
    training.initial_model = model_file_of(model).to_bytes()


def _priority(text: str | None) -> str | None:
    if text is not None and text.lower() not in ("high", "normal", "low"):
        raise typer.BadParameter("--priority is high, normal or low")
    return text


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}") from error
    if not content:  # which on the wire is none, and would begin from scratch in silence
        raise typer.BadParameter(f"{path} is empty: it is no model")
    return content
