"""`sotto jobs …`: submit, watch and cancel jobs; fetch their results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from ..client import SottoClient
    from ..communication.generated.jobs_pb2 import Job, JobEvent, JobResult

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Submit, watch and cancel jobs; fetch their results.",
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="SOTTO_CLIENT_CONFIG", help="client.yaml: where the aggregator is.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or one a line for events.")]
JobId = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Seconds to wait; the job goes on after them.")
]
DEFAULT_CONFIG: Final = Path("client.yaml")
IMPATIENT_S: Final = 2.0
"""How long somebody at a terminal is kept before hearing that the aggregator cannot be reached."""


@app.callback()
def _group() -> None:
    """Submit, watch and cancel jobs; fetch their results."""


@app.command()
def submit(  # each parameter is an option of the command
    file: Annotated[Path | None, typer.Argument(help="A job in YAML or JSON.", show_default=False)] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    task: Annotated[str | None, typer.Option(help="Instead of a file: the task to train.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds that release a model.")] = None,
    spare_rounds: Annotated[int | None, typer.Option(min=0, help="Rounds that may replace failed ones.")] = None,
    quorum: Annotated[int | None, typer.Option(min=0, help="Updates that a round needs; 0: of all invited.")] = None,
    parties: Annotated[str | None, typer.Option(help="Invited, separated by commas; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Local steps a round.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the local steps.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Example-level ε of the whole job, at each party.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Of the party-level noise.")] = None,
    clipping_norm: Annotated[float | None, typer.Option(help="L2 bound of a party's update.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of split and initialisation.")] = None,
    round_timeout: Annotated[float | None, typer.Option(help="Seconds for a round.")] = None,
    name: Annotated[str, typer.Option(help="A name to recognise the job by.")] = "",
    request_id: Annotated[str | None, typer.Option(help="Sent again, it gives the same job.")] = None,
    build_initial_model: Annotated[
        bool,
        typer.Option("--build-initial-model", help="Build the task's model here: for an aggregator without torch."),
    ] = False,
    and_wait: Annotated[bool, typer.Option("--wait", help="Stay until the job is at rest, as `jobs wait`.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a job, from FILE or from options; options win over the file. Prints the job's id."""
    training = {
        "task": task,
        "rounds": rounds,
        "spare_rounds": spare_rounds,
        "quorum": quorum,
        "parties": None if parties is None else [each.strip() for each in parties.split(",")],
        "seed": seed,
        "round_timeout_s": round_timeout,
    }
    local = {"steps": steps, "learning_rate": learning_rate, "epsilon": epsilon}
    privacy = {"noise_multiplier": noise_multiplier, "clipping_norm": clipping_norm}
    job = _make_job(file, training, sections={"local_training": local, "party_privacy": privacy}, name=name)
    if build_initial_model:
        _build_initial_model(job)
    with _client(config) as client:
        submitted = client.submit(job, request_id)
    if and_wait:
        if not as_json:
            typer.echo(submitted.job_id)
        wait(submitted.job_id, config, as_json=as_json)
        return
    if as_json:
        _print_json(_job_to_json(submitted))
    else:
        typer.echo(submitted.job_id)


def _build_initial_model(job: Job) -> None:
    """Put the task's own model, as its seed initialises it, into the job."""
    from ..learning.flatten import model_to_tensors, to_safetensors
    from ..learning.task import find_task

    training = job.federated_training
    model = find_task(training.task).build_model(training.seed)
    training.initial_model = to_safetensors(model_to_tensors(model))


