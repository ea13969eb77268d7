"""The log: one line an entry, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import warnings

import pytest

from src import logs
from src.errors import BudgetError


@pytest.mark.usefixtures("quiet")
def test_the_log_is_one_json_object_a_line_with_utc_times_and_extra_fields() -> None:
    stream = io.StringIO()
    logs.configure(level="DEBUG", format="json", stream=stream)
    logs.get_logger("src.jobs.store").debug("committed", extra={"job": "j1", "round": 3})
    try:
        raise BudgetError("nothing left", private="entry 7")
    except BudgetError:
        logging.getLogger("src.party").exception("refused")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "DEBUG", "logger": "sotto.jobs.store", "message": "committed", "job": "j1", "round": 3}
    assert (second["logger"], second["reason"], second["private"]) == ("sotto.party", "BUDGET_EXCEEDED", "entry 7")
    assert "BudgetError: nothing left" in second["traceback"]


@pytest.mark.usefixtures("quiet")
def test_nobody_forges_a_line_of_the_text_log() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    logs.configure(stream=stream)  # again: replaces, does not double
    logs.get_logger("src.x").info("name %s", "a\n2024 ERROR sotto: all keys leaked\x1b[2J", extra={"party": "b"})
    logs.get_logger("src.x").debug("not at this level")
    logging.getLogger("grpc").info("other libraries are heard from warning on")
    (line,) = stream.getvalue().splitlines()
    assert " INFO    sotto.x: name a\\n2024 ERROR sotto: all keys leaked\\x1b[2J party=b" in line


@pytest.mark.usefixtures("quiet")
def test_python_warnings_go_to_the_log() -> None:
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure(stream=stream)
        warnings.warn("careful", UserWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "WARNING py.warnings:" in stream.getvalue()
