"""The models of a training's released rounds: which of them are kept, and what was made of each.

A round is in here once it was released: that is written in one transaction with the ledger's word on it, so that what
was opened and not released is not, and nothing is that was not charged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    func,
    or_,
    select,
    union,
)

from ..errors import NotFoundError
from ..storage.columns import text
from .keeping import LAST, ROWS, Keep, Metric, check_choice
from .states import AT_REST
from .tables import dump, load

_NOTHING_MADE: Final = {
    **{"result": None, "as_of": "", "file_sha256": "", "file_size": 0},
    **{"manifest_sha256": "", "manifest_size": 0},
}
_ABOUT_ROUNDS = ("evaluation", "export")


@dataclass(frozen=True, slots=True)
class Released:
    """A released round.

    Attributes:
        number: of the round; place: among the released ones, from 1.
        sha256, size: of what was trained of its model (hex, bytes); the file of `result` may hold more.
        kept: whether the model is still there.
        metrics: of public rows; empty where it was not evaluated.
        result: what was last made of it, as `states.JobRow.result`; None before anybody asked.
        as_of: what `result` knew of the job.
    """

    number: int
    place: int
    sha256: str
    size: int
    kept: bool
    metrics: dict[str, float]
    result: dict[str, Any] | None
    as_of: str


class ReleasedModels:
    """The table `released_models`: one row a released round. Methods work inside the caller's transaction.

    Args:
        jobs: the table of jobs: nothing is kept of a deleted one.
    """

    def __init__(self, metadata: MetaData, jobs: Table) -> None:
        self._jobs = jobs
        self._table = Table(
            "released_models",
            metadata,
            Column("job_id", String(64), primary_key=True),
            Column("number", Integer, primary_key=True, autoincrement=False),
            Column("place", Integer, nullable=False),
            Column("sha256", String(64), nullable=False),
            Column("size", BigInteger, nullable=False),
            Column("kept", Boolean, nullable=False),
            Column("metrics", text(), nullable=False),
            Column("result", text()),
            Column("file_sha256", String(64), nullable=False),
            Column("file_size", BigInteger, nullable=False),
            Column("manifest_sha256", String(64), nullable=False),
            Column("manifest_size", BigInteger, nullable=False),
            Column("as_of", String(64), nullable=False),
        )

    # --- writing ------------------------------------------------------------------------------------------------------

    def add(self, connection: Connection, job_id: str, number: int, *, sha256: str, size: int) -> None:
        """A round is released; its model is kept until `let_go` says otherwise."""
        table = self._table
        before = connection.execute(select(func.max(table.c.place)).where(table.c.job_id == job_id)).scalar()
        connection.execute(
            table.insert().values(
                job_id=job_id,
                number=number,
                place=(before or 0) + 1,
                sha256=sha256,
                size=size,
                kept=True,
                metrics=dump({}),
                **_NOTHING_MADE,
            )
        )

    def set_metrics(self, connection: Connection, job_id: str, number: int, *, metrics: Mapping[str, float]) -> None:
        """What was measured of a released round's model on public rows; what is no finite number is left out."""
        table = self._table
        where = (table.c.job_id == job_id) & (table.c.number == number)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        connection.execute(table.update().where(where).values(metrics=dump(finite)))

    def let_go(
        self,
        connection: Connection,
        job_id: str,
        keep: Keep,
        *,
        kept_bytes: Callable[[], int],
        most_bytes: int,
    ) -> tuple[set[str], list[int]]:
        """After a round was released: what need not be kept any more, and what has no room.

        Args:
            kept_bytes: what all jobs of the owner of this one keep by now.
            most_bytes: that they may.

        Returns:
            The SHA-256 (hex) of the blobs that this job needs no more, and the rounds that were to be kept and are not,
            because there was no room.
        """
        needed = self.needed(connection, job_id)
        last = self._kept(connection, job_id, newest=1)
        passing = (self._table.c.place % keep.every != 0,) if keep.every else ()  # the others are decided for good
        rows = self._kept(connection, job_id, *passing)
        best = keep.metric.best(rows) if keep.metric else None
        staying = {*needed, *(row.number for row in last), *([best.number] if best else [])}
        gone = self._drop(connection, job_id, [row.number for row in rows if row.number not in staying])
        over = kept_bytes() - last[0].size - most_bytes if keep.every and last else 0  # the last is had in any case
        lost: list[int] = []
        for row in self._kept(connection, job_id)[:-1] if over > 0 else ():
            if over > 0 and row.number not in needed:
                lost.append(row.number)
                over -= row.size
        return gone | self._drop(connection, job_id, lost), lost

    def _drop(self, connection: Connection, job_id: str, numbers: Sequence[int]) -> set[str]:
        if not numbers:
            return set()
        table = self._table
        where = (table.c.job_id == job_id) & table.c.number.in_(numbers)
        named = connection.execute(select(*self._digests()).where(where)).all()
        connection.execute(table.update().where(where).values(kept=False, **_NOTHING_MADE))
        return {sha256 for row in named for sha256 in row} - {""}

    def set_result(
        self, connection: Connection, job_id: str, number: int, *, result: Mapping[str, Any], as_of: str
    ) -> str:
        """What was made of a round, with the manifest that it names; returns the SHA-256 of the one before, or "".

        Raises:
            NotFoundError: its model went meanwhile.
        """
        table = self._table
        where = (table.c.job_id == job_id) & (table.c.number == number) & table.c.kept
        before = connection.execute(select(table.c.manifest_sha256).where(where)).scalar()
        if before is None:
            raise NotFoundError(f"the model of round {number} of job {job_id} is not kept any more", job_id=job_id)
        file, manifest = result["files"]
        values = {"manifest_sha256": manifest["sha256"], "manifest_size": manifest["bytes"]}
        values |= {"file_sha256": file["sha256"], "file_size": file["bytes"]}
        connection.execute(table.update().where(where).values(result=dump(result), as_of=as_of, **values))
        return str(before) if before != manifest["sha256"] else ""

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, connection: Connection, job_id: str, choice: str) -> Released:
        """The released round that is meant, whose model is there.

        Args:
            choice: matches `CHOICE_PATTERN`.

        Raises:
            InvalidInput: it does not.
            NotFoundError: no such round was released, none was evaluated by that metric, or the model was not kept.
        """
        check_choice(choice)
        rows = self._rows(connection, job_id)
        if not rows:
            raise NotFoundError(f"job {job_id} has released no round", job_id=job_id)
        if choice == LAST:
            found: Released | None = rows[-1]
        elif choice.startswith("best:"):
            metric = Metric.from_text(choice.removeprefix("best:"))
            found = metric.best(rows)
            if found is None:
                known = sorted({name for row in rows for name in row.metrics} - {ROWS})
                measured = "they have none to choose by" if any(row.metrics for row in rows) else ""
                what = f"they have {', '.join(known)}" if known else measured or "none was evaluated on public rows"
                raise NotFoundError(f"no released round of job {job_id} has a metric {metric.name}: {what}")
        else:
            found = next((row for row in rows if row.number == int(choice)), None)
        if found is None:
            raise NotFoundError(
                f"round {choice} of job {job_id} was not released; released are {_spans(rows)}", job_id=job_id
            )
        if not found.kept:
            kept = _spans([row for row in rows if row.kept]) or "none"
            what = f", which is the best by {choice.removeprefix('best:')}," if choice.startswith("best:") else ""
            raise NotFoundError(
                f"the model of round {found.number} of job {job_id}{what} is not kept; kept are {kept}",
                job_id=job_id,
            )
        return found

    def kept(self, connection: Connection, job_id: str) -> tuple[int, ...]:
        """The rounds of a job whose models are there."""
        table = self._table
        query = select(table.c.number).where(table.c.job_id == job_id, table.c.kept).order_by(table.c.number)
        return tuple(connection.execute(query).scalars())

    def needed(self, connection: Connection, job_id: str) -> set[int]:
        """The rounds of a job that evaluations and exports are about which are not at rest."""
        jobs = self._jobs.c
        waiting = jobs.state.notin_([state.value for state in AT_REST]) & jobs.kind.in_(_ABOUT_ROUNDS)
        specs = [load(spec) for spec in connection.scalars(select(jobs.spec).where(waiting))]
        texts = [spec.get("round", "") for spec in specs if spec.get("job_id") == job_id]
        return {int(text) for text in texts if text.isdecimal()}

    def sizes_of(self, connection: Connection, owner: str) -> dict[str, int]:
        """What is kept of an owner's jobs, models and what was made of them: sizes (bytes) by SHA-256 (hex)."""
        table, jobs = self._table, self._jobs
        kept = table.c.kept & (jobs.c.owner == owner) & (jobs.c.deleted_at == "")
        joined = table.join(jobs, jobs.c.job_id == table.c.job_id)
        sizes = (table.c.size, table.c.file_size, table.c.manifest_size)
        pairs = zip(self._digests(), sizes, strict=True)
        once = union(*(select(digest, size).select_from(joined).where(kept) for digest, size in pairs))
        return {sha256: int(size) for sha256, size in connection.execute(once) if sha256}

    def _digests(self) -> tuple[Any, ...]:
        table = self._table
        return table.c.sha256, table.c.file_sha256, table.c.manifest_sha256

    def blobs(self, connection: Connection, *, among: Set[str] | None = None) -> set[str]:
        """SHA-256 (hex) of what is kept, of all jobs that were not deleted; with `among` at least those of these."""
        table, jobs = self._table, self._jobs
        joined = table.join(jobs, jobs.c.job_id == table.c.job_id)
        query = select(*self._digests()).select_from(joined).where(table.c.kept, jobs.c.deleted_at == "")
        if among is not None:
            query = query.where(or_(*(digest.in_(sorted(among)) for digest in self._digests())))
        return {sha256 for row in connection.execute(query) for sha256 in row} - {""}

    def blobs_of(self, connection: Connection, job_id: str) -> set[str]:
        """SHA-256 (hex) of what is kept of a job, deleted or not."""
        table = self._table
        query = select(*self._digests()).where(table.c.job_id == job_id, table.c.kept)
        return {sha256 for row in connection.execute(query) for sha256 in row} - {""}

    def _kept(self, connection: Connection, job_id: str, *conditions: Any, newest: int | None = None) -> list[Released]:
        return self._rows(connection, job_id, self._table.c.kept, *conditions, newest=newest)

    def _rows(self, connection: Connection, job_id: str, *conditions: Any, newest: int | None = None) -> list[Released]:
        """In order; the `newest` of them alone, where that is given."""
        table = self._table
        query = select(table).where(table.c.job_id == job_id, *conditions).order_by(table.c.number.desc())
        return [_released(row) for row in connection.execute(query.limit(newest)).all()[::-1]]


def _released(row: Row[Any]) -> Released:
    return Released(
        number=row.number,
        place=row.place,
        sha256=row.sha256,
        size=row.size,
        kept=row.kept,
        metrics={name: float(value) for name, value in load(row.metrics).items()},
        result=load(row.result),
        as_of=row.as_of,
    )


def _spans(rows: Sequence[Released]) -> str:
    """1 to 7, 9, 12 to 40"""
    spans: list[list[int]] = []
    for row in rows:
        if spans and spans[-1][-1] == row.number - 1:
            spans[-1][1:] = [row.number]
        else:
            spans.append([row.number])
    return ", ".join(" to ".join(map(str, span)) for span in spans)
