"""`sotto jobs …`: submit, watch and cancel jobs; fetch their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from . import connection, jobs_submit
from .connection import DEFAULT_CONFIG, ConfigOption, JobId, JsonOption
from .prose import say
from .screen import echo

if TYPE_CHECKING:
    from ..client import Job, JobEvent

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Submit, watch and cancel jobs; fetch their results.",
)
LARGEST_PAGE: Final = 1000
"""More than that the aggregator puts into no page."""

TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Seconds to wait; the job goes on after them.")
]
AfterOption = Annotated[int, typer.Option("--after", min=0, help="Leave out events up to this number.")]


@app.callback()
def _group() -> None:
    """Submit, watch and cancel jobs; fetch their results."""


app.command(cls=jobs_submit.Submit)(jobs_submit.submit)
app.command()(jobs_submit.evaluate)
app.command()(jobs_submit.export)


@app.command("list")
def list_jobs(
    config: ConfigOption = DEFAULT_CONFIG,
    filter_text: Annotated[
        str, typer.Option("--filter", help='Such as \'kind = "export" AND create_time >= "2026-01-31T00:00:00Z"\'.')
    ] = "",
    order_by: Annotated[str, typer.Option("--order-by", help="Such as 'priority desc, create_time'.")] = "",
    state: Annotated[str, typer.Option(help="Only jobs in this state, such as RUNNING.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="Deleted jobs too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first unless asked otherwise."""
    wanted = _filter(filter_text, state)
    with connection.connected(config) as client:
        jobs = client.list(
            wanted,
            order_by,
            page_size=min(limit, LARGEST_PAGE),
            limit=limit,
            show_deleted=everything,
        )
    if as_json:
        from .plain import job_to_json, print_json

        print_json([job_to_json(job) for job in jobs])
        return
    from .jobs_view import jobs_table

    echo(jobs_table(jobs).split("\n"), styled=True)


def _filter(text: str, state: str) -> str:
    """Both of them."""
    if not state:
        return text
    from ..communication.generated.jobs_pb2 import JobState

    known = [name for name, number in JobState.items() if number]
    if state.upper() not in known:
        raise typer.BadParameter(f"--state is one of {', '.join(known)}")
    only = f"state = {state.upper()}"
    return f"({text}) AND {only}" if text.strip() else only


@app.command()
def show(job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show a job: its state, its progress, its rounds, its result or why it failed."""
    with connection.connected(config) as client:
        job = client.get(job_id)
    if as_json:
        _print_job(job)
        return
    from .jobs_view import job_lines, rounds_table

    echo(job_lines(job))
    if job.progress.rounds:
        echo(["", *rounds_table(job.progress.rounds).split("\n")], styled=True)


@app.command()
def watch(
    job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, after: AfterOption = 0, as_json: JsonOption = False
) -> None:
    """Follow a job until it is at rest: a live view on a terminal, a line an event elsewhere.

    The exit code is 0 only if it succeeded, as that of `jobs wait`.
    """
    if not as_json and not after and sys.stdout.isatty():
        from .live import watch_live

        job = watch_live(config, job_id)
    else:
        with connection.connected(config, patient=True) as client:
            for event in client.watch(job_id, after_sequence=after):
                _print_event(event, as_json=as_json)
            job = client.get(job_id)
    jobs_submit.outcome(job)


@app.command()
def history(
    job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, after: AfterOption = 0, as_json: JsonOption = False
) -> None:
    """What has happened to a job so far, a line an event, without following it."""
    with connection.connected(config) as client:
        events = client.events(job_id, after)
    for event in events:
        _print_event(event, as_json=as_json)


@app.command()
def wait(
    job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, timeout: TimeoutOption = None, as_json: JsonOption = False
) -> None:
    """Wait until a job is at rest. The exit code is 0 only if it succeeded."""
    jobs_submit.wait_for(job_id, config, timeout_s=timeout, as_json=as_json)


@app.command()
def cancel(
    job_id: JobId,
    config: ConfigOption = DEFAULT_CONFIG,
    keep: Annotated[
        bool, typer.Option("--keep", help="End it in order, with its last released round as its result.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a job to stop. A job at rest stays as it is."""
    with connection.connected(config) as client:
        job = client.cancel(job_id, keep=keep)
    _print_job(job) if as_json else _print_state(job)


@app.command()
def delete(job_id: JobId, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Drop the files of a job at rest. Its record stays: what it spent is spent."""
    with connection.connected(config) as client:
        job = client.delete(job_id)
    _print_job(job) if as_json else _print_state(job)


@app.command()
def result(
    job_id: JobId,
    config: ConfigOption = DEFAULT_CONFIG,
    out: Annotated[Path | None, typer.Option(help="Fetch the files into this directory and verify them.")] = None,
    round_number: jobs_submit.RoundOption = "",
    best: jobs_submit.BestOption = "",
    as_json: JsonOption = False,
) -> None:
    """Print a job's result; with --out fetch and verify its files.

    With --round or --best it is that of a released round, whatever has become of the job; so it is that of the last
    one, if nothing else is said, of a job that failed or was cancelled.
    """
    with connection.connected(config, patient=out is not None) as client:
        round_number = round_number or ("" if best else _last_if_it_ended_early(client.get(job_id)))
        brought = client.result(job_id, round=round_number, best=best)
        chosen = {"round": brought.round or round_number} if round_number or best else {}
        fetched = None if out is None else jobs_submit.fetch(client, job_id, out, config=config, **chosen)
    jobs_submit.print_result(job_id, brought, fetched=fetched, as_json=as_json)


def _last_if_it_ended_early(job: Job) -> str:
    """Which round is meant of a job where none is named: of one that ended without a result the last, which is said."""
    from ..communication.generated.jobs_pb2 import CANCELLED, FAILED
    from .plain import state_name

    if job.state not in (FAILED, CANCELLED) or not job.kept_rounds:
        return ""
    say(f"job {job.job_id} is {state_name(job)}: this is what it had released", err=True)
    return "last"


def _print_job(job: Job) -> None:
    from .plain import job_to_json, print_json

    print_json(job_to_json(job))


def _print_state(job: Job) -> None:
    from .plain import state_name

    echo(f"{job.job_id} {state_name(job)}")


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        from .plain import plain, print_json

        print_json(plain(event))
        return
    from .jobs_view import event_line

    echo(event_line(event))
