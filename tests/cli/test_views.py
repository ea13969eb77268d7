"""What people and machines are shown of a job and of an aggregator."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from src import cli
from src.cli.jobs_submit import Fetched, _finish, _make_job, fetch, print_result
from src.cli.jobs_view import event_line, job_lines, jobs_table, live_view, result_lines, rounds_table
from src.cli.plain import away, columns, duration, job_to_json, safe, size
from src.cli.prose import prose
from src.cli.status import status_lines
from src.communication.generated import jobs_pb2
from src.errors import JobFailed
from src.jobs.spec import FederatedTrainingSpec
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
    job.retry_time.FromMilliseconds(int((time.time() + 69.5) * 1000))  # what is asked for below has ten seconds
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
    assert "WORKER_FAILED in round 1: it died; in the aggregator's log: incident 7" in text


@pytest.mark.parametrize("as_json", [False, True])
def test_who_waited_for_a_job_that_ended_early_hears_what_it_released(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    ended = jobs_pb2.Job(job_id="j", state=jobs_pb2.FAILED, kept_rounds=[1, 2])
    ended.error.CopyFrom(jobs_pb2.JobError(reason="DEADLINE_EXCEEDED", message="too late"))
    for metrics, best in (({"n": 9.0, "auc": 0.5}, " (or --best auc)"), ({"n": 9.0, "mine": 0.5}, "")):
        ended.progress.rounds.extend([jobs_pb2.RoundSummary(round=1, metrics=metrics)])
        with pytest.raises(JobFailed):
            _finish(ended, Path(), out=None, as_json=as_json)
        said = " ".join(capsys.readouterr().err.split())
        assert said == f"models can be had of round 1, 2: sotto jobs result j --round 2{best}"
        assert said.removeprefix("models can be had ") in " ".join(" ".join(job_lines(ended)).split())
        ended.progress.rounds.clear()
    with pytest.raises(JobFailed):
        _finish(jobs_pb2.Job(job_id="j", state=jobs_pb2.FAILED), Path(), out=None, as_json=as_json)
    assert not capsys.readouterr().err


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
        "         party level: no meaningful guarantee (ε ∞ at δ = 1e-05)",
    ]
    result.epsilon_party = 60.0
    assert [line for line in result_lines(result) if line.startswith(("ε", " "))][2:] == [
        "ε        60 for a whole party, δ = 1e-05; ∞ against the aggregator; ∞ if all others collude: no",
        "         meaningful party-level guarantee",
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
    assert "\nε of a party at δ = 1e-05: assumes honest shares\n" in table


def test_beside_a_partys_epsilon_stands_what_a_row_has_spent_and_left_and_an_infinite_one_never_stands_alone() -> None:
    def said(epsilon_party: float, *figures: tuple[float, float]) -> str:
        parties = [jobs_pb2.PartySummary(example_epsilon_spent=a, example_epsilon_left=b) for a, b in figures]
        summary = jobs_pb2.RoundSummary(round=1, state="RELEASED", epsilon_party=epsilon_party, parties=parties)
        return event_line(jobs_pb2.JobEvent(message="round 1", round=summary)).partition("round 1 ")[2]

    worst = "ε a row spent/left 0.7/3.3"
    assert said(float("inf"), (0.5, 3.5), (0.7, 3.3)) == f"({worst}, party-level ε ∞)"
    assert said(float("inf")) == "(released)"
    assert said(20.0) == "(party-level ε 20)"


def test_a_table_of_rounds_that_protect_no_party_says_so_once() -> None:
    infinite: dict[str, Any] = dict.fromkeys(("epsilon_party", "epsilon_party_against_aggregator"), float("inf"))
    failed = jobs_pb2.RoundSummary(round=2, state="FAILED")
    bare = rounds_table([jobs_pb2.RoundSummary(round=1, state="RELEASED", party_assumption="all", **infinite), failed])
    assert bare.count("∞") == 1
    assert not [word for word in ("ε vs", "assumes") if word in bare]
    infinite["epsilon_party"] = 9.0
    assert "ε vs aggr." in rounds_table([jobs_pb2.RoundSummary(round=1, state="RELEASED", **infinite), failed])


def test_what_a_job_asked_for_is_shown_with_its_price_first() -> None:
    job = jobs_pb2.Job()
    spec_into_proto(job, spec_of("federated_training", {"task": "t", "rounds": 3}))
    assert [line for line in job_lines(job) if line.startswith(("asked", " "))] == [
        "asked    ε ≤ 1 a row at δ = 1e-05: with all 5 rounds, spare ones included; less while those are not",
        "         needed",
        "         t by fedavg, 3 rounds and up to 2 spare, of all parties, each needed",
        "         10 steps a round at sampling rate 0.05, party-level noise multiplier 0.1",
    ]
    given = {"rounds": 1, "spare_rounds": 0, "parties": ["a", "b", "c"], "quorum": 2, "strategy": "fedsgd"}
    spec_into_proto(job, spec_of("federated_training", {"task": "t", **given}))
    assert [line for line in job_lines(job) if line.startswith(("asked", " "))] == [
        "asked    ε ≤ 1 a row at δ = 1e-05",
        "         t by fedsgd, 1 round, no spare ones, of a, b, c, 2 of them needed",
        "         1 step a round at sampling rate 0.05",
    ]


def test_the_help_says_the_defaults_of_the_specification(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.run(["jobs", "submit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    spec = FederatedTrainingSpec(task="t")
    local = spec.local_training
    for option, value in (
        ("--epsilon", f"{local.epsilon:g}"),
        ("--steps", f"{local.steps}"),
        ("--sampling-rate", f"{local.sampling_rate:g}"),
        ("--learning-rate", f"{local.learning_rate:g}"),
        ("--rounds", f"{spec.rounds}"),
        ("--spare-rounds", f"{spec.spare_rounds}"),
        ("--noise-multiplier", f"{spec.party_privacy.noise_multiplier:g}"),
        ("--strategy", spec.strategy),
        ("--round-timeout", f"{spec.round_timeout_s:g}"),
    ):
        said = text.rpartition(f" {option} <")[2].partition(" --")[0]
        assert said.count(f"Default {value}.") == 1, option


def test_what_rows_have_left_is_explained_where_a_party_says_it_and_has_no_column_where_none_does() -> None:
    def lines(*parties: jobs_pb2.PartySummary) -> list[str]:
        return rounds_table([jobs_pb2.RoundSummary(round=1, seconds=1.0, parties=parties)]).splitlines()

    header, row, *note = lines(jobs_pb2.PartySummary(example_epsilon_left=0.5))
    assert "ε a row spent/left" in header
    assert row.split()[-7:] == ["-/0.5", "0", "0", "-", "0", "B", "1.0"]
    assert " ".join(note).startswith("ε a row spent/left: by the party's own ledger, once that round was charged")
    header, row, *note = lines(jobs_pb2.PartySummary())
    assert (("ε a row" in header), note, row.split()[-4:]) == (False, [], ["-", "0", "B", "1.0"])
    console = Console(file=io.StringIO(), width=120)
    console.print(live_view(a_job(), []))
    assert "a row" not in console.file.getvalue()  # type: ignore[attr-defined]


LONG = "of every 3 contributions at least 3 carry an honest noise share, whoever else contributes; none may collude"


def test_no_line_of_a_statement_is_longer_than_100_columns_and_each_assumption_has_its_own() -> None:
    result = jobs_pb2.JobResult(
        epsilon_example=2.5,
        example_assumption=f"{LONG} / {LONG.upper()}",
        epsilon_party=4.0,
        party_assumption=LONG,
        files=[jobs_pb2.ArtifactFile(name="model.safetensors", bytes=70_000, sha256=bytes(32))],
    )
    error = jobs_pb2.JobError(reason="WORKER_FAILED", message=LONG)
    rounds = [jobs_pb2.RoundSummary(round=1, party_assumption=f"{LONG} / {LONG.upper()}", party_delta=1e-5)]
    lines = job_lines(a_job(result=result, error=error))
    table = rounds_table(rounds).splitlines()
    assert [line for line in (*lines, *table) if len(line) > 100] == []
    text, notes = (" ".join(" ".join(each).split()) for each in (lines, table))
    assert f"assumes, by kind of events: - {LONG} - {LONG.upper()} ε 4 for" in text
    assert f"assumes {LONG} file" in text
    assert f"ε of a party at δ = 1e-05: assumes, by kind of events: - {LONG} - {LONG.upper()}" in notes
    assert all(line.startswith(" " * 9) for line in lines if LONG[-20:] in line)


def test_a_terminal_that_is_narrower_gets_narrower_lines_and_long_words_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert max(map(len, prose(LONG))) <= 100
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "5")
    assert len(prose(LONG)) == 2  # not on a terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert max(map(len, prose(LONG))) <= 30
    assert prose(f"head {'0' * 64}", hang="     ") == ["head", f"     {'0' * 64}"]


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


def test_fetched_files_say_whether_their_signature_was_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"manifest.json": tmp_path / "manifest.json"}
    for roster, said in ((None, "NO SIGNATURE WAS CHECKED"), (tmp_path / "roster.json", "signed by the aggregator")):
        print_result("j", jobs_pb2.JobResult(), fetched=Fetched(files, roster), as_json=False)
        assert said in capsys.readouterr().out
        print_result("j", jobs_pb2.JobResult(), fetched=Fetched(files, roster), as_json=True)
        assert json.loads(capsys.readouterr().out)["signature_checked"] == (roster is not None)
    print_result("j", jobs_pb2.JobResult(), fetched=None, as_json=False)
    assert "sign" not in capsys.readouterr().out.lower()


def test_a_signature_is_checked_where_the_configuration_pins_a_roster(tmp_path: Path) -> None:
    class Client:
        def fetch_artifact(self, job_id: str, out: Path) -> dict[str, Path]:
            return {job_id: out}

    config, roster = tmp_path / "client.yaml", tmp_path / "roster.json"
    roster.touch()
    for keys, pinned in (("{}", None), ("{roster: null}", None), ("{roster: roster.json}", roster)):
        config.write_text(f"version: 1\nfederation: demo\nserver: {{insecure: true}}\nkeys: {keys}\n")
        fetched = fetch(Client(), "j", tmp_path, config=config)  # type: ignore[arg-type]  # all that is asked of one
        assert fetched == Fetched({"j": tmp_path}, pinned)


def test_the_json_of_a_job_holds_no_model() -> None:
    job = jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(model=b"model", task="t"))
    assert job_to_json(job)["evaluation"] == {"job_id": "", "task": "t", "round": ""}


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
    party = jobs_pb2.PartyStatus(party="a", connected=True, waiting_for="an update", warnings=["it ends soon"])
    status = jobs_pb2.Status(
        federation="demo", parties=[party], workers=pool, jobs_running=2, stopping=True, warnings=["mine, too"]
    )
    text = "\n".join(status_lines(status))
    told = ["demo", "2 of 3 busy (1 to 4), 5 units", "70 done, 2 failed; failure rate 25.0%", "1 replaced", "stopping"]
    told += ["fold", "4.1 ms", "400 ms", "1.5 s", "3 min", "an update", "connected", "2 running, 0 waiting"]
    told += ["warning  a: it ends soon", "warning  mine, too"]
    assert [word for word in told if word not in text] == []
    assert "parties  none" in "\n".join(status_lines(jobs_pb2.Status()))


def test_a_table_is_cut_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe a row is a line, however long; on a terminal the columns without room stand below."""
    rows = [("a", "1"), ("long name", "22")]
    assert columns(("name", "n"), rows, right=("n",)).splitlines()[1:] == ["a           1", "long name  22"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setenv("LINES", "5")
    assert columns(("name", "n"), rows, right=("n",)).splitlines()[2:] == ["a", "     1", "long name", "    22"]
    assert columns(("state", ""), [("FAILED", "x")]).splitlines()[1] == "\x1b[31mFAILED\x1b[0m  x"


@given(
    st.lists(st.lists(st.text("ab∞0.", max_size=30), min_size=9, max_size=9), min_size=1, max_size=5),
    st.integers(1, 200),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_cell_is_whole_and_every_line_fits_whatever_the_terminal(
    monkeypatch: pytest.MonkeyPatch, rows: list[list[str]], room: int
) -> None:
    header = [f"column {number}" for number in range(9)]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((room, 24)))
    lines = re.sub(r"\x1b\[\d*m", "", columns(header, rows, right=header[2:])).splitlines()
    assert [cell for row in [header, *rows] for cell in row if not any(cell in line for line in lines)] == []
    assert all(len(line) <= max(room, 4 + max(len(cell) for row in (header, *rows) for cell in row)) for line in lines)


def test_numbers_of_rounds_that_are_followed_live_are_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = a_job()
    metrics = {"accuracy": 0.6234, "auc": 0.6543, "loss": 0.7123, "n": 12345}
    for number in range(1, 4):
        job.progress.rounds.add(round=number, state="RELEASED", epsilon_party=1234.5, metrics=metrics, contributions=3)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "50")
    out = io.StringIO()
    Console(file=out, width=60, force_terminal=True, color_system=None).print(live_view(job, []))
    text = out.getvalue()
    assert [word for word in ("accuracy 0.6234 auc 0.6543 loss 0.7123 n 12345", "1234") if word not in text] == []


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
