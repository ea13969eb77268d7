"""What `sotto` prints without rich: plain JSON, and columns. Importing rich takes longer than a call."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any, Final

import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from ..communication.generated.jobs_pb2 import FederatedTraining, Job, JobPriority, JobState
from ..terminals import as_shown
from .screen import echo_json

STYLES: Final = {
    "SUCCEEDED": "green",
    "RELEASED": "green",
    "RUNNING": "cyan",
    "RETRYING": "magenta",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
}
"""By a job's or a round's state."""

_STRUCT: Final = "google.protobuf.Struct"
_DURATION: Final = "google.protobuf.Duration"
_GAP: Final = "  "
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


# --- JSON -------------------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """One line of JSON."""
    echo_json(value)


def job_to_json(job: Job) -> dict[str, Any]:
    """The wire's names; the specification as a job file has it, so that it can be submitted again."""
    body = plain(job)
    if job.HasField("timeout"):
        del body["timeout"]
        body["timeout_s"] = job.timeout.ToNanoseconds() / 1e9
    kind = job.WhichOneof("spec")
    if kind is not None:
        body[kind] = spec_to_json(getattr(job, kind))
    return body


def spec_to_json(spec: Any) -> dict[str, Any]:
    """A specification of the wire under the names of a job file: an encryption names its scheme, a model has at most
    its digest, and no bytes are shown."""
    hidden = {"initial_model", "model"}
    hidden |= {name for name in ("initial_model_sha256", "model_sha256") if not getattr(spec, name, b"")}
    body = {key: value for key, value in plain(spec).items() if key not in hidden}
    if isinstance(spec, FederatedTraining) and spec.HasField("encryption"):
        scheme = spec.encryption.WhichOneof("scheme")
        body["encryption"] = {
            **({"scheme": scheme} if scheme else {}),
            "resolution_bits": spec.encryption.resolution_bits,
        }
    return body


def plain(message: Any) -> dict[str, Any]:
    """A message as plain JSON under the wire's names: 64-bit numbers are numbers, bytes hex, an infinity "inf"."""
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if isinstance(value, Mapping) and field.message_type.full_name != _STRUCT:
            content[field.name] = {str(key): _plain_value(field, item) for key, item in sorted(value.items())}
        elif isinstance(value, MutableSequence):
            content[field.name] = [_plain_value(field, item) for item in value]
        else:
            content[field.name] = _plain_value(field, value)
    return content


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    name = value.DESCRIPTOR.full_name if hasattr(value, "DESCRIPTOR") else ""
    if name in (_STRUCT, _DURATION):
        from google.protobuf import json_format

        return json_format.MessageToDict(value)
    if name:
        return plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return field.enum_type.values_by_number[value].name if field.enum_type else value


# --- text -------------------------------------------------------------------------------------------------------------


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """A table of which nothing is ever cut. In a pipe each row is one line; on a terminal that is too narrow for that,
    the columns that have no room stand in further lines, indented, those of the header as well.

    Args:
        header: names of the columns.
        rows: cells; a state of a job gets its colour on a terminal.
        right: columns whose cells stand at the right.
    """
    terminal = sys.stdout.isatty()
    cells = [[as_shown(safe(cell), sys.stdout) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(header))]
    lines = []
    for number, line in enumerate(cells):
        for place, group in enumerate(_folded(widths, shutil.get_terminal_size().columns if terminal else sys.maxsize)):
            parts = []
            for index in group:
                cell, to_right = line[index], header[index] in right
                shown = cell.rjust(widths[index]) if to_right else cell.ljust(widths[index])
                if terminal and (number == 0 or cell in STYLES):
                    shown = typer.style(shown, bold=True) if number == 0 else typer.style(shown, fg=STYLES[cell])
                parts.append(shown)
            lines.append(((_GAP * 2 if place else "") + _GAP.join(parts)).rstrip())
    return "\n".join(lines)


def _folded(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns that stand in each line, so that no line is longer than `room` unless one column is."""
    groups: list[list[int]] = [[]]
    length = 0
    for index, width in enumerate(widths):
        if groups[-1] and length + len(_GAP) + width > room:
            groups.append([])
            length = len(_GAP)  # indented by two of them
        length += width + (len(_GAP) if groups[-1] or len(groups) > 1 else 0)
        groups[-1].append(index)
    return groups


def safe(text: str) -> str:
    """Without control characters: what somebody else named must not steer this terminal."""
    return (
        text
        if text.isprintable()
        else "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    )


def state_name(job: Job) -> str:
    """Of its state, and that its files are gone."""
    return JobState.Name(job.state) + (" (deleted)" if job.HasField("delete_time") else "")


def priority_name(value: JobPriority.ValueType) -> str:
    """high, normal or low."""
    return JobPriority.Name(value).lower() if value else "normal"


def about(job: Job) -> str:
    """What a job works on: the task of a training, what an evaluation or export is of."""
    kind = job.WhichOneof("spec")
    if kind == "federated_training":
        return job.federated_training.task
    if kind == "evaluation":
        return (
            f"{job.evaluation.task or 'model'} of {job.evaluation.job_id}"
            if job.evaluation.job_id
            else job.evaluation.task
        )
    return f"{job.export.format} of {job.export.job_id}" if kind == "export" else ""


def clock(timestamp: Timestamp) -> str:
    """A time for people, UTC."""
    return f"{timestamp.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"


def away(timestamp: Timestamp) -> str:
    """How long it is until then: "in 3 min"; "now" when it is over."""
    seconds = timestamp.ToNanoseconds() / 1e9 - time.time()
    return f"in {duration(seconds)}" if seconds >= 1 else "now"


def duration(seconds: float) -> str:
    """4.1 ms, 3.2 s, 4 min, 2 h 5 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Of so many bytes: 3.1 MB."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def real(value: float) -> str:
    """Four digits, or ∞."""
    return "∞" if math.isinf(value) else f"{value:.4g}"
