"""Rows are loaded from the configuration's directory; what a log says of a failure comes from no row."""

from __future__ import annotations

import errno
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from src.errors import ConfigError, InvalidInput
from src.learning.loading import CHECK_DATA, starting_from, why_not_loaded
from src.learning.task import Options, check_options

SECRET = "v31337"  # what a row holds


def failing(load: Callable[[Options], Any], options: dict[str, Any], directory: Path) -> str:
    """What is logged of a loader that raises."""
    with pytest.raises(BaseException) as raised, starting_from(directory):  # noqa: PT011  whatever it raises
        load(options)
    return why_not_loaded(raised.value, task="ward", options=options, directory=directory)


def test_the_file_of_an_option_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = failing(lambda options: open(str(options["file"])), {"file": "data/visits.csv"}, tmp_path)  # noqa: PTH123, SIM115
    assert said == f"datasets.ward.options.file: {tmp_path}/data/visits.csv: No such file or directory"


def test_a_directory_where_a_file_should_be_is_named(tmp_path: Path) -> None:
    said = failing(lambda options: Path(str(options["file"])).read_text(), {"file": str(tmp_path)}, tmp_path)
    assert said == f"datasets.ward.options.file: {tmp_path}: Is a directory"


def test_a_file_that_an_option_names_further_down_is_named(tmp_path: Path) -> None:
    options = {"sites": {"north": ["data/a.csv", "data/visits.csv"]}}
    said = failing(lambda _: Path("data/visits.csv").read_text(), options, tmp_path)
    assert said == f"datasets.ward.options.sites.north[1]: {tmp_path}/data/visits.csv: No such file or directory"
    other = failing(lambda _: Path("elsewhere.csv").read_text(), options | {"all": "data/*.csv"}, tmp_path)
    assert other.count("is not there") == 2  # of a pattern nobody knows


def missing_module(_: Options) -> None:
    import a_module_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401


def missing_extra(_: Options) -> None:
    with mock.patch.dict("sys.modules", {"statsmodels": None}):
        files("statsmodels")


def unset(options: Options) -> object:
    return options["file"]


def unknown(options: Options) -> None:
    check_options(options, known=("file",), task="ward")


@pytest.mark.parametrize(
    ("load", "options", "said"),
    [
        (missing_module, {}, "ward needs the module a_module_that_is_not_there, which is not installed here"),
        (missing_extra, {}, "ward needs statsmodels: pip install 'sotto-fl[randhie]'"),
        (unset, {}, "datasets.ward.options.file is not set, and the task asks for it"),
        (unknown, {"fil": 1}, "task 'ward' was given options that it does not know; fil: not an option of task"),
    ],
)
def test_what_follows_from_configuration_and_code_is_said(
    load: Callable[[Options], Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert failing(load, options, tmp_path).startswith(said)


def a_file_that_a_row_names(_: Options) -> object:
    return open(f"images/{SECRET}.png")  # noqa: PTH123


def a_row_that_is_no_key(_: Options) -> object:
    classes: dict[str, int] = {}
    return classes[SECRET]


def raised(error: BaseException) -> Callable[[Options], None]:
    def load(_: Options) -> None:
        raise error

    return load


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "load",
    [
        a_file_that_a_row_names,
        a_row_that_is_no_key,
        lambda _: int(SECRET),
        raised(ConfigError(f"no such file: {SECRET}", problems=(SECRET,))),
        raised(InvalidInput(SECRET, private=SECRET)),
        raised(ImportError(SECRET)),
        raised(ModuleNotFoundError(SECRET, name=SECRET)),
        raised(FileNotFoundError(errno.ENOENT, SECRET, SECRET)),
        raised(OSError(errno.EIO, SECRET, "visits.csv")),
        raised(SystemExit(SECRET)),
        raised(Odd(SECRET)),
    ],
)
def test_what_a_row_may_have_to_do_with_is_type_and_place_alone(load: Any, tmp_path: Path) -> None:
    said = failing(load, {"file": "visits.csv"}, tmp_path)
    assert SECRET not in said
    assert CHECK_DATA in said or said.endswith("/visits.csv: Input/output error")


def test_an_option_that_looks_like_somebodys_home_hides_nothing(tmp_path: Path) -> None:
    options = {"a separator": "~|", "file": "rows.csv"}
    error = FileNotFoundError(2, "No such file", "rows.csv")
    why = why_not_loaded(error, task="t", options=options, directory=str(tmp_path))
    assert "rows.csv" in why
