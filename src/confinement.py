"""A process that gives up what it does not need: from then on the kernel lets it read what runs it, and nothing else.

Landlock (Linux 5.13; `man 7 landlock`) takes rights from the thread that asks, from what it starts, and from nobody
else; nothing gives them back. Files that are open already stay open, and `stat` still finds a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_PR_SET_NO_NEW_PRIVS: Final = 38  # <linux/prctl.h>
_VERSION: Final = 1
_PATH_BENEATH: Final = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE: Final = 1 << 14
_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 5: 16}
"""Bits of rights to files that a version of the interface brought: (1 << bits) - 1 is all of them."""
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
"""Of these, what a file can have that is no directory."""
_NETWORK: Final = 0b11  # since 4: to bind and to connect TCP sockets
_SCOPES: Final = 0b11  # since 6: abstract UNIX sockets, signals to processes outside

_SYSTEM: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/urandom",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
)
"""What an interpreter and its libraries read beside themselves, and nobody keeps data in."""

_confined = False


def version() -> int:
    """Of Landlock in this kernel; 0 where there is none, or it is switched off."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))))


def confine(*, readable: Iterable[Path], writable: Iterable[Path] = ()) -> bool:
    """From here on this thread, and what it starts, reads what is `readable`, or in it, and writes into `writable`, or
    into what is open already. It executes no program, opens no TCP connection (Linux 6.7), and reaches no process
    outside (6.12).

    Returns:
        False where the kernel has no Landlock: then nothing has changed.

    Raises:
        OSError: the kernel has it and refuses.
    """
    global _confined
    found = version()
    if not found:
        return False
    libc = _libc()
    rights = (1 << _RIGHTS[max(known for known in _RIGHTS if known <= found)]) - 1
    attributes = struct.pack("=QQQ", rights, _NETWORK if found >= 4 else 0, _SCOPES if found >= 6 else 0)
    size = 24 if found >= 6 else 16 if found >= 4 else 8
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)))
    try:
        for path in readable:
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(libc, ruleset, path, rights & ~_EXECUTE)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)
    _confined = True
    return True


def is_confined() -> bool:
    """Whether this process has given something up by `confine`."""
    return _confined


def code() -> list[Path]:
    """Where the interpreter is, and all that can be imported: the system's libraries, installed packages, and of every
    other place on the import path its packages and modules, not what lies beside them."""
    places = [Path(each) for each in (*_SYSTEM, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())]
    roots = [place.resolve() for place in places if place.is_absolute() and place.exists()]
    found = dict.fromkeys(roots)
    for entry in (Path(each or ".").resolve() for each in sys.path):
        if not any(entry.is_relative_to(root) for root in roots):
            found.update(dict.fromkeys(_importable(entry)))
    for module in list(sys.modules.values()):  # what an editable installation finds by a hook is on no path
        if "." not in module.__name__:
            found.update(dict.fromkeys(_files_of(module, roots)))
    return list(found)


def _importable(entry: Path) -> Iterator[Path]:
    if entry.is_file():  # a zip
        yield entry
    elif entry.is_dir():
        with contextlib.suppress(OSError):
            for each in entry.iterdir():
                named = each.suffix in (".py", ".so", ".dist-info", ".egg-info")
                if named or (each / "__init__.py").is_file():
                    yield each


def _files_of(module: object, roots: list[Path]) -> Iterator[Path]:
    file = getattr(module, "__file__", None)
    if isinstance(file, str) and file:
        path = Path(file).resolve()
        path = path.parent if path.stem == "__init__" else path
        if path.exists() and not any(path.is_relative_to(root) for root in roots):
            yield path


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it is not there, or not this user's to see: then there is nothing to allow
        return
    try:
        rights = rights if path.is_dir() else rights & _OF_FILES
        rule = struct.pack("=Qi", rights, place)
        _checked(libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0)))
    finally:
        os.close(place)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
