"""The wheel: everything is in it, and it runs where there is no checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")


def run(*arguments: object, cwd: Path) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing stale in build/ gets in and nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that holds the wheel, and borrows what the wheel depends on."""
    place = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    # Installed first and borrowed from afterwards, so that pip does not see the checkout's own installation.
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    # A path in a .pth file is searched, but .pth files in it are not read: the checkout's editable hook stays out.
    (purelib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"sotto/{path.relative_to(ROOT / 'src').as_posix()}"
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_every_directory_with_modules_is_a_package() -> None:
    directories = {path.parent for path in (ROOT / "src").rglob("*.py")}
    assert [str(path) for path in sorted(directories) if not (path / "__init__.py").exists()] == []


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text, scripts = archive.read(metadata).decode(), archive.read(entry_points).decode()
        licenses = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert "License-Expression: Apache-2.0" in text
    assert licenses == {"LICENSE", "NOTICE"}
    for line in ("sotto = sotto.cli:main", "sotto-aggregator = ", "sotto-party = ", "randhie = sotto.learning.tasks"):
        assert line in scripts


def test_the_installed_command_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    assert "Commands:" in run(installed / "sotto", "--help", cwd=tmp_path)
    where = run(installed / "python", "-c", "import sotto; print(sotto.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    module = (installed / "python", "-m", "sotto", "--version")
    assert run(*module, cwd=tmp_path) == run(installed / "sotto", "--version", cwd=tmp_path)


def test_the_installed_command_makes_kits(installed: Path, tmp_path: Path) -> None:
    wishes = ("--party", "a", "--party", "b", "--modulus-bits", "512", "--insecure-small-modulus", "--json")
    made = json.loads(run(installed / "sotto", "provision", "--out", "kits", *wishes, cwd=tmp_path))
    assert made["threshold"] == 2
    assert (tmp_path / "kits/party-b/share.json").is_file()
