"""What the job service asks of whoever executes jobs."""

from __future__ import annotations

from typing import Protocol

from .specs import JobSpec
from .views import Activity, Status


class Coordinator(Protocol):
    """Executes jobs. It writes what happens through `JobStore` and then calls `JobService.notify`."""

    async def price(self, spec: JobSpec, *, owner: str, model: bytes = b"") -> None:
        """Raises BudgetError, PlanError, PolicyError, InvalidInput or StateError when the job cannot be accepted. Of a
        model that comes with it nothing is stored yet: these are its bytes."""
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
