"""`sotto status`: how the aggregator is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .connection import DEFAULT_CONFIG, ConfigOption, JsonOption, connected
from .screen import echo

if TYPE_CHECKING:
    from ..client import Status
    from ..communication.generated.jobs_pb2 import PoolStatus

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def status(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show how the aggregator is: its parties, its workers, its queue. It answers while every worker is busy."""
    with connected(config) as client:
        found = client.status()
    from .plain import plain, print_json

    if as_json:
        print_json(plain(found))
    else:
        echo(status_lines(found), styled=True)


def status_lines(found: Status) -> list[str]:
    """All of it, for people."""
    from .plain import clock, columns
    from .tasks_view import task_rows

    lines = [
        f"aggregator of {found.federation}, sotto {found.software_version}",
        f"custody  {found.custody}",
        f"key id   {found.key_id}",
    ]
    if found.HasField("start_time"):
        lines.append(f"serving  since {clock(found.start_time)}")
    if found.stopping:
        lines.append("stopping it takes no jobs")
    lines.append(f"jobs     {found.jobs_running} running, {found.jobs_pending} waiting")
    lines += [f"warning  {text}" for text in found.warnings]
    lines += _worker_lines(found.workers)
    rows = [(each.party, "connected" if each.connected else "away", each.waiting_for or "-") for each in found.parties]
    if not rows:
        return [*lines, "parties  none"]
    warnings = [f"warning  {each.party}: {text}" for each in found.parties for text in each.warnings]
    lines += ["", *columns(("party", "", "waiting for"), rows).split("\n"), *warnings]
    tasks = task_rows(found)
    return [*lines, "", *columns(("task", "party", ""), tasks).split("\n")] if tasks else lines


def _worker_lines(pool: PoolStatus) -> list[str]:
    from .plain import columns, duration

    made = [
        f"{count} {word}"
        for word, count in (
            ("failed", pool.tasks_failed),
            ("refused", pool.tasks_refused),
            ("cancelled", pool.tasks_cancelled),
        )
        if count
    ]
    changed = [
        f"{count} {word}"
        for word, count in (
            ("replaced", pool.replaced),
            ("recycled", pool.recycled),
            ("added", pool.grown),
            ("let go", pool.shrunk),
        )
        if count
    ]
    lines = [
        f"workers  {pool.busy} of {pool.size} busy ({pool.min_size} to {pool.max_size}), {pool.waiting} units waiting",
        f"units    {', '.join([f'{pool.tasks_done} done', *made])}; failure rate {pool.failure_rate:.1%}",
        f"         {', '.join([f'{pool.started} workers started', *changed])}",
    ]
    if not pool.units:
        return lines
    rows = [
        [
            each.name,
            str(each.done),
            str(each.failed),
            *(duration(each_s) for each_s in (each.mean_s, each.p50_s, each.p95_s, each.longest_s)),
        ]
        for each in pool.units
    ]
    header = ("unit", "done", "failed", "mean", "median", "p95", "longest")
    return [*lines, "", *columns(header, rows, right=header[1:]).split("\n")]
