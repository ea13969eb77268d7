"""Files that others must not read, change or redirect, whatever the umask and whatever lies there already."""

from __future__ import annotations

import ast
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src import files
from src.aggregator.app import App as AggregatorApp
from src.aggregator.app import _write_address
from src.aggregator.federation import open_federation
from src.cli.train import _Target
from src.config import load_aggregator_config, load_party_config
from src.errors import ConfigError, StorageError
from src.files import (
    make_private_directory,
    open_private,
    open_state_directory,
    who_may_replace,
    write_new,
    write_over,
)
from src.party.app import App as PartyApp
from src.protocol.signing import SigningKey
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.migrations import Migrations

SRC = Path(files.__file__).parent
NOBODY = 65534


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- one way to write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_new, write_over])
@pytest.mark.parametrize(("secret", "expected"), [(True, 0o600), (False, 0o644)])
def test_a_file_has_its_mode_whatever_the_umask(
    tmp_path: Path, umask: int, write: Callable[..., None], secret: bool, expected: int
) -> None:
    write(tmp_path / "file", b"content", secret=secret)
    assert mode(tmp_path / "file") == expected
    assert (tmp_path / "file").read_bytes() == b"content"
    assert names(tmp_path) == ["file"]


def test_directories_are_private_up_to_the_first_that_was_there(tmp_path: Path, umask: int) -> None:
    before = mode(tmp_path)
    assert make_private_directory(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    assert [mode(tmp_path / each) for each in ("a", "a/b", "a/b/c")] == [0o700] * 3
    assert mode(tmp_path) == before


def test_a_new_file_is_never_written_over_another_nor_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "link").symlink_to(victim)  # to nothing yet
    (tmp_path / "file").write_bytes(b"older")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"secret", secret=True)
    assert not victim.exists()
    assert (tmp_path / "file").read_bytes() == b"older"
    assert names(tmp_path) == ["file", "link"]


def test_what_replaces_a_link_leaves_alone_what_it_points_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"theirs")
    (tmp_path / "address").symlink_to(victim)
    write_over(tmp_path / "address", b"ours", secret=False)
    assert victim.read_bytes() == b"theirs"
    assert not (tmp_path / "address").is_symlink()


def test_a_file_system_without_hard_links_is_written_to_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    write_new(tmp_path / "file", b"content", secret=True)
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", b"another", secret=True)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [write_new, write_over])
def test_what_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "file", b"content", secret=True)
    assert names(tmp_path) == []


def test_a_private_file_is_neither_a_link_nor_somebody_elses(tmp_path: Path) -> None:
    os.close(open_private(tmp_path / "new", os.O_RDWR))
    assert mode(tmp_path / "new") == 0o600
    (tmp_path / "open").touch(0o666)
    (tmp_path / "open").chmod(0o666)
    os.close(open_private(tmp_path / "open", os.O_RDWR))
    assert mode(tmp_path / "open") == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="is a link"):
        open_private(tmp_path / "link", os.O_RDWR)
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    with pytest.raises(StorageError, match="belongs to somebody else"):
        open_private(tmp_path / "theirs", os.O_RDWR)


def test_files_are_made_in_one_place() -> None:
    """Whoever makes the next file cannot forget its mode: what makes files and directories is called where the table
    says why."""
    making = {"write_text", "write_bytes", "touch", "mkdir", "makedirs", "mkdtemp", "NamedTemporaryFile", "mkstemp"}
    allowed = {
        "files.py": "the place",
        "storage/blobs.py": "under names of its own, 0600 and 0700",
        "jobs/artifact.py": "a scientist's downloads: their umask",
        "cli/train.py": "the directory that was asked for: the user's umask",
        "aggregator/work.py": "in a worker's own directory, which is 0700",
        "jobs/executors/selftest.py": "likewise",
        "hardening.py": "/proc",
        "demo/run.py": "the demonstration's own directory, 0700",
        "demo/processes.py": "likewise",
        "provisioning/__init__.py": "mkdtemp is 0700",
    }
    found: dict[str, set[str]] = {}
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            last = name.rpartition(".")[2]
            writes = last == "open" and isinstance(node, ast.Call) and _writes(node, name)
            if last in making or writes:
                found.setdefault(path.relative_to(SRC).as_posix(), set()).add(name)
    assert {file: names for file, names in found.items() if file not in allowed} == {}
    assert set(allowed) <= set(found), "an exception that is none any more"