@app.command("list")
def list_jobs(
    config: ConfigOption = DEFAULT_CONFIG,
    state: Annotated[str, typer.Option(help="Only jobs in this state, such as RUNNING.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with _client(config) as client:
        jobs = client.list_jobs(state=state.upper(), limit=limit)
    if as_json:
        _print_json([_job_to_json(job) for job in jobs])
        return
    from .jobs_view import jobs_table, print_rich

    print_rich(jobs_table(jobs))


@app.command()
def show(job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show a job: its state, its progress, its rounds, its result or why it failed."""
    with _client(config) as client:
        job = client.get(job_id)
    if as_json:
        _print_json(_job_to_json(job))
        return
    from .jobs_view import job_lines, print_rich, rounds_table

    print_rich("\n".join(job_lines(job)))
    if job.progress.rounds:
        print_rich(rounds_table(job))


@app.command()
def watch(
    job_id: JobId,
    config: ConfigOption = DEFAULT_CONFIG,
    after: Annotated[int, typer.Option(min=0, help="Leave out events up to this number.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Follow a job until it is at rest: a table on a terminal, a line an event elsewhere."""
    with _client(config, patient=True) as client:
        if as_json or not sys.stdout.isatty():
            for event in client.watch(job_id, after_sequence=after):
                _print_event(event, as_json=as_json)
        else:
            _watch_live(client, job_id)


@app.command()
def wait(
    job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, timeout: TimeoutOption = None, as_json: JsonOption = False
) -> None:
    """Wait until a job is at rest. The exit code is 0 only if it succeeded."""
    from ..client import result_of

    with _client(config, patient=True) as client:
        if as_json or timeout is not None or not sys.stdout.isatty():
            job = client.wait(job_id, timeout)
        else:
            job = _watch_live(client, job_id)
    if as_json:
        _print_json(_job_to_json(job))
    result = result_of(job)
    if not as_json:
        _print_result(job_id, result)


@app.command()
def cancel(job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Ask a job to stop. A job at rest stays as it is."""
    from ..communication.generated.jobs_pb2 import JobState

    with _client(config) as client:
        job = client.cancel(job_id)
    if as_json:
        _print_json(_job_to_json(job))
    else:
        typer.echo(f"{job.job_id} {JobState.Name(job.state)}")


@app.command()
def result(
    job_id: JobId,
    config: ConfigOption = DEFAULT_CONFIG,
    out: Annotated[Path | None, typer.Option(help="Fetch model and manifest into this directory.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a finished job's result; with --out fetch and verify its files."""
    with _client(config, patient=out is not None) as client:
        brought = client.result(job_id)
        files = client.fetch_artifact(job_id, out) if out is not None else {}
    if as_json:
        paths = {name: str(path) for name, path in files.items()}
        _print_json({**_message_to_json(brought), "paths": paths})
        return
    _print_result(job_id, brought)
    for path in files.values():
        typer.echo(f"wrote {path}")


# --- inside -----------------------------------------------------------------------------------------------------------


@contextmanager
def _client(config: Path, *, patient: bool = False) -> Iterator[SottoClient]:
    """A connection; a patient one outlives a restart of the aggregator, the others soon say that it is not there."""
    from ..client import RETRY_FOR_S, SottoClient

    with SottoClient.from_config(config, retry_for_s=RETRY_FOR_S if patient else IMPATIENT_S) as client:
        yield client


def _make_job(file: Path | None, training: dict[str, Any], *, sections: dict[str, dict[str, Any]], name: str) -> Job:
    """The job of a file with the options that were given put over it, validated before anything is sent."""
    from ..communication.generated.jobs_pb2 import Job
    from ..jobs.spec import FederatedTrainingSpec, load_job_file, spec_from_proto, spec_to_proto

    job = Job() if file is None else load_job_file(file)
    if file is None and training["task"] is None:
        raise typer.BadParameter("give a FILE, or --task and what else is to differ from the defaults")
    fields = {} if file is None else spec_from_proto(job).to_json()
    fields |= {key: value for key, value in training.items() if value is not None}
    for section, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        fields[section] = {**fields.get(section, {}), **given}
    model = job.federated_training.initial_model
    job.federated_training.CopyFrom(spec_to_proto(FederatedTrainingSpec.from_json(fields), model))
    job.display_name = name or job.display_name
    return job


def _watch_live(client: SottoClient, job_id: str) -> Job:
    """A table of rounds that follows the job; what it waits for is asked for with every event."""
    from rich.live import Live

    from .jobs_view import live_view

    job = client.get(job_id)
    with Live(live_view(job, ""), refresh_per_second=4) as live:
        for event in client.watch(job_id):
            job = client.get(job_id)
            live.update(live_view(job, event.message))
    return job


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_message_to_json(event), ensure_ascii=False))
        return
    from .jobs_view import event_line

    typer.echo(event_line(event))


def _print_result(job_id: str, brought: JobResult) -> None:
    from .jobs_view import result_lines

    typer.echo("\n".join([f"job {job_id} succeeded", *result_lines(brought)]))


def _job_to_json(job: Job) -> dict[str, Any]:
    """The wire's names; the specification as a job file has it, so that it can be submitted again."""
    from ..jobs.spec import spec_from_proto

    body = _message_to_json(job)
    body["federated_training"] = spec_from_proto(job).to_json()
    return body


def _message_to_json(message: Any) -> dict[str, Any]:
    """Plain JSON: 64-bit numbers as numbers, digests in hex, an infinite ε as "inf"."""
    from .jobs_view import plain

    return plain(message)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
