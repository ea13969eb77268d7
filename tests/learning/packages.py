"""Packages of tasks, written and installed in a directory as pip would."""

from __future__ import annotations

import textwrap
from pathlib import Path

GOOD = """
import numpy as np
import torch
from sotto_task import Dataset

class Task:
    name = "ward"
    def build_model(self, seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 1)
    def load_data(self, options):
        table = np.loadtxt(options["file"], delimiter=",", dtype=np.float32, ndmin=2)
        return Dataset(table[:, :3], table[:, 3].astype(np.int64), "rows of a ward")
"""
"""A task whose rows lie in the file that its option names."""


def install(
    place: Path, entries: dict[str, str], files: dict[str, str], *, version: str = "1", name: str = "wards"
) -> Path:
    """Write modules below `place`, with the entry points of the tasks in them; for `sys.path`."""
    known = "import sys\nfor root in ('src', 'sotto'):\n    if root in sys.modules: break\n"
    known += "Dataset = __import__(root + '.learning.task', fromlist=['x']).Dataset\n"
    for where, text in {"sotto_task.py": known, **files}.items():
        file = place / where
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    about = place / f"{name}-{version}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{task} = {where}" for task, where in entries.items()]
    (about / "entry_points.txt").write_text("\n".join(["[sotto.tasks]", *lines, ""]))
    return place