def _writes(call: ast.Call, name: str) -> bool:
    if name == "os.open":
        return "O_CREAT" in ast.unparse(call)
    modes = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return any(set(each) & set("wax+") for each in modes if len(each) <= 3)


# --- a state directory ------------------------------------------------------------------------------------------------


def test_a_state_directory_is_made_private_with_what_is_missing_above_it(tmp_path: Path, umask: int) -> None:
    state = tmp_path / "var" / "state"
    assert open_state_directory(state) == []
    assert (mode(state), mode(state.parent)) == (0o700, 0o700)
    assert open_state_directory(state) == []


@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o702, 0o2775])
def test_a_state_directory_that_others_may_write_to_becomes_private_and_the_operator_is_told(
    tmp_path: Path, open_to: int
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "signing.key").write_bytes(b"ours")
    state.chmod(open_to)
    (told,) = open_state_directory(state)
    assert (mode(state), "it is private now" in told) == (0o700, True)
    assert open_state_directory(state) == []


@pytest.mark.parametrize("mode_before", [0o1777, 0o777, 0o2775])
def test_the_mode_of_a_directory_that_is_more_than_a_roles_is_never_changed(tmp_path: Path, mode_before: int) -> None:
    """Whoever puts state into /tmp, or a ledger into their home, is told where to put it: nothing else there breaks."""
    shared = tmp_path / "shared"
    shared.mkdir()
    if not mode_before & stat.S_ISVTX:
        (shared / "letters").mkdir()
    shared.chmod(mode_before)
    with pytest.raises(ConfigError, match="name a directory inside it"):
        open_state_directory(shared)
    assert mode(shared) == mode_before
    assert open_state_directory(shared / "own") == []


def test_what_a_role_makes_is_known_for_its_own(tmp_path: Path) -> None:
    """Else its own state directory would be taken for somebody's home, once others may write to it."""
    made = ["aggregator.sqlite", "party.sqlite-wal", "party.sqlite.lock", "party.sqlite.before-3", "blobs", "work"]
    made += ["private_key.json", "public_key.json", "signing.key", "aggregator.json", "address", ".address.0123abcd"]
    state = make_private_directory(tmp_path / "state")
    for name in made:
        (state / name).touch()
    state.chmod(0o777)
    assert len(open_state_directory(state)) == 1
    (state / "notes.txt").touch()
    state.chmod(0o777)
    with pytest.raises(ConfigError, match=r"holds other things too \(notes\.txt\)"):
        open_state_directory(state)


