"""No log line at any level holds a value derived from private data: values are planted, and searched for.

Planted are rows with numbers of their own, in a task of its own package. What is computed from them is noted where it
is computed: losses, outputs, sizes of batches, updates, sums of gradients, norms, noise, integers before protection.
Then everything that anybody may read later is searched for all of it, in the forms that a number or a vector may take.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import src.party.work as party_work
from src import cli
from src.aggregator import work as aggregator_work
from src.aggregator.planning import plan_round
from src.jobs.executors.units import decode_reply, encode_unit, execute
from src.learning.flatten import model_to_tensors
from src.learning.task import find_task
from src.logs import JsonFormatter, TextFormatter
from src.protocol.plan import RoundPlan
from src.protocol.roster import AGGREGATOR

from .planted.search import ATTEMPTS, Planted
from .units import UnitsOfWork

PARTIES = ("a", "b", "c")

Json = dict[str, Any]


# --- the search -------------------------------------------------------------------------------------------------------


DECLARED_ROWS: Final = 15_000
"""Far fewer than there are: what is expected of a batch is no number that a batch has."""
FEW: Final = 1_009
"""Rows where it is a bad one that counts, and not how many there are."""
VECTOR = np.array([0.123456789, -3.98765432e-5, 12345678.25, 7777777.0])
WRITTEN: dict[str, Callable[[NDArray[Any]], str]] = {
    "repr": lambda v: f"update {v.tolist()!r}",
    "an array": lambda v: repr(v),
    "an array of float32": lambda v: str(v.astype(np.float32)),
    "a float32": lambda v: str(np.float32(v[0])),
    "%g": lambda v: f"loss={v[0]:g}",
    "%.6g, with a unit": lambda v: f"took {v[0]:.6g}s",
    "%.8e": lambda v: f"[{v[1]:.8e}]",
    "a negative exponent": lambda v: f"norm: {abs(v[1]):.6g}, fine",
    "%f": lambda v: f"x{':'}{v[2]:f}",
    "a tensor": lambda v: str(torch.from_numpy(v[:2])),
    "a comma list": lambda v: ",".join(f"{x:.7g}" for x in v),
    "JSON": lambda v: json.dumps({"v": v.tolist()}),
    "a count": lambda v: "batch of 7777777 rows",
    "a count in hex": lambda v: f"n={7777777:#x}",
    "float.hex": lambda v: float(v[0]).hex(),
    "hex of float32": lambda v: v.astype("<f4").tobytes().hex(),
    "hex of doubles": lambda v: v.tobytes().hex(),
    "hex of doubles, spaced": lambda v: v.astype(">f8").tobytes().hex(" "),
    "hex of integers": lambda v: v.astype("<i8").tobytes().hex().upper(),
    "base64 of doubles": lambda v: base64.urlsafe_b64encode(b"1" + v.tobytes()).decode(),
    "base64 of float32": lambda v: base64.b64encode(v.astype("<f4").tobytes()).decode(),
    "base64, in the middle": lambda v: base64.b64encode(b"12" + v.astype("<f4").tobytes()).decode(),
    "bytes": lambda v: repr(v.astype("<f4").tobytes()),
    "a list of bytes": lambda v: str(list(v.astype("<f8").tobytes())),
    "a log line": lambda v: TextFormatter().format(
        logging.makeLogRecord({"name": "x", "msg": "m", "norm": float(v[0]), "levelno": 10})
    ),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_the_search_finds_a_value_however_it_is_written(form: str) -> None:
    planted = Planted()
    planted.add("vector", VECTOR)
    assert planted.found(f"2026-01-01T00:00:00.123456Z DEBUG {WRITTEN[form](VECTOR)} and so on")


def test_the_search_finds_nothing_where_nothing_is() -> None:
    planted = Planted()
    planted.add("vector", VECTOR)
    text = "0.1235, 0.0004; 0.12346 0.1234667 1.234567 epsilon=3.99999 7777778 17777777 12345698.9 port 50051"
    text += ' {"digest":"7777777c0991bc706df81496860"}'
    assert planted.found(text) == []


# --- what is computed, and where all that is said goes ----------------------------------------------------------------


@pytest.fixture
def notebook(planted_package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where what is computed from the rows is noted; the task is installed, and the mechanisms are watched."""
    for place in planted_package:
        monkeypatch.syspath_prepend(str(place))
    file = tmp_path / "notebook"
    monkeypatch.setenv("PLANTED_NOTEBOOK", str(file))
    import planted_rows  # type: ignore[import-not-found]  # from its own directory, which is on the path by now

    planted_rows.watch(monkeypatch.setattr)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield file
    torch.set_num_threads(before)
    sys.modules.pop("planted_rows", None)


