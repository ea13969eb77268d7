"""How `sotto jobs` shows a job: lines for a log, and a view that follows it on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..communication.generated.jobs_pb2 import FederatedTraining, Job, JobEvent, JobResult, JobState, RoundSummary
from ..jobs.keeping import LARGER_IS_BETTER, ROWS, SMALLER_IS_BETTER
from ..privacy.accounting import MEANINGLESS_EPSILON
from .plain import STYLES, about, away, clock, columns, priority_name, real, safe, size, state_name
from .prose import assuming, prose

if TYPE_CHECKING:
    from rich.console import Group

SHOWN_KEPT: Final = 10
SHOWN_ROUNDS: Final = 8
SHOWN_EVENTS: Final = 5
"""The last ones, in a view that has to fit on a terminal."""

_HANG: Final = " " * 9
"""Before the further lines of a fact: as wide as the word before it."""
_ROW: Final = "ε a row spent/left"
_WHAT_A_ROW_IS: Final = (
    f"{_ROW}: by the party's own ledger, once that round was charged: what all jobs so far cost a row of its data, at "
    "the job's δ, and what is left of its budget, at the δ of its limit; the most and the least of all parties that "
    "say it"
)
_OTHERS: Final = ("ε vs aggr.", "ε vs all")
_RIGHT: Final = ("round", "updates", _ROW, "ε party", *_OTHERS, "up", "s")


def jobs_table(jobs: Sequence[Job]) -> str:
    """One line a job."""
    rows = [
        (
            job.job_id,
            state_name(job),
            priority_name(job.priority),
            job.kind or job.WhichOneof("spec") or "",
            about(job),
            _rounds_of(job),
            clock(job.create_time),
            job.owner,
            job.display_name,
        )
        for job in jobs
    ]
    return columns(("job", "state", "priority", "kind", "of", "rounds", "created", "owner", "name"), rows)


def _rounds_of(job: Job) -> str:
    progress = job.progress
    return f"{progress.rounds_released}/{progress.rounds_planned}" if progress.rounds_planned else "-"


def job_lines(job: Job) -> list[str]:
    """What there is to say of a job, but its rounds."""
    lines = [
        f"job      {job.job_id} {safe(job.display_name)}".rstrip(),
        f"owner    {job.owner}",
        f"kind     {job.kind or job.WhichOneof('spec')}: {safe(about(job))}",
        f"state    {state_name(job)}",
        f"priority {priority_name(job.priority)}",
    ]
    if job.HasField("federated_training") and job.federated_training.HasField("local_training"):
        first, *others = asked(job.federated_training)
        lines += [f"asked    {first}", *(f"{_HANG}{each}" for each in others)]
    lines += _progress_lines(job)
    lines.append(f"created  {clock(job.create_time)}")
    for word, name in (("started", "start_time"), ("ended", "end_time"), ("deleted", "delete_time")):
        if job.HasField(name):  # type: ignore[arg-type]  # one of three names
            lines.append(f"{word:<8} {clock(getattr(job, name))}")
    if job.HasField("deadline") and not job.HasField("end_time"):
        lines.append(f"deadline {clock(job.deadline)}, {away(job.deadline)}")
    if job.HasField("error"):
        lines.append(f"error    {_error_words(job)}")
    lines = [each for line in lines for each in prose(line.lstrip(), indent=_indent_of(line), hang=_HANG)]
    return [*lines, *(result_lines(job.result) if job.HasField("result") else [])]


def _indent_of(line: str) -> str:
    return _HANG if line.startswith(_HANG) else ""


def asked(training: FederatedTraining) -> list[str]:
    """What a training asks for, all defaults filled in, the price first."""
    local, privacy = training.local_training, training.party_privacy
    rounds, spare = training.rounds, training.spare_rounds
    many = f"{rounds + spare} rounds" if rounds + spare > 1 else "round"
    price = f"ε ≤ {real(local.epsilon)} a row at δ = {local.delta:g}"
    if spare:
        price += f": with all {many}, spare ones included; less while those are not needed"
    planned = f"{rounds} rounds" if rounds > 1 else "1 round"
    planned += f" and up to {spare} spare" if spare else ", no spare ones"
    invited = f"of {', '.join(training.parties)}" if training.parties else "of all parties"
    needed = f", {training.quorum} of them needed" if training.quorum else ", each needed"
    steps = f"{local.steps} step{'s' if local.steps > 1 else ''} a round"
    noise = (
        f", party-level noise multiplier {privacy.noise_multiplier:g}"
        if training.strategy == "fedavg"
        else ", trusted aggregator"
        if training.trusted_aggregator
        else ""
    )
    source = training.continue_from
    goes_on = f"from round {source.round} of job {source.job_id}, whose cost comes on top" if source.job_id else ""
    keeps = f"the models of rounds kept: {training.keep}" if training.keep else ""
    return [
        price,
        *(safe(each) for each in (goes_on, keeps) if each),
        safe(f"{training.task} by {training.strategy}, {planned}, {invited}{needed}"),
        f"{steps} at sampling rate {local.sampling_rate:g}{noise}",
    ]


def _progress_lines(job: Job) -> list[str]:
    progress = job.progress
    lines = []
    if progress.rounds_planned:
        failed = f", {progress.rounds_failed} failed" if progress.rounds_failed else ""
        lines.append(f"rounds   {progress.rounds_released} of {progress.rounds_planned} released{failed}")
    if kept := kept_words(job):
        lines.append(f"models   {kept}")
    if job.attempt > 1 or job.HasField("retry_time"):
        after = f"; the next one {away(job.retry_time)}" if job.HasField("retry_time") else ""
        lines.append(f"attempt  {job.attempt} of {job.max_attempts}{after}")
    if progress.bytes_received:
        lines.append(f"received {size(progress.bytes_received)} from the parties")
    if job.HasField("end_time"):
        return lines
    if progress.queue_position:
        lines.append(f"queue    number {progress.queue_position}")
    waiting = f", waiting for {', '.join(progress.waiting_for)}" if progress.waiting_for else ""
    if progress.stage or waiting:
        lines.append(f"doing    {safe(progress.stage)}{waiting}")
    if progress.parties:
        lines.append(f"parties  {', '.join(f'{each.party} {each.state.lower()}' for each in progress.parties)}")
    if progress.HasField("estimated_end_time"):
        lines.append(f"ends     about {clock(progress.estimated_end_time)}, {away(progress.estimated_end_time)}")
    return lines


def kept_words(job: Job) -> str:
    """Of which released rounds a job that has no result (yet) keeps models, and how one is had; empty for none."""
    if not job.kept_rounds or job.HasField("result"):
        return ""
    numbers = ", ".join(map(str, job.kept_rounds[-SHOWN_KEPT:]))
    more = f" and {len(job.kept_rounds) - SHOWN_KEPT} before" if len(job.kept_rounds) > SHOWN_KEPT else ""
    measured = {name for each in job.progress.rounds for name in each.metrics} & (LARGER_IS_BETTER | SMALLER_IS_BETTER)
    best = f" (or --best {min(measured)})" if measured else ""
    return f"of round {numbers}{more}: sotto jobs result {job.job_id} --round {job.kept_rounds[-1]}{best}"


def _error_words(job: Job) -> str:
    error = job.error
    parties = f" (parties: {', '.join(error.parties)})" if error.parties else ""
    stage = f" in {error.stage}" if error.stage else ""
    log = f"; in the aggregator's log: {error.log_reference}" if error.log_reference else ""
    return safe(f"{error.reason}{stage}: {error.message}{parties}{log}")


def result_lines(result: JobResult) -> list[str]:
    """Metrics, guarantees and files."""
    lines = [f"{safe(name):<8} {_metric(name, value)}" for name, value in sorted(result.metrics.items())]
    if result.not_evaluated or not lines:
        lines += prose(_not_evaluated(result.not_evaluated), hang=_HANG)
    if not result.HasField("epsilon_example"):
        lines.append("ε        unknown: the model came with the job")
    else:
        lines += _guarantee_lines(result)
    for each in result.continued_from:
        cost = f"ε {real(each.epsilon_example)} of a row at δ = {each.delta:g}"
        word = f"goes on  from round {each.round} of job {each.job_id}: the {cost} which that has cost comes on top"
        lines += prose(word, hang=_HANG)
    for file in result.files:
        lines += prose(f"file     {file.name} ({file.bytes} bytes, SHA-256 {file.sha256.hex()})", hang=_HANG)
    return lines


def _guarantee_lines(result: JobResult) -> list[str]:
    """ε for a row and for a party, each with its δ, what it rests on, and what is left against others; in short for a
    party that nothing protects: whoever else is looked at, it is no better."""
    row = f"ε        {real(result.epsilon_example)} for one example of a party's data, δ = {result.delta:g}"
    row += _if_others_collude(result, "epsilon_example_if_all_others_collude")
    party = f"ε        {real(result.epsilon_party)} for a whole party"
    party += f", δ = {result.party_delta:g}" if result.HasField("party_delta") else ""
    party += f"; {real(result.epsilon_party_against_aggregator)} against the aggregator"
    party += _if_others_collude(result, "epsilon_party_if_all_others_collude")
    party += ": no meaningful party-level guarantee" if result.epsilon_party > MEANINGLESS_EPSILON else ""
    against = result.party_assumption_against_aggregator
    against = "" if against == result.party_assumption else against
    lines = [*prose(row, hang=_HANG), *assuming("assumes", safe(result.example_assumption), indent=_HANG)]
    if math.isinf(result.epsilon_party):
        at = f" at δ = {result.party_delta:g}" if result.HasField("party_delta") else ""
        return [*lines, f"{_HANG}party level: no meaningful guarantee (ε ∞{at})"]
    return [
        *lines,
        *prose(party, hang=_HANG),
        *assuming("assumes", safe(result.party_assumption), indent=_HANG),
        *assuming("against the aggregator assumes", safe(against), indent=_HANG),
    ]


def _if_others_collude(message: JobResult, name: str) -> str:
    return f"; {real(getattr(message, name))} if all others collude" if message.HasField(name) else ""  # type: ignore[arg-type]


def event_line(event: JobEvent) -> str:
    """One event for a log."""
    extra = f" ({_round_words(event.round)})" if event.HasField("round") else ""
    cause = f" [{event.cause}]" if event.cause else ""
    text = f"{event.message}{extra}{cause}"
    return f"{event.sequence:>4} {clock(event.time)} {JobState.Name(event.state):<10} {safe(text)}"


def rounds_table(rounds: Iterable[RoundSummary]) -> str:
    """One line a round that ended, what the figures for a party rest on, and what is left of what."""
    shown = list(rounds)
    header, cells = _rounds_of_table(shown)
    notes = []
    last = [each for each in shown if each.party_assumption][-1:]
    for each in [each for each in last if not math.isinf(each.epsilon_party)]:  # an infinite ε rests on nothing
        word = f"ε of a party at δ = {each.party_delta:g}: assumes"
        notes += assuming(word, safe(each.party_assumption), indent="")
    notes += prose(_WHAT_A_ROW_IS) if _ROW in header else []
    return "\n".join([columns(header, cells, right=_RIGHT), *notes])


_ROUND_HEADER: Final = (
    *("round", "state", "updates", "metrics"),
    *(_ROW, "ε party", *_OTHERS, "up", "s"),
)


def _rounds_of_table(rounds: Sequence[RoundSummary]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and cells. Of rows there is no column where no party says anything of them; of others than who sees the
    releases none where nothing protects against those already."""
    cells = [_round_cells(each) for each in rounds]
    empty = {_ROW} if all(row[_ROUND_HEADER.index(_ROW)] == "-" for row in cells) else set()
    released = [each.epsilon_party for each in rounds if each.state == "RELEASED"]
    empty |= set(_OTHERS) if released and all(map(math.isinf, released)) else set()
    kept = [place for place, name in enumerate(_ROUND_HEADER) if name not in empty]
    return [_ROUND_HEADER[place] for place in kept], [[row[place] for place in kept] for row in cells]


