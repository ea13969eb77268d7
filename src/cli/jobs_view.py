"""How `sotto jobs` shows things: lines, tables, and plain JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from ..communication.generated.jobs_pb2 import Job, JobEvent, JobResult, JobState, RoundSummary

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_STYLES: Final = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "CANCELLING": "yellow"}

_WIDE: Final = 400
"""Columns for a pipe or a file: more than any table here has, so that nothing is cut."""


def print_rich(renderable: Any) -> None:
    """To stdout, as wide as the terminal, or as it needs where there is none. Nothing in it is taken for markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    Console(markup=False, highlight=False, width=width).print(renderable, soft_wrap=isinstance(renderable, str))


def jobs_table(jobs: Sequence[Job]) -> Table:
    """One line a job."""
    table = _table("job", "state", "task", "rounds", "created", "owner", "name")
    for job in jobs:
        table.add_row(
            job.job_id,
            _state(job.state),
            job.federated_training.task,
            f"{job.progress.rounds_released}/{job.progress.rounds_planned}",
            _time(job.create_time),
            job.owner,
            job.display_name,
        )
    return table


def job_lines(job: Job) -> list[str]:
    """What there is to say of a job, but its rounds."""
    progress = job.progress
    failed = f", {progress.rounds_failed} failed" if progress.rounds_failed else ""
    lines = [
        f"job      {job.job_id} {job.display_name}".rstrip(),
        f"owner    {job.owner}",
        f"state    {JobState.Name(job.state)}",
        f"task     {job.federated_training.task}",
        f"rounds   {progress.rounds_released} of {progress.rounds_planned} released{failed}",
        f"created  {_time(job.create_time)}",
    ]
    if job.HasField("start_time"):
        lines.append(f"started  {_time(job.start_time)}")
    if job.HasField("end_time"):
        lines.append(f"ended    {_time(job.end_time)}")
    elif progress.queue_position:
        lines.append(f"queue    number {progress.queue_position}")
    else:
        waiting = f", waiting for {', '.join(progress.waiting_for)}" if progress.waiting_for else ""
        lines.append(f"doing    {progress.stage}{waiting}")
    if job.HasField("error"):
        error = job.error
        parties = f" (parties: {', '.join(error.parties)})" if error.parties else ""
        stage = f" in {error.stage}" if error.stage else ""
        lines.append(f"error    {error.reason}{stage}: {error.message}{parties}")
    if job.HasField("result"):
        lines += result_lines(job.result)
    return lines


def result_lines(result: JobResult) -> list[str]:
    """Metrics, guarantees and files."""
    lines = [f"{name:<8} {value:.4f}" for name, value in sorted(result.metrics.items())] or ["not evaluated"]
    lines.append(f"ε        {_real(result.epsilon_example)} for one example of a party's data, δ = {result.delta:g}")
    lines.append(
        f"ε        {_real(result.epsilon_party)} for a whole party; "
        f"{_real(result.epsilon_party_against_aggregator)} against the aggregator"
    )
    lines += [f"file     {file.name} ({file.bytes} bytes, SHA-256 {file.sha256.hex()})" for file in result.files]
    return lines


def event_line(event: JobEvent) -> str:
    """One event for a log."""
    extra = f" ({_round_words(event.round)})" if event.HasField("round") else ""
    return f"{event.sequence:>4} {_time(event.time)} {JobState.Name(event.state):<10} {event.message}{extra}"


def rounds_table(job: Job) -> Table:
    """One line a round that ended."""
    table = _table("round", "state", "updates", "metrics", "ε party", "ε vs aggr.", "ε rows left", "MB up", "s")
    for each in job.progress.rounds:
        left = [party.example_epsilon_left for party in each.parties if party.HasField("example_epsilon_left")]
        table.add_row(
            str(each.round),
            _state(each.state),
            str(each.contributions),
            _metrics(each.metrics),
            _real(each.epsilon_party),
            _real(each.epsilon_party_against_aggregator),
            _real(min(left)) if left else "-",
            f"{sum(party.bytes_up for party in each.parties) / 1e6:.2f}",
            f"{each.seconds:.1f}",
        )
    return table


def live_view(job: Job, message: str) -> Group:
    """A job that is being watched."""
    from rich.console import Group
    from rich.text import Text

    return Group(rounds_table(job), Text("\n".join(job_lines(job))), Text(message, style="dim"))


def plain(message: Any) -> dict[str, Any]:
    """A message as plain JSON under the wire's names: 64-bit numbers are numbers, bytes hex, an infinity "inf"."""
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if isinstance(value, Mapping):
            content[field.name] = {str(key): _plain_value(field, item) for key, item in sorted(value.items())}
        elif isinstance(value, MutableSequence):
            content[field.name] = [_plain_value(field, item) for item in value]
        else:
            content[field.name] = _plain_value(field, value)
    return content


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Struct):
        return json_format.MessageToDict(value)
    if hasattr(value, "DESCRIPTOR"):
        return plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return field.enum_type.values_by_number[value].name if field.enum_type else value


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index < 2)  # who is meant, and how it is, never break
    return table


def _state(state: Any) -> Any:
    from rich.text import Text

    name = state if isinstance(state, str) else JobState.Name(state)
    return Text(name, style=_STYLES.get(name, ""))


def _round_words(each: RoundSummary) -> str:
    words = [f"{each.contributions} updates"] if each.contributions else []
    words += [_metrics(each.metrics)] if each.metrics else []
    words += [f"party-level ε {_real(each.epsilon_party)}"] if each.state == "RELEASED" else []
    words += [each.reason] if each.reason else []
    return ", ".join(words) or each.state.lower()


def _metrics(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items())) or "not evaluated"


def _real(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _time(timestamp: Timestamp) -> str:
    return f"{timestamp.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