class Heard(logging.Handler):
    """Every record of every logger as text, as JSON, and with all that it carries."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.names.add(record.name)
        self.lines += [form().format(record) for form in (TextFormatter, JsonFormatter)]
        self.lines.append(repr({**vars(record), "exc_info": None}))


@contextmanager
def everything_heard() -> Iterator[Heard]:
    """All loggers there are, libraries' too, at DEBUG; and warnings."""
    heard, root = Heard(), logging.getLogger()
    known = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    before = [(each, each.level, each.disabled, each.propagate) for each in known]
    for each in known:
        each.setLevel(logging.DEBUG)
        each.disabled, each.propagate = False, True
    root.addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield heard
        heard.lines += [str(each) for each in warned]
    finally:
        root.removeHandler(heard)
        for each, level, disabled, propagate in before:
            each.setLevel(level)
            each.disabled, each.propagate = disabled, propagate


@pytest.fixture
def searched(notebook: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run something; what of the planted values is in its log, in its output, or in what it returns."""

    def once(work: Callable[[], Any], *, loggers: frozenset[str], unread: bool) -> list[str]:
        notebook.unlink(missing_ok=True)
        capfd.readouterr()
        with everything_heard() as heard:
            returned = work()
        output = capfd.readouterr()
        planted = Planted.read(notebook)
        assert {"rows", "count"} | (set() if unread else {"vector", "values"}) <= planted.kinds
        assert loggers <= heard.names
        return planted.found("\n".join([*heard.lines, output.out, output.err, repr(returned)]))

    def run(work: Callable[[], Any], *, loggers: frozenset[str] = frozenset(), unread: bool = False) -> list[str]:
        for _ in range(ATTEMPTS):
            if not (found := once(work, loggers=loggers, unread=unread)):
                break
        return found

    return run


# --- units of work, as a worker runs them -----------------------------------------------------------------------------


class Units(UnitsOfWork):
    """Frames and all, as a role gets to see them."""

    def __init__(self, directory: Path, strategy: str, *, options: Json) -> None:
        fields: Json = {"sampling_rate": 0.6, "learning_rate": 1.5, "epsilon": 4.0}
        fields |= {"steps": 2 if "rows" in options else 1} if strategy == "fedavg" else {}
        privacy: Json = {"clipping_norm": 0.5, "noise_multiplier": 0.4} if strategy == "fedavg" else {}
        spec = {
            "task": "planted",
            "strategy": strategy,
            "rounds": 1,
            "spare_rounds": 0,
            "local_training": fields,
            "party_privacy": {**privacy, "noise_by": "both"},
            "encryption": {"scheme": "paillier", "resolution_bits": 24},
            "seed": 3,
        }
        super().__init__(directory, spec, parties=PARTIES)
        self.options = options
        self.declared = DECLARED_ROWS // 20 if "rows" in options else DECLARED_ROWS

    def plan(self) -> RoundPlan:
        return plan_round(
            self.spec,
            job_id="job",
            number=1,
            model=self.store(model_to_tensors(find_task("planted").build_model(self.spec.seed))),
            roster=self.roster,
            scheme=self.keyring.scheme("paillier"),
            declared_rows=dict.fromkeys(PARTIES, self.declared),
        )

    def run(self, room: Any, name: str, params: Json) -> tuple[Json, list[str]]:
        """(result, whatever a role gets to see of it)."""
        frame = execute(encode_unit(name, params, version=1), room.HANDLERS, self.context)
        try:
            return decode_reply(frame), [frame.decode()]
        except Exception as error:
            return {}, [frame.decode(), repr(error), repr(vars(error))]

    def round(self, *, parties: tuple[str, ...] = PARTIES) -> list[str]:
        params = self.params(self.plan())
        batches, seen = {}, []
        for name in parties:
            own = {"name": name, "declared_rows": self.declared, "options": self.options}
            batches[name], more = self.run(party_work, "contribute", {**params, **own})
            seen += more
        if not all(batches.values()) or len(parties) < len(PARTIES):
            return seen
        batches[AGGREGATOR], _ = self.run(aggregator_work, "make_noise", params)
        aggregate, more = self.run(aggregator_work, "fold", {**params, "batches": batches})
        opening = self.opening(aggregate, contributions=len(batches), updates=parties)
        result, last = self.run(aggregator_work, "open_aggregate", {**params, **opening})
        assert result
        return [*seen, *more, *last]


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_a_round_says_nothing_of_what_it_computes(
    strategy: str, tmp_path: Path, searched: Callable[..., list[str]]
) -> None:
    assert searched(Units(tmp_path, strategy, options={}).round) == []


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedavg", {"unreadable": "range"}),
        ("fedsgd", {"unreadable": "index"}),
        ("fedavg", {"unreadable": "memory"}),
        ("fedavg", {"unreadable": "leave"}),
        ("fedsgd", {"unreadable": "leave"}),
    ],
)
def test_a_training_that_fails_on_a_bad_row_says_where_and_not_on_what(
    strategy: str, options: Json, tmp_path: Path, searched: Callable[..., list[str]]
) -> None:
    told: list[str] = []

    def work() -> list[str]:
        told.extend(Units(tmp_path, strategy, options={"rows": FEW, **options}).round(parties=("a",)))
        return told

    found = searched(work, unread="unreadable" in options)
    assert "WORKER_FAILED" in told[0]
    assert "memory" in options.values() or "planted_rows.py" in told[0]
    assert found == []


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("fail", ["range", "index", "memory", "leave"])
def test_a_row_of_which_no_gradient_can_be_had_counts_for_nothing_and_nobody_hears_of_it(
    strategy: str, fail: str, tmp_path: Path, searched: Callable[..., list[str]]
) -> None:
    assert searched(Units(tmp_path, strategy, options={"rows": FEW, "fail": fail}).round) == []


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_what_a_task_or_a_library_would_log_of_its_rows_is_not_heard(
    strategy: str, tmp_path: Path, searched: Callable[..., list[str]]
) -> None:
    units = Units(tmp_path, strategy, options={"rows": FEW, "fail": "tell"})
    assert searched(lambda: units.round(parties=("a",))) == []


def test_a_log_line_that_does_say_something_is_found(
    tmp_path: Path, searched: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, a search that finds nothing would show nothing."""
    from src.protocol.batches import write_batch

    def telling(scheme: Any, plan: RoundPlan, values: NDArray[np.int64], **named: Any) -> Any:
        logging.getLogger("sotto.party").debug("protecting %s", values)
        return write_batch(scheme, plan, values, **named)

    monkeypatch.setattr(party_work, "write_batch", telling)
    found = searched(lambda: Units(tmp_path, "fedavg", options={"rows": FEW}).round(parties=("a",)))
    assert any("protecting [" in hit for hit in found)


# --- sotto train ------------------------------------------------------------------------------------------------------

PARTY: Final = """
version: 1
federation: demo
name: a
state_dir: state
server: {insecure: true}
keys: {custody: aggregator}
policy: {allow_without_dp: true}
datasets: {planted: {declared_rows: DECLARED, options: {rows: ROWS, fail: FAIL, unreadable: UNREADABLE}}}
privacy: {budgets: {example: {epsilon: 100}, default_user_epsilon: 100}}
"""
PRIVATE: Final = {"noise_multiplier": 2.0, "delta": 1e-6}
Train = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def train(searched: Callable[..., list[str]], tmp_path: Path) -> Train:
    """Run `sotto train` on the planted rows: its exit code, and what is found of them in all that it says."""

    def run(*arguments: str, fail: str = "", unreadable: str = "", **fields: Any) -> tuple[int, list[str]]:
        config, job = tmp_path / "party.yaml", tmp_path / "job.json"
        few = bool(fail or unreadable)
        declared = DECLARED_ROWS // 20 if few else DECLARED_ROWS
        settings = {"FAIL": fail, "UNREADABLE": unreadable, "ROWS": FEW if few else "", "DECLARED": declared}
        text = PARTY
        for word, value in settings.items():
            text = text.replace(word, str(value or "null"))
        config.write_text(text)
        given = {"job_id": "j", "dataset": "planted", "dp": PRIVATE, "batch_size": declared, **fields}
        job.write_text(json.dumps(given))
        codes: list[int] = []

        def work() -> None:
            codes.append(cli.run(["train", str(job), "--user", "ada", "--config", str(config), *arguments]))
            cli.run(["budget", "history", "--config", str(config)])
            cli.run(["budget", "export", "--config", str(config)])

        found = searched(work, loggers=frozenset({"sqlalchemy.engine.Engine", "asyncio"}), unread=bool(unreadable))
        (code,) = set(codes)
        return code, found

    return run


@pytest.mark.parametrize("dp", [PRIVATE, {"enabled": False}], ids=["with DP", "without"])
def test_sotto_train_says_nothing_of_what_it_computes(dp: Json, train: Train) -> None:
    """Its log, its output, its artifact, and its ledger."""
    assert train(dp=dp, epochs=1) == (0, [])


@pytest.mark.parametrize("fail", ["range", "memory", "tell", "leave"])
def test_sotto_train_says_nothing_of_a_bad_row(fail: str, train: Train) -> None:
    """It counts for nothing, also one at which the task would end the process."""
    assert train(fail=fail, epochs=1) == (0, [])


@pytest.mark.parametrize(
    ("unreadable", "arguments"), [("range", ()), ("index", ("--json",)), ("memory", ()), ("leave", ())]
)
def test_sotto_train_says_where_it_failed_and_not_on_what(
    unreadable: str, arguments: tuple[str, ...], train: Train
) -> None:
    assert train(*arguments, unreadable=unreadable, epochs=1) == (13, [])
