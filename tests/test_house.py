"""The rules of the house, read from the source: who may know whom, what is never called, how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
GENERATED = SRC / "communication" / "generated"
ROLES = {"aggregator", "party"}

LONGEST_FUNCTION = 60  # lines without the docstring: a screen
LONGEST_FILE = 500  # lines: one sitting
LONG_FUNCTIONS: dict[str, str] = {}
"""Functions that may be longer, as "room/file.py:name", each with its reason."""
LONG_FILES: dict[str, str] = {}
"""Files that may be longer, as "room/file.py", each with its reason."""

MAY_KNOW = {
    "encryption": {"errors"},
    "privacy": {"errors"},
    "protocol": {"errors", "files", "encryption", "privacy"},
}
"""Rooms that are pure: what of the package they may import besides themselves. (`files` is how keys and rosters get on
a disk.)"""

MUST_NOT_KNOW_ROLES = {"storage", "jobs", "communication", "learning", "protocol", "encryption", "privacy"}

ADAPTERS = {
    "torch": {"learning"},
    "sklearn": set(),
    "statsmodels": {"learning"},
    "matplotlib": {"learning", "cli"},
    "gmpy2": {"encryption"},
    "grpc": {"communication", "aggregator", "party", "client", "cli", "jobs"},
    "sqlalchemy": {"storage", "aggregator", "party", "jobs", "cli"},
    "alembic": {"storage"},
    "psycopg": {"storage"},
    "typer": {"cli"},
}
"""A library that only certain rooms touch."""

DYNAMIC_IMPORTS = {
    "cli/__init__.py": "sub-commands, from a table in the same file",
    "learning/task.py": "tasks, from a table in the same file",
    "jobs/executors/units.py": "the handlers' module, named by the role that starts the pool",
}
"""Where `import_module` may be called: never with anything from the wire or from storage."""

NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module written by hand, by its path below src/."""
    files = (path for path in SRC.rglob("*.py") if GENERATED not in path.parents)
    return {path.relative_to(SRC).as_posix(): ast.parse(path.read_text("utf-8"), path) for path in sorted(files)}


