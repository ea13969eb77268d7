"""Files that others must not read, change, or have put elsewhere: the one place that makes them.

What a role makes is its owner's alone whatever the process's umask says, since a mode is set and not only asked for.
Nothing is written through a name that somebody may have planted: a new file is made under a name that nobody can know
(`O_EXCL`, which follows no link), flushed, and given its name in one step. So a reader sees a file whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .errors import ConfigError, StorageError

SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o700
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_A_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS: Final = 40
"""On the way to a file, as Linux has it."""
OF_A_ROLE: Final = re.compile(
    r"[a-z]+\.sqlite([.-].*)?|blobs|work|(private|public)_key\.json|signing\.key|accepted\.json|aggregator\.json|address|\..*"
)
"""What a role's state directory may hold. Whatever else lies there says that it is not for a role alone."""
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How file systems refuse a second name for a file that have no such thing."""


def write_new(path: Path, content: bytes, *, secret: bool) -> None:
    """Write a file that is not there yet, durably, whole or not at all.

    Args:
        secret: for its owner alone (0600); else everybody may read it (0644).

    Raises:
        FileExistsError: something has the name already, if only a link to nothing; it is left as it is.
    """
    staged = _stage(path, content, mode=SECRET_MODE if secret else PUBLIC_MODE)
    try:
        try:
            os.link(staged, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            staged.rename(path)
    finally:
        staged.unlink(missing_ok=True)
    _flush_directory(path.parent)


def write_over(path: Path, content: bytes, *, secret: bool) -> None:
    """Write a file, durably, whole or not at all, in the place of what has its name: of a link, not of what that
    points to. `secret` as for `write_new`."""
    staged = _stage(path, content, mode=SECRET_MODE if secret else PUBLIC_MODE)
    try:
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _stage(path: Path, content: bytes, *, mode: int) -> Path:
    staged = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems flush no directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_private(path: Path, flags: int) -> int:
    """A descriptor of a file that its owner alone reads and writes, made if need be; the caller closes it.

    Args:
        flags: of `os.open`, besides that the file is made and no link followed.

    Raises:
        StorageError: the name is a link, or the file is somebody else's: it may have been planted.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        raise StorageError(f"{path} is a link: it may have been planted, and is not followed") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise StorageError(f"{path} belongs to somebody else (uid {found.st_uid}): it may have been planted")
        if stat.S_IMODE(found.st_mode) != SECRET_MODE:
            os.fchmod(descriptor, SECRET_MODE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_there(path: Path) -> bool:
    """Whether there is a file of this name, so that none is made.

    Raises:
        StorageError: there is a link to nothing: what is to be made would be made elsewhere.
    """
    if path.is_symlink() and not path.exists():
        raise StorageError(f"{path} is a link to nothing: it may have been planted; remove it")
    return path.exists()


def make_private_directory(path: Path) -> Path:
    """Make a directory for its owner alone (0700), and what is missing above it; one that is there stays as it is."""
    for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
        try:
            missing.mkdir(mode=DIRECTORY_MODE)
        except FileExistsError:  # somebody was faster: it is theirs
            continue
        with _directory(missing) as descriptor:
            os.fchmod(descriptor, DIRECTORY_MODE)
    return path


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory that has this name itself, and not behind a link."""
    descriptor = os.open(path, _A_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def expanded(path: Path) -> Path:
    """With a home directory in the place of a ~ that it begins with. Raises ConfigError: there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no home directory that its ~ could stand for") from error


def open_state_directory(path: Path) -> list[str]:
    """Make or check the directory of a role's memory, in which nobody else may change or plant anything.

    One that is this user's, that others may write to, and in which nothing lies but what a role makes, becomes private;
    what lies in it is looked at then. Of a directory that is more than that no mode is changed, nor of one that a link
    names, as operators do where there is room elsewhere. What was looked at is what is changed: all by descriptor.

    Returns:
        What was changed, as sentences for the operator.

    Raises:
        ConfigError: it cannot be made; it, or the link that is named, is somebody else's; others may write to it and it
            is not for this process to change that; or something in it may have been planted while they could.
    """
    try:
        make_private_directory(path)
        linked = path.is_symlink()
        if linked and (owner := path.lstat().st_uid) not in (os.geteuid(), 0):
            raise _unusable(path, f"is a link that belongs to somebody else (uid {owner}), who could lead it elsewhere")
        if not path.is_dir():
            raise _unusable(path, "is not a directory")
        with _directory(path.resolve() if linked else path) as descriptor:
            return _check_directory(path, descriptor, linked=linked)
    except OSError as error:
        raise _unusable(path, f"cannot be used: {error.strerror}") from error


def _check_directory(path: Path, descriptor: int, *, linked: bool) -> list[str]:
    found = os.fstat(descriptor)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.geteuid(), 0):
        raise _unusable(path, f"belongs to somebody else (uid {found.st_uid}), who could change what lies in it")
    if not mode & _OTHERS_WRITE:
        return []
    _make_private(path, descriptor, mode, linked=linked)
    for name in os.listdir(descriptor):
        at = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISLNK(at.st_mode) or at.st_uid not in (os.geteuid(), 0):
            what = "is a link" if stat.S_ISLNK(at.st_mode) else f"belongs to uid {at.st_uid}"
            raise _unusable(
                path,
                f"could be written to by others (mode {mode:04o}; it is private now), and {name} in it {what}, "
                "which may have been planted: look at it, and remove it",
            )
    return [f"the state directory {path} could be written to by others (mode {mode:04o}): it is private now"]