def test_one_that_others_may_only_look_into_stays_as_it_is(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    assert open_state_directory(state) == []
    assert mode(state) == 0o755


def test_what_may_have_been_planted_is_named_and_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "blobs").symlink_to(tmp_path)
    state.chmod(0o777)
    with pytest.raises(ConfigError, match=r"blobs in it is a link, which may have been planted"):
        open_state_directory(state)
    assert mode(state) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_somebody_else_left_there_or_owns_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "private_key.json").write_text("{}")
    os.chown(state / "private_key.json", NOBODY, NOBODY)
    state.chmod(0o777)
    with pytest.raises(ConfigError, match=f"private_key.json in it belongs to uid {NOBODY}"):
        open_state_directory(state)
    os.chown(state, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        open_state_directory(state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a directory that another may not change")
def test_one_that_cannot_be_made_private_is_refused_with_a_way_out() -> None:
    """As a volume is mounted whose group may write: root's, and not this user's to change."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        state = Path(directory) / "state"
        state.mkdir()
        os.chown(state, 0, NOBODY)
        state.chmod(0o2770)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(ConfigError, match="name a directory inside it"):
                open_state_directory(state)
            assert open_state_directory(state / "own") == []
            assert (mode(state / "own"), mode(state)) == (0o700, 0o2770)
        finally:
            os.seteuid(0)
            os.setegid(0)


def test_no_directory_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a directory"):
        open_state_directory(tmp_path / "file")


@pytest.mark.parametrize("open_to", [0o770, 0o777, 0o1777])
def test_no_mode_is_changed_behind_a_link(tmp_path: Path, open_to: int) -> None:
    """Operators do link to a disk with room: such a directory is used as it is, or refused."""
    there = tmp_path / "disk"
    there.mkdir()
    (there / ".profile").touch()  # which a role might have made, too
    (tmp_path / "state").symlink_to(there)
    there.chmod(open_to)
    with pytest.raises(ConfigError, match="name a directory inside it"):
        open_state_directory(tmp_path / "state")
    assert mode(there) == open_to
    assert open_state_directory(tmp_path / "state" / "own") == []
    there.chmod(0o750)
    assert open_state_directory(tmp_path / "state") == []
    assert mode(there) == 0o750


def test_a_directory_that_becomes_a_link_while_it_is_looked_at_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is checked, nor one that was just made."""
    victim = tmp_path / "victim"
    victim.mkdir()
    victim.chmod(0o770)
    state, made = tmp_path / "state", tmp_path / "made"
    state.mkdir()
    state.chmod(0o770)
    really_mkdir, really_is_link = Path.mkdir, Path.is_symlink

    def swap(path: Path) -> None:
        path.rmdir()
        path.symlink_to(victim)

    def is_symlink(path: Path) -> bool:
        was = really_is_link(path)
        if path == state and not was:
            swap(path)
        return was

    def mkdir(path: Path, *arguments: int, **more: int) -> None:
        really_mkdir(path, *arguments, **more)  # type: ignore[arg-type]
        swap(path)

    monkeypatch.setattr(Path, "is_symlink", is_symlink)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    for path in (state, made):
        with pytest.raises(ConfigError, match="cannot be used"):
            open_state_directory(path)
    assert mode(victim) == 0o770


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives links away")
def test_a_link_of_somebody_else_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    os.chown(tmp_path / "state", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"is a link that belongs to somebody else \\(uid {NOBODY}\\)"):
        open_state_directory(tmp_path / "state")


def test_a_start_says_who_else_could_replace_the_state_directory(tmp_path: Path) -> None:
    """By a directory above it, or above any link on the way to it: sticky ones are safe, `..` leads through none."""
    state = tmp_path / "open" / "there" / "state"
    make_private_directory(state)
    assert who_may_replace(state) == []
    (tmp_path / "open").chmod(0o777)
    (told,) = who_may_replace(state)
    assert told.endswith(f"could be replaced: {tmp_path / 'open'} can be written to by others (mode 0777)")
    assert who_may_replace(tmp_path / "open" / ".." / "open") == []
    (tmp_path / "second").symlink_to(Path("open") / "there")
    (tmp_path / "open" / "first").symlink_to(tmp_path / "second" / "..")
    (tmp_path / "open").chmod(0o770)
    assert len(who_may_replace(tmp_path / "second" / "state")) == 1
    assert len(who_may_replace(tmp_path / "open" / "first")) == 1
    (tmp_path / "open").chmod(0o1777)
    assert who_may_replace(state) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_start_names_what_is_somebody_elses_on_the_way(tmp_path: Path) -> None:
    state = tmp_path / "theirs" / "state"
    make_private_directory(state)
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    (told,) = who_may_replace(state)
    assert f"theirs belongs to uid {NOBODY}" in told
    os.chown(tmp_path / "theirs", 0, 0)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    (told,) = who_may_replace(tmp_path / "link" / "state")
    assert f"link is a link that belongs to uid {NOBODY}" in told


def test_both_roles_warn_of_who_could_replace_their_memory(tmp_path: Path) -> None:
    """Beside what they changed of it."""
    tmp_path.chmod(0o777)
    keys = "keys: {custody: aggregator, insecure_small_modulus: true"
    start = f"version: 1\nfederation: demo\nserver: {{insecure: true}}\n{keys}"
    (tmp_path / "aggregator.yaml").write_text(f"{start}, modulus_bits: 512}}\nstate_dir: a\n")
    (tmp_path / "party.yaml").write_text(
        f"{start}}}\nname: b\nstate_dir: b\ndatasets: {{randhie: {{declared_rows: 9}}}}\n"
    )
    aggregator = AggregatorApp(load_aggregator_config(tmp_path / "aggregator.yaml", environ={}))
    party = PartyApp(load_party_config(tmp_path / "party.yaml", environ={}))
    for app in (aggregator, party):
        assert [f"{tmp_path} can be written to by others" in each for each in app._changed] == [True]


# --- what a role makes ------------------------------------------------------------------------------------------------


async def test_what_a_role_makes_is_its_owners_alone_under_no_umask_at_all(tmp_path: Path) -> None:
    """Keys, database with its log and shared memory, lock, copy before an upgrade, blobs; public is the public key."""
    before = os.umask(0)
    try:
        state = _classic(tmp_path)
        database = Database(state / "aggregator.sqlite", Migrations("aggregator"))
        await database.open()
        await database.run(lambda connection: connection.exec_driver_sql("CREATE TABLE x (y)"))
        Blobs(state / "blobs").write(b"a model")
        modes = {path.relative_to(state).as_posix(): mode(path) for path in state.rglob("*")}
        await database.close()
    finally:
        os.umask(before)
    assert mode(state) == 0o700
    assert modes.pop("public_key.json") == 0o644
    assert {"private_key.json", "signing.key", "aggregator.sqlite-wal", "aggregator.sqlite-shm", "blobs"} <= set(modes)
    assert {name: oct(each) for name, each in modes.items() if each & 0o077} == {}


@pytest.mark.parametrize(("secret", "expected"), [(True, 0o600), (False, 0o644)])
def test_a_model_that_was_trained_without_privacy_is_its_owners_alone(
    tmp_path: Path, secret: bool, expected: int
) -> None:
    """`sotto train --out`, where the node allows that at all: such a model may hold rows."""
    before = os.umask(0)
    try:
        _Target(tmp_path / "out").write("{}", b"weights", secret=secret)
    finally:
        os.umask(before)
    assert {oct(mode(path)) for path in (tmp_path / "out").iterdir()} == {oct(expected)}


def _classic(tmp_path: Path) -> Path:
    (tmp_path / "aggregator.yaml").write_text(
        "version: 1\nfederation: demo\nstate_dir: var/state\nserver: {insecure: true}\n"
        "keys: {custody: aggregator, modulus_bits: 512, insecure_small_modulus: true}\n"
    )
    config = load_aggregator_config(tmp_path / "aggregator.yaml", environ={})
    open_state_directory(config.state_dir)
    open_federation(config, now=0)
    return config.state_dir


@pytest.mark.parametrize("name", ["private_key.partial", ".private_key.json.partial", "address.partial"])
def test_no_planted_link_gets_a_key_or_an_address(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    state = tmp_path / "var" / "state"
    make_private_directory(state)
    (state / name).symlink_to(victim)
    _classic(tmp_path)
    _write_address(state / "address", "127.0.0.1:1")
    assert not victim.exists()
    assert (state / "address").read_text() == "127.0.0.1:1\n"
    assert not (state / "private_key.json").is_symlink()


def test_no_planted_link_gets_a_database(tmp_path: Path) -> None:
    from src.storage.sqlite import SqliteAdapter

    for planted in ("x.sqlite", "x.sqlite.lock"):
        directory = make_private_directory(tmp_path / planted)
        (directory / planted).symlink_to(tmp_path / "victim")
        with pytest.raises(StorageError, match="is a link"):
            SqliteAdapter(directory / "x.sqlite").open(Migrations("party"))
    assert not (tmp_path / "victim").exists()


async def test_whoever_opens_a_ledger_for_writing_looks_at_its_directory_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`sotto train` and `sotto budget set` too, which are no role."""
    state = make_private_directory(tmp_path / "state")
    state.chmod(0o777)
    database = Database(state / "party.sqlite", Migrations("party"))
    await database.open()
    await database.close()
    assert (mode(state), "it is private now" in caplog.text) == (0o700, True)
    (state / "signing.key").symlink_to("/dev/null")
    state.chmod(0o777)
    with pytest.raises(ConfigError, match="may have been planted"):
        await database.open()


def test_no_planted_link_gets_a_signing_key(tmp_path: Path) -> None:
    (tmp_path / "signing.key").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="a link to nothing"):
        SigningKey.load_or_make(tmp_path / "signing.key")
    assert not (tmp_path / "victim").exists()