def _round_cells(each: RoundSummary) -> list[str]:
    return [
        str(each.round),
        each.state,
        str(each.contributions),
        _metrics(each.metrics),
        _row_figure(each),
        real(each.epsilon_party),
        real(each.epsilon_party_against_aggregator),
        real(each.epsilon_party_if_all_others_collude) if each.HasField("epsilon_party_if_all_others_collude") else "-",
        size(sum(party.bytes_up for party in each.parties)),
        f"{each.seconds:.1f}" if each.HasField("seconds") else "-",
    ]


def _row_figure(each: RoundSummary) -> str:
    """What a row has spent at most, and what it has left at least; "-" where no party says."""
    spent = [party.example_epsilon_spent for party in each.parties if party.HasField("example_epsilon_spent")]
    left = _left(each)
    return f"{real(max(spent)) if spent else '-'}/{left}" if spent or left != "-" else "-"


def _left(each: RoundSummary) -> str:
    """The least that is left to a party; for each δ by itself, where limits are at several."""
    found: dict[float, float] = {}
    for party in each.parties:
        if party.HasField("example_epsilon_left"):
            delta, left = party.example_epsilon_left_delta, party.example_epsilon_left
            found[delta] = min(left, found.get(delta, left))
    if len(found) < 2:
        return "".join(map(real, found.values())) or "-"
    return ", ".join(f"{real(left)} at δ {f'{delta:g}' if delta else '?'}" for delta, left in sorted(found.items()))


