"""A task's code: the same digest wherever it is installed, another one for other code; and what cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import TaskError
from src.learning import installed
from src.learning.installed import code_digest, is_place_of, place_in, source_files
from src.learning.task import find_task

from .packages import GOOD, install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_stays_imported() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for each in [each for each in sys.modules if each not in before and each.startswith("wards")]:
        del sys.modules[each]


def digest_at(place: Path, monkeypatch: pytest.MonkeyPatch, name: str = "ward") -> str:
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(place))
        return code_digest(name)


def test_the_same_code_has_the_same_digest_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytecode, line ends, dates and directories do not count."""
    files = {"wards/__init__.py": "", "wards/ward.py": GOOD, "wards/deep/help.py": "X = 1\n"}
    here = install(tmp_path / "here", {"ward": "wards.ward:Task"}, files)
    there = install(tmp_path / "there" / "and on", {"ward": "wards.ward:Task"}, files)
    (there / "wards" / "__pycache__").mkdir()
    (there / "wards" / "__pycache__" / "ward.py").write_text("x")
    (there / "wards" / "ward.py").write_bytes((here / "wards" / "ward.py").read_bytes().replace(b"\n", b"\r\n"))
    found = digest_at(here, monkeypatch)
    assert len(found) == 64
    assert digest_at(there, monkeypatch) == found


@pytest.mark.parametrize(
    "changes",
    [{"wards/ward.py": GOOD + "\n# once more\n"}, {"wards/deep/help.py": "X = 2\n"}, {"wards/more.py": ""}],
    ids=["the task", "what it imports", "a file more"],
)
def test_other_code_has_another_digest(
    changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"wards/__init__.py": "", "wards/ward.py": GOOD, "wards/deep/help.py": "X = 1\n"}
    entries = {"ward": "wards.ward:Task"}
    one = install(tmp_path / "one", entries, files)
    other = install(tmp_path / "other", entries, {**files, **changes})
    assert digest_at(one, monkeypatch) != digest_at(other, monkeypatch)


def test_another_version_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = install(tmp_path / "one", {"ward": "ward:Task"}, {"ward.py": GOOD})
    two = install(tmp_path / "two", {"ward": "ward:Task"}, {"ward.py": GOOD}, version="2")
    assert digest_at(one, monkeypatch) != digest_at(two, monkeypatch)


def test_of_a_namespace_the_tasks_own_part_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = install(
        tmp_path / "one",
        {"ward": "hospital.ward.task:Task"},
        {"hospital/ward/__init__.py": "", "hospital/ward/task.py": GOOD, "hospital/other/__init__.py": ""},
    )
    monkeypatch.syspath_prepend(str(place))
    assert set(source_files("ward")) == {"hospital/ward/__init__.py", "hospital/ward/task.py"}


def test_what_is_not_installed_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_digest("nothing") == ""
    assert len(code_digest("randhie")) == 64


BROKEN = {
    "an exception": "raise ValueError('no licence was found')",
    "a missing module": "import a_package_that_is_not_there",
    "a syntax error": "def f(:\n    pass",
    "the end of the process": "raise SystemExit('please set HOSPITAL_DB')",
    "an exception of its own": "class Odd(BaseException): pass\nraise Odd('x')",
    "no such class": "x = 1",
    "a class that cannot be made": "class Task:\n    def __init__(self):\n        raise KeyError('HOSPITAL_DB')",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_package_that_cannot_be_imported_is_one_sentence_and_is_found_once_it_is_mended(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import wards_broken.help\n" + BROKEN[what] + "\n"
    place = install(
        tmp_path,
        {"broken": "wards_broken:Task"},
        {"wards_broken/__init__.py": text, "wards_broken/help.py": "MENDED = False\n"},
    )
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(TaskError) as raised:
        find_task("broken")
    assert raised.value.metadata["problem"] == "TASK_IMPORT_FAILED"
    assert raised.value.message.startswith("task broken cannot be trained here: the task's package cannot be imported")
    assert "HOSPITAL_DB" not in raised.value.message
    if what != "no such class":  # which Sotto itself looks for
        assert raised.value.metadata["place"].startswith("__init__.py:")
    (place / "wards_broken" / "__init__.py").write_text(
        "import wards_broken.help\nclass Task:\n    name = 'broken'\n    mended = wards_broken.help.MENDED"
        "\n# of another size than before\n"
    )
    (place / "wards_broken" / "help.py").write_text("MENDED = 'mended'\n")
    assert find_task("broken").mended == "mended"  # type: ignore[attr-defined]


def test_a_place_is_a_line_of_the_tasks_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import json\nclass Task:\n    name = 'ward'\n    def read(self):\n        json.loads('{')\n"
    monkeypatch.syspath_prepend(str(install(tmp_path, {"ward": "wards_place:Task"}, {"wards_place.py": text})))
    task = find_task("ward")
    with pytest.raises(ValueError, match="Expecting") as raised:
        task.read()  # type: ignore[attr-defined]
    assert place_in("ward", raised.value) == "wards_place.py:5"
    assert place_in("randhie", raised.value) == ""
    assert is_place_of("ward", "wards_place.py:5")
    for of_others in ("decoder.py:355", "randhie.py:5", "", "wards_place"):
        assert not is_place_of("ward", of_others)


ENDING = {
    "ends the process": "import os; os._exit(3)",
    "starts a thread": "import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "raises": "raise SystemExit(1)",
    "hangs": "import time; time.sleep(600)",
}


def test_no_package_of_a_task_keeps_workers_from_being_forked(tmp_path: Path) -> None:
    """Whatever they do as they are imported: the zygote lives, has one thread, and has imported the other task."""
    files = {f"ending{number}.py": f"{text}\nclass Task: pass\n" for number, text in enumerate(ENDING.values())}
    entries = {name.removesuffix(".py"): f"{name.removesuffix('.py')}:Task" for name in files}
    place = install(tmp_path, {**entries, "fine": "fine:Task"}, {**files, "fine.py": "class Task: pass\n"})
    code = (
        "import sys, threading, src.learning.warm as warm; warm.TRIED_FOR_S = 2.0; "
        f"warm.prepare({[*entries, 'fine']!r}); "
        "print(threading.active_count(), *(name for name in sys.modules if name.startswith(('ending', 'fine'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "fine"]), done.stderr


def test_the_entry_points_of_other_tasks_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path, {"broken": "nowhere:Task", "odd": "::"}, {})))
    assert {"broken", "odd", "randhie"} <= set(installed.known_tasks())
    assert find_task("randhie").name == "randhie"
    assert code_digest("broken") == code_digest("odd") == ""


def test_a_package_that_changes_while_it_is_read_has_no_digest_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path, {"ward": "ward_here:Task"}, {"ward_here/__init__.py": GOOD})))
    assert code_digest("ward")

    def gone(_: Path) -> Any:
        raise FileNotFoundError("it was there a moment ago")

    monkeypatch.setattr(Path, "iterdir", gone)
    assert code_digest("ward") == ""
