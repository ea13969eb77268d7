"""A federation of real processes in which one party's file is missing, and somebody's package cannot be imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.errors import TaskError
from tests.learning.packages import GOOD, install

pytestmark = pytest.mark.slow

READ = "        table = np.loadtxt"
COUNTED = GOOD.replace(READ, f"        with open(options['file'] + '.read', 'a') as f: f.write('1')\n{READ}")
ROWS = "\n".join(f"{n % 5},{n % 7},{-n % 3},{n % 2}" for n in range(60))


@pytest.fixture
def hospitals(make_federation: Callable[..., Any], tmp_path: Path) -> Any:
    """Three parties with relative paths in their options; of b the file is not there."""
    install(tmp_path, {"ward": "ward_of_b:Task"}, {"ward_of_b.py": COUNTED})
    broken = "raise SystemExit('please set HOSPITAL_DB')"
    install(tmp_path, {"broken": "broken_here:Task"}, {"broken_here.py": broken}, name="broken")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    settings = dict.fromkeys(("aggregator", "a", "b", "c"), path)
    ward = {"declared_rows": 60, "options": {"file": "data/visits.csv"}}
    made = make_federation(party={"datasets": {"ward": ward}}, settings=settings)
    for name in "abc":
        data = made.kits / f"party-{name}" / "data"
        data.mkdir()
        if name != "b":
            (data / "visits.csv").write_text(ROWS)
    return made


def test_who_is_not_ready_is_named_costs_nothing_and_is_ready_once_its_file_is_there(
    hospitals: Any, wait_until: Callable[..., Any]
) -> None:
    hospitals.start("a", "b", "c")

    def standing(name: str) -> Any:
        (party,) = (each for each in hospitals.client.status().parties if each.party == name)
        return party.tasks.get("ward")

    wait_until(lambda: standing("a").ready and standing("b").problem == "DATA_NOT_READY", "it is known who is ready")
    assert (hospitals.kits / "party-a" / "data" / "visits.csv.read").read_text() == "1"  # once for all
    assert len({standing(name).digest for name in "abc"}) == 1
    assert hospitals.client.status().tasks["broken"].problem == "TASK_IMPORT_FAILED"
    log = hospitals.processes.log("b").read_text
    missing = f"datasets.ward.options.file: {hospitals.kits}/party-b/data/visits.csv"
    assert missing in log()
    assert "task broken is installed and cannot be used: SystemExit: please set HOSPITAL_DB" in log()
    with pytest.raises(TaskError, match=r"and b is not ready \(its data is not ready\)"):
        hospitals.submit(task="ward")
    job = hospitals.succeed(hospitals.submit(task="ward", quorum=2, parties=("a", "b", "c")))
    (row,) = hospitals.rounds(job.job_id)
    assert row.failures["b"].message == "not ready: its data is not ready"
    assert [entry for entry in hospitals.ledger("b") if entry.kind == "reserve"] == []

    (hospitals.kits / "party-b" / "data" / "visits.csv").write_text(ROWS)
    wait_until(lambda: standing("b").ready, "b is ready")
    job = hospitals.succeed(hospitals.submit(task="ward"))
    (row,) = hospitals.rounds(job.job_id)
    assert {"a", "b", "c"} <= set(row.contributors)
    said = json.dumps([str(hospitals.client.status()), str(job)])
    assert "visits.csv" not in said  # of which file it was, nobody else hears
