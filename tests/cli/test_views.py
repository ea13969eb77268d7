"""What people and machines are shown of a job and of an aggregator."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from rich.console import Console

from src.cli.jobs_submit import _make_job
from src.cli.jobs_view import event_line, job_lines, jobs_table, live_view, result_lines, rounds_table
from src.cli.plain import away, columns, duration, job_to_json, safe, size
from src.cli.status import status_lines
from src.communication.generated import jobs_pb2
from src.jobs.specs import load_job_file, spec_from_proto, spec_into_proto, spec_of

KINDS: dict[str, dict[str, Any]] = {
    "federated_training": {
        "task": "t",
        "parties": ["a"],
        "task_options": {"n": 3},
        "encryption": {"scheme": "plaintext"},
    },
    "evaluation": {"job_id": "j", "task": "t"},
    "export": {"job_id": "j"},
}


def a_job(**changes: Any) -> jobs_pb2.Job:
    """RETRYING, with everything said about it."""
    job = jobs_pb2.Job(
        job_id="0123",
        owner="scientist/ann",
        state=jobs_pb2.RETRYING,
        priority=jobs_pb2.HIGH,
        kind="federated_training",
        display_name="mine",
        federated_training=jobs_pb2.FederatedTraining(task="randhie"),
        attempt=2,
        max_attempts=4,
        progress=jobs_pb2.JobProgress(
            stage="round 3: receiving",
            rounds_released=2,
            rounds_planned=10,
            rounds_failed=1,
            waiting_for=["b"],
            bytes_received=3_140_000,
            parties=[jobs_pb2.PartyProgress(party="a", state="DELIVERED")],
            rounds=[jobs_pb2.RoundSummary(round=1, state="RELEASED", contributions=3, epsilon_party=float("inf"))],
        ),
    )
    job.retry_time.FromMilliseconds(int((time.time() + 61) * 1000))
    job.deadline.FromMilliseconds(int((time.time() + 7260) * 1000))
    job.progress.estimated_end_time.FromMilliseconds(int((time.time() + 3600) * 1000))
    job.MergeFrom(jobs_pb2.Job(**changes))
    return job


def test_a_job_is_told_whole() -> None:
    text = "\n".join(job_lines(a_job()))
    told = ["mine", "RETRYING", "high", "randhie", "2 of 10", "1 failed", "2 of 4; the next one in 6"]
    told += [
        "3.14 MB from the parties",
        "round 3: receiving, waiting for b",
        "a delivered",
        "ends     about",
        "deadline ",
    ]
    assert [word for word in told if word not in text] == []


def test_the_live_view_shows_what_is_going_on() -> None:
    event = jobs_pb2.JobEvent(sequence=7, state=jobs_pb2.RETRYING, message="attempt 1 failed", cause="aggregator")
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    console.print(live_view(a_job(), [event], trouble="the aggregator does not answer"))
    text = out.getvalue()
    told = ["RETRYING", "0123", "randhie mine", "━", "2 of 10 rounds", "3.14 MB", "round 3: receiving", "a delivered"]
    told += ["attempt 1 failed [aggregator]", "the aggregator does not answer", "RELEASED", "∞", "2 of 4; the next one"]
    assert [word for word in told if word not in text] == []


def test_a_failure_points_into_the_log() -> None:
    error = jobs_pb2.JobError(reason="WORKER_FAILED", message="it died", stage="round 1", log_reference="incident 7")
    text = "\n".join(job_lines(a_job(state=jobs_pb2.FAILED, error=error)))
    assert "WORKER_FAILED in round 1: it died; the aggregator's log has more under incident 7" in text


def test_of_a_model_that_came_with_the_job_no_epsilon_is_claimed() -> None:
    (line,) = [line for line in result_lines(jobs_pb2.JobResult(metrics={"auc": 0.5})) if "ε" in line]
    assert "unknown" in line


def test_beside_every_epsilon_stands_its_delta_what_it_assumes_and_what_is_left_against_others() -> None:
    result = jobs_pb2.JobResult(
        epsilon_example=2.5,
        delta=1e-6,
        epsilon_example_if_all_others_collude=9.0,
        example_assumption="honest shares",
        epsilon_party=float("inf"),
        epsilon_party_against_aggregator=float("inf"),
        epsilon_party_if_all_others_collude=float("inf"),
        party_delta=1e-5,
        party_assumption="both",
        party_assumption_against_aggregator="one of them",
    )
    assert [line for line in result_lines(result) if line.startswith(("ε", " "))] == [
        "ε        2.5 for one example of a party's data, δ = 1e-06; 9 if all others collude",
        "         assumes honest shares",
        "ε        ∞ for a whole party, δ = 1e-05; ∞ against the aggregator; ∞ if all others collude: "
        "no meaningful party-level guarantee",
        "         assumes both",
        "         against the aggregator assumes one of them",
    ]


def test_what_is_left_at_several_deltas_is_not_compared() -> None:
    def a_round(*left: tuple[float, float], **fields: Any) -> str:
        parties = [jobs_pb2.PartySummary(example_epsilon_left=a, example_epsilon_left_delta=b) for a, b in left]
        return rounds_table([jobs_pb2.RoundSummary(round=1, parties=parties, **fields)])

    assert "0.5" in a_round((0.5, 1e-5), (0.7, 1e-5))
    assert "0.5 at δ 1e-05, 0.1 at δ 0.001" in a_round((0.5, 1e-5), (0.1, 1e-3), (0.7, 1e-5))
    table = a_round((0.5, 1e-5), party_assumption="honest shares", party_delta=1e-5)
    assert table.splitlines()[-1] == "ε of a party at δ = 1e-05: assumes honest shares"


def test_a_round_that_does_not_say_how_long_it_took_is_shown_without() -> None:
    silent, said = (rounds_table([jobs_pb2.RoundSummary(round=1, seconds=each)]) for each in (None, 1.25))
    assert silent.splitlines()[1].endswith(" -")
    assert said.splitlines()[1].endswith("1.2")


def test_names_that_others_gave_do_not_steer_the_terminal() -> None:
    evil = "\x1b[2J\r\x07name"
    job = a_job(display_name=evil)
    event = jobs_pb2.JobEvent(sequence=1, message=evil)
    for text in (jobs_table([job]), "".join(job_lines(job)), event_line(event)):
        assert not {"\x1b", "\r", "\x07"} & set(text)
        assert "name" in text
    assert safe("ε ≥ 4, ü") == "ε ≥ 4, ü"


@pytest.mark.parametrize(("kind", "fields"), KINDS.items(), ids=KINDS)
def test_a_jobs_json_is_a_job_file(kind: str, fields: dict[str, Any], tmp_path: Any) -> None:
    job = jobs_pb2.Job(display_name="x", priority=jobs_pb2.LOW)
    job.timeout.FromMilliseconds(1500)
    spec_into_proto(job, spec_of(kind, fields))
    body = job_to_json(job)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({key: body[key] for key in ("display_name", "priority", "timeout_s", kind)}))
    assert spec_from_proto(load_job_file(path)) == spec_from_proto(job)
    assert load_job_file(path).timeout == job.timeout


def test_the_json_of_a_job_holds_no_model() -> None:
    job = jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(model=b"model", task="t"))
    assert job_to_json(job)["evaluation"] == {"job_id": "", "task": "t"}


def test_the_json_keeps_every_name_and_value_of_the_wire() -> None:
    body = job_to_json(a_job())
    wire = json_format.MessageToDict(a_job(), preserving_proto_field_name=True)
    assert wire.keys() <= body.keys()
    assert body["progress"]["bytes_received"] == 3_140_000
    assert body["progress"]["rounds"][0]["epsilon_party"] == "inf"
    json.dumps(body, allow_nan=False)


def test_the_status_is_told_whole() -> None:
    pool = jobs_pb2.PoolStatus(
        size=3,
        min_size=1,
        max_size=4,
        busy=2,
        waiting=5,
        started=9,
        replaced=1,
        tasks_done=70,
        tasks_failed=2,
        failure_rate=0.25,
        units=[jobs_pb2.UnitStatus(name="fold", done=70, mean_s=0.0041, p50_s=0.4, p95_s=1.5, longest_s=200.0)],
    )
    party = jobs_pb2.PartyStatus(party="a", connected=True, waiting_for="an update")
    status = jobs_pb2.Status(federation="demo", parties=[party], workers=pool, jobs_running=2, stopping=True)
    text = "\n".join(status_lines(status))
    told = ["demo", "2 of 3 busy (1 to 4), 5 units", "70 done, 2 failed; failure rate 25.0%", "1 replaced", "stopping"]
    told += ["fold", "4.1 ms", "400 ms", "1.5 s", "3 min", "an update", "connected", "2 running, 0 waiting"]
    assert [word for word in told if word not in text] == []
    assert "parties  none" in "\n".join(status_lines(jobs_pb2.Status()))


def test_columns_end_where_the_terminal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", "1"), ("long name", "22")]
    assert columns(("name", "n"), rows, right=("n",)).splitlines()[1:] == ["a           1", "long name  22"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "5")
    assert columns(("name", "n"), rows).splitlines()[2] == "long name"
    assert columns(("state", ""), [("FAILED", "x")]).splitlines()[1] == "\x1b[31mFAILED\x1b[0m  x"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00412, "4.12 ms"), (0.5, "500 ms"), (1.5, "1.5 s"), (99, "99 s"), (200, "3 min"), (7500, "2 h 5 min")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3_140_000, "3.14 MB")])
def test_sizes_are_told_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size(count) == text


def test_what_is_over_is_now() -> None:
    assert away(jobs_pb2.Job().deadline) == "now"


def test_an_option_of_adaptive_clipping_keeps_what_the_file_says_beside_it(tmp_path: Path) -> None:
    """What the options of `sotto jobs submit` make of a job."""
    file = tmp_path / "job.yaml"
    file.write_text(
        "federated_training: {task: randhie, party_privacy: {adaptive_clipping: {bit_deviation: 3, quantile: 0.4}}}\n"
    )
    nothing = dict.fromkeys(("task", "strategy"))
    job = _make_job(file, nothing, sections={"party_privacy": {"adaptive_clipping": {"quantile": 0.7}}})
    adaptive = job.federated_training.party_privacy.adaptive_clipping
    assert (adaptive.quantile, adaptive.bit_deviation) == (0.7, 3.0)
