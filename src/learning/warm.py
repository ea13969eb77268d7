"""Imported by a zygote before it forks workers: what each of them would otherwise import by itself, in seconds.

Only imports, no computation: nothing here may start a thread, for a forked child would hang on it.
"""

from __future__ import annotations

import contextlib

import torch  # noqa: F401

from .task import find_task, known_tasks

for _name in known_tasks():
    # A task whose data package is not installed here is another role's concern.
    with contextlib.suppress(ImportError):
        getattr(find_task(_name), "preload", lambda: None)()