def room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def imports(file: str, tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether it is of this package), also inside functions and under TYPE_CHECKING."""
    package = [*Path(file).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            assert node.level - 1 <= len(package), f"{file}:{node.lineno} imports from above the package"
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            # `from . import a, b` names modules; `from .a import f` names what is in one.
            names = [".".join([*base, alias.name]) for alias in node.names] if not node.module else [".".join(base)]
            yield from ((node.lineno, name, True) for name in names)


def offenders(rule: object) -> list[str]:
    """Lines "file:line imports module" for which rule(room, module, internal) is true."""
    assert callable(rule)
    return [
        f"{file}:{line} imports {module}"
        for file, tree in sources().items()
        for line, module, internal in imports(file, tree)
        if rule(room(file), module, internal)
    ]


def top(module: str) -> str:
    return module.partition(".")[0]


# ------------------------------------------------------------------------------------------------ who may know whom


def test_inside_the_package_only_relative_imports() -> None:
    assert offenders(lambda _, module, internal: not internal and top(module) in {"src", "sotto"}) == []


@pytest.mark.parametrize("pure", MAY_KNOW)
def test_a_pure_room_knows_only_its_neighbours(pure: str) -> None:
    allowed = MAY_KNOW[pure] | {pure}
    assert offenders(lambda here, module, internal: internal and here == pure and top(module) not in allowed) == []


@pytest.mark.parametrize("pure", MAY_KNOW)
def test_a_pure_room_speaks_to_no_network_no_database_and_no_model(pure: str) -> None:
    outside = {"grpc", "sqlalchemy", "sqlite3", "torch", "socket", "http", "urllib", "asyncio", "google"}
    assert offenders(lambda here, module, internal: not internal and here == pure and top(module) in outside) == []


def test_shared_rooms_never_import_a_role() -> None:
    assert (
        offenders(lambda here, module, internal: internal and here in MUST_NOT_KNOW_ROLES and top(module) in ROLES)
        == []
    )


def test_the_roles_never_import_each_other() -> None:
    assert offenders(lambda here, module, internal: internal and here in ROLES and top(module) in ROLES - {here}) == []


def test_only_entry_points_import_the_command_line() -> None:
    found = offenders(lambda here, module, internal: internal and top(module) == "cli" and here != "cli")
    entries = ("__main__.py:", *(f"{role}/main.py:" for role in ROLES))
    assert [line for line in found if not line.startswith(entries)] == []


@pytest.mark.parametrize("library", ADAPTERS)
def test_a_library_is_touched_where_it_belongs(library: str) -> None:
    rooms = ADAPTERS[library]
    assert offenders(lambda here, module, internal: not internal and top(module) == library and here not in rooms) == []


def test_what_protects_somebody_is_never_drawn_from_a_toy_generator() -> None:
    pure = {"encryption", "privacy", "protocol"}
    assert offenders(lambda here, module, internal: not internal and here in pure and top(module) == "random") == []
    calls = {"np.random.default_rng", "numpy.random.default_rng", "np.random.RandomState", "gmpy2.random_state"}
    assert [
        f"{file}:{line} calls {name}" for file, line, name in called() if room(file) in pure and name in calls
    ] == []


# ------------------------------------------------------------------------------------------------ what is never done


def called() -> Iterator[tuple[str, int, str]]:
    """(file, line, dotted name) of every call by name."""
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield file, node.lineno, ast.unparse(node.func)


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert offenders(lambda _, module, internal: not internal and top(module) in NEVER_IMPORTED) == []
    unsafe = NEVER_CALLED | {"yaml.load", "yaml.unsafe_load", "torch.load", "torch.save", "os.system"}
    assert [f"{file}:{line} calls {name}" for file, line, name in called() if name in unsafe] == []


def test_numpy_reads_no_pickles() -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg in {"allow_pickle", "shell"}
        and ast.unparse(node.value) != "False"
    ]
    assert found == []


def test_modules_are_imported_by_name_only_where_the_names_are_our_own() -> None:
    found = {file for file, _, name in called() if name.rpartition(".")[2] == "import_module"}
    assert found == set(DYNAMIC_IMPORTS)


def test_nothing_is_left_for_later() -> None:
    words = ("TODO", "FIXME", "NotImplementedError", "XXX")  # what is looked for, in src/ alone: left over nowhere
    found = [
        f"{file}:{number} {word}"
        for file in sources()
        for number, line in enumerate((SRC / file).read_text("utf-8").splitlines(), start=1)
        for word in words
        if word in line
    ]
    assert found == []


# ----------------------------------------------------------------------------------------------------------- sizes


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    return length - ((first.end_lineno or first.lineno) - first.lineno + 1 if docstring else 0)


def test_functions_fit_on_a_screen() -> None:
    long = {
        f"{file}:{node.name}": function_lines(node)
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > LONGEST_FUNCTION
    }
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(long), "an exception that is none any more"


def test_files_are_read_in_one_sitting() -> None:
    long = {
        file: count for file in sources() if (count := len((SRC / file).read_text("utf-8").splitlines())) > LONGEST_FILE
    }
    assert {file: count for file, count in long.items() if file not in LONG_FILES} == {}
    assert set(LONG_FILES) <= set(long), "an exception that is none any more"


def test_every_module_says_what_it_is_for() -> None:
    assert [file for file, tree in sources().items() if not ast.get_docstring(tree)] == []


# ------------------------------------------------------------------------------------------------------- two names


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(("first", "second"), [("sotto", "src"), ("src", "sotto")])
def test_the_package_is_loaded_under_one_name_only(first: str, second: str) -> None:
    done = python(f"import {first}, {second}")
    assert done.returncode == 1
    assert f"Sotto is already loaded as '{first}'" in done.stderr


@pytest.mark.parametrize("name", ["sotto", "src"])
def test_the_package_is_loaded_under_either_name(name: str) -> None:
    done = python(f"import {name}.errors as errors; print(errors.__name__)")
    assert (done.returncode, done.stdout.strip()) == (0, f"{name}.errors")
