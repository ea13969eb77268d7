"""What the job service asks of whoever executes jobs."""

from __future__ import annotations

from typing import Any, Protocol

from .spec import FederatedTrainingSpec
from .specs import JobSpec
from .states import JobRow
from .views import Activity, Status


class Results(Protocol):
    """What the rounds of trainings have released."""

    async def of_round(self, job: JobRow, choice: str, *, as_known: str = "") -> dict[str, Any]:
        """A released round (`keeping.CHOICE_PATTERN`) as a result; NotFoundError where it cannot be had. One that the
        caller knows by a file's SHA-256 (hex) is not made afresh."""
        ...


class Coordinator(Protocol):
    """Executes jobs. It writes what happens through `JobStore` and then calls `JobService.notify`."""

    async def price(self, spec: JobSpec, *, owner: str, model: bytes = b"") -> tuple[str, ...]:
        """What whoever submits a job should know, a sentence each. Of a model that comes with it nothing is stored yet:
        these are its bytes. Raises BudgetError, PlanError, PolicyError, InvalidInput or StateError when the job cannot
        be accepted."""
        ...

    async def model_bytes(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        """About how large each model of a training is."""
        ...

    @property
    def results(self) -> Results:
        """Of the trainings that it runs, and of those that have ended."""
        ...

    def wake(self) -> None:
        """A job became PENDING, CANCELLING or CANCELLED, or was deleted."""
        ...

    def progress(self, job_id: str) -> Activity | None:
        """What the job is doing; None when nothing is known of it."""
        ...

    def status(self) -> Status:
        """`jobs_pending`, `jobs_running` and `stopping` are filled in by the service."""
        ...