def _make_private(path: Path, descriptor: int, mode: int, *, linked: bool) -> None:
    """Raises ConfigError where the directory is shared on purpose, behind a link, or not this user's to change."""
    advice = "name a directory inside it, which is made private"
    text = f"can be written to by others than its owner (mode {mode:04o}) and"
    others = next((name for name in os.listdir(descriptor) if not OF_A_ROLE.fullmatch(name)), None)
    if mode & stat.S_ISVTX or others is not None:
        why = "is shared by everybody" if others is None else f"holds other things too ({others})"
        raise _unusable(path, f"{text} {why}: {advice}")
    if linked:
        raise _unusable(path, f"{text} is named by a link, behind which no mode is changed: chmod 700 it, or {advice}")
    try:
        os.fchmod(descriptor, DIRECTORY_MODE)
    except OSError as error:
        text = f"can be written to by others than its owner (mode {mode:04o}), and this process cannot change that"
        raise _unusable(path, f"{text} ({error.strerror}): {advice}") from error


def who_may_replace(path: Path) -> list[str]:
    """Who else could put another directory in the place of a state directory, by way of one above it, or above a link
    to it, as sentences for the operator. They could take away what a role remembers, or give it an older copy."""
    trusted = (os.geteuid(), 0)
    found = {}
    for step in _way(path.absolute()):
        above, at = step.parent.stat(), step.lstat()
        mode = stat.S_IMODE(above.st_mode)
        if above.st_uid not in trusted:
            found[step.parent] = f"belongs to uid {above.st_uid}"
        elif mode & _OTHERS_WRITE and not mode & stat.S_ISVTX:
            found[step.parent] = f"can be written to by others (mode {mode:04o})"
        if stat.S_ISLNK(at.st_mode) and at.st_uid not in trusted:
            found[step] = f"is a link that belongs to uid {at.st_uid}"
    return [f"the state directory {path} could be replaced: {at} {why}" for at, why in found.items()]


def _way(path: Path) -> Iterator[Path]:
    """Every name that is looked up on the way to a path, links followed."""
    at, rest, links = Path(path.anchor), [*reversed(path.parts[1:])], 0
    while rest and links < _MOST_LINKS:
        part = rest.pop()
        if part == "..":  # no link is left in `at`
            at = at.parent
            continue
        at /= part
        yield at
        if at.is_symlink():
            target = at.parent / at.readlink()
            at, rest, links = Path(target.anchor), [*rest, *reversed(target.parts[1:])], links + 1


def _unusable(path: Path, why: str) -> ConfigError:
    problem = f"state_dir: {path} {why}"
    return ConfigError(problem, problems=(problem,))