def _round_words(each: RoundSummary) -> str:
    words = [f"{each.contributions} updates"] if each.contributions else []
    words += [_metrics(each.metrics)] if each.metrics else []
    words += [_not_evaluated(each.not_evaluated)] if each.not_evaluated else []
    if each.state == "RELEASED":
        row = _row_figure(each)
        words += [f"{_ROW} {row}"] if row != "-" else []
        # That a party is not protected says nothing of its rows, and is not to stand for them.
        words += [f"party-level ε {real(each.epsilon_party)}"] if row != "-" or each.epsilon_party < math.inf else []
    words += [each.reason] if each.reason else []
    return ", ".join(words) or each.state.lower()


def _not_evaluated(why: str) -> str:
    return f"not evaluated: {safe(why)}" if why else "not evaluated"


def _metrics(metrics: Mapping[str, float]) -> str:
    return (
        " ".join(f"{safe(name)} {_metric(name, value)}" for name, value in sorted(metrics.items())) or "not evaluated"
    )


def _metric(name: str, value: float) -> str:
    """A number of rows is a whole one."""
    return f"{value:.0f}" if name == ROWS else f"{value:.4f}"


# --- on a terminal ----------------------------------------------------------------------------------------------------


def live_view(job: Job, events: Sequence[JobEvent], *, trouble: str = "") -> Group:
    """A job that is being watched.

    Args:
        job: as it was seen last.
        events: all that were seen.
        trouble: why nothing newer is seen now.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    state = JobState.Name(job.state)
    title = Text.assemble((state_name(job), f"bold {STYLES.get(state, '')}".strip()), "  ")
    title.append(safe(f"{job.job_id}  {about(job)} {job.display_name}"))
    parts: list[Any] = [title]
    if job.progress.rounds_planned:
        parts.append(_bar(job))
    facts = Table.grid(padding=(0, 2))
    for word, text in _facts(job):
        facts.add_row(Text(word, style="dim"), Text(safe(text)))
    parts.append(facts)
    if job.progress.rounds:
        header, cells = _rounds_of_table(job.progress.rounds[-SHOWN_ROUNDS:])
        parts.append(Text.from_ansi(columns(header, cells, right=_RIGHT)))
    parts += [Text(event_line(event), style="dim") for event in events[-SHOWN_EVENTS:]]
    if trouble:
        parts.append(Text(safe(trouble), style="yellow"))
    return Group(*parts)


def _bar(job: Job) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    progress = job.progress
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=progress.rounds_planned, completed=progress.rounds_released, width=40)
    row.add_row(bar, Text(f"{progress.rounds_released} of {progress.rounds_planned} rounds"))
    return row


def _facts(job: Job) -> list[tuple[str, str]]:
    """The lines of `job_lines` about what is going on, and how it ended, in two columns."""
    lines = _progress_lines(job)
    lines = [line for line in lines if not line.startswith("rounds ") or "failed" in line]
    if job.priority:
        lines.insert(0, f"priority {priority_name(job.priority)}")
    if job.HasField("deadline") and not job.HasField("end_time"):
        lines.append(f"deadline {clock(job.deadline)}, {away(job.deadline)}")
    if job.HasField("error"):
        lines.append(f"error    {_error_words(job)}")
    return [(word, text.lstrip()) for word, _, text in (line.partition(" ") for line in lines)]
