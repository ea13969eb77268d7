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
from pathlib import Path
from typing import Final

from .errors import ConfigError, StorageError

SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o700
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
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
        missing.chmod(DIRECTORY_MODE)
    return path


def open_state_directory(path: Path) -> list[str]:
    """Make or check the directory of a role's memory, in which nobody else may change or plant anything.

    One that is this user's, that others may write to, and in which nothing lies but what a role makes, becomes private;
    what lies in it is looked at then. Of a directory that is more than that no mode is changed.

    Returns:
        What was changed, as sentences for the operator.

    Raises:
        ConfigError: it cannot be made; it is somebody else's; others may write to it and it is not for this process to
            change that; or something in it may have been planted while they could.
    """
    try:
        make_private_directory(path)
        found = path.stat()
    except OSError as error:
        raise _unusable(path, f"cannot be used: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(path, "is not a directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise _unusable(path, f"belongs to somebody else (uid {found.st_uid}), who could change what lies in it")
    if not mode & _OTHERS_WRITE:
        return []
    _make_private(path, mode)
    for entry in path.iterdir():
        at = entry.lstat()
        if stat.S_ISLNK(at.st_mode) or at.st_uid not in (os.geteuid(), 0):
            what = "is a link" if stat.S_ISLNK(at.st_mode) else f"belongs to uid {at.st_uid}"
            raise _unusable(
                path,
                f"could be written to by others (mode {mode:04o}; it is private now), and {entry.name} in it {what}, "
                "which may have been planted: look at it, and remove it",
            )
    return [f"the state directory {path} could be written to by others (mode {mode:04o}): it is private now"]


def _make_private(path: Path, mode: int) -> None:
    """Raises ConfigError where the directory is shared on purpose, or not this user's to change."""
    advice = "name a directory inside it, which is made private"
    others = next((entry.name for entry in path.iterdir() if not OF_A_ROLE.fullmatch(entry.name)), None)
    if mode & stat.S_ISVTX or others is not None:
        why = "is shared by everybody" if others is None else f"holds other things too ({others})"
        raise _unusable(path, f"can be written to by others than its owner (mode {mode:04o}) and {why}: {advice}")
    try:
        path.chmod(DIRECTORY_MODE)
    except OSError as error:
        text = f"can be written to by others than its owner (mode {mode:04o}), and this process cannot change that"
        raise _unusable(path, f"{text} ({error.strerror}): {advice}") from error


def _unusable(path: Path, why: str) -> ConfigError:
    problem = f"state_dir: {path} {why}"
    return ConfigError(problem, problems=(problem,))
