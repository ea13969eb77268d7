"""What protects somebody draws from no generator that is not cryptographically secure.

Held for every file of `privacy` and `encryption`, and for the path of DP-SGD and of noise: the files that run it, and
all that they import of the package. Names are followed through imports and aliases: `from torch import randn as r` is
found as well as `torch.randn`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

MODULES = (
    "random",
    "numpy.random",
    "randomgen",
    "scipy.stats",
    "torch.distributions",
    "torch.random",
    "torch.nn.init",
    "torch.cuda",
    "torch.utils.data",
    "torchcsprng",
    "opacus.PrivacyEngine",
    "opacus.data_loader",
    "opacus.privacy_engine",
    "opacus.utils.uniform_sampler",
)
"""Nothing of these may be imported or named, nor anything below them."""

TORCH = frozenset(
    {
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "normal",
        "bernoulli",
        "multinomial",
        "poisson",
        "dropout",
        "Generator",
        "manual_seed",
        "seed",
        "initial_seed",
        "default_generator",
        "get_rng_state",
        "set_rng_state",
    }
)
"""Functions of torch and of its sub-modules."""

METHODS = frozenset(
    {
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "exponential_",
        "geometric_",
        "cauchy_",
        "log_normal_",
        "multinomial",
        "manual_seed",
        "default_rng",
        "RandomState",
        "random_state",
        "mpz_urandomb",
        "mpz_random",
        "mpz_rrandomb",
        "shuffle_",
        "randperm",
    }
)
"""Called on anything, whatever its name."""

ROOMS = sorted(path for room in ("privacy", "encryption") for path in (SRC / room).rglob("*.py"))
ROOTS = [
    SRC / name
    for name in ("learning/dpsgd.py", "learning/gradients.py", "party/work.py", "aggregator/work.py")
    if (SRC / name).exists()
]


def named(tree: ast.AST) -> Iterator[str]:
    """Every imported name, and every dotted name as its import spells it out; methods as `.name`."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                top = alias.name.partition(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield f".{node.attr}"
            parts: list[str] = []
            value: ast.expr = node
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in known:
                yield ".".join([known[value.id], *reversed(parts)])
        elif isinstance(node, ast.Call):
            yield from _looked_up(node, known)


def _looked_up(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    """What `getattr(torch, "randn")`, `import_module("random")` and `__import__("random")` name."""
    texts = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if function in ("import_module", "__import__"):
        yield from texts
    if function == "getattr" and texts:
        yield f".{texts[0]}"
        if isinstance(call.args[0], ast.Name) and call.args[0].id in known:
            yield f"{known[call.args[0].id]}.{texts[0]}"


def insecure(text: str) -> set[str]:
    """The forbidden names in a file."""
    found = set()
    for name in named(ast.parse(text)):
        if any(name == module or name.startswith(module + ".") for module in MODULES):
            found.add(name)
        if name.startswith("torch.") and name.rpartition(".")[2] in TORCH:
            found.add(name)
        if name.startswith(".") and name[1:] in METHODS:
            found.add(name)
    return found


def imported(path: Path) -> Iterator[Path]:
    """The files of the package that `path` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for candidate in (base, *(base / alias.name for alias in node.names)):
                for file in (candidate.with_suffix(".py"), candidate / "__init__.py"):
                    if file.exists():
                        yield file


def reached(roots: list[Path]) -> list[Path]:
    """`roots` and all of the package that they import, directly or not."""
    seen: set[Path] = set()
    left = list(roots)
    while left:
        path = left.pop()
        if path not in seen:
            seen.add(path)
            left += imported(path)
    return sorted(seen)


FILES = sorted({*ROOMS, *reached(ROOTS)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_no_insecure_generator_is_named(path: Path) -> None:
    assert not insecure(path.read_text(encoding="utf-8"))


def test_the_path_of_dp_sgd_is_followed_to_its_noise_and_its_samples() -> None:
    """From the training loop to what draws: were a file renamed, this would say so."""
    followed = {path.relative_to(SRC).as_posix() for path in reached([SRC / "learning" / "dpsgd.py"])}
    assert {"learning/dpsgd.py", "privacy/sampling.py", "privacy/entropy.py"} <= followed
    assert {"privacy/noise.py", "privacy/rounding.py"} <= {
        path.relative_to(SRC).as_posix() for path in reached([SRC / "party" / "work.py"])
    }


@pytest.mark.parametrize(
    "text",
    [
        "import random",
        "import random as r\nr.random()",
        "from random import choice",
        "import numpy as np\nnp.random.default_rng()",
        "from numpy import random as r\nr.normal()",
        "from numpy.random import default_rng",
        "import torch\ntorch.randn(3)",
        "import torch as t\nt.nn.functional.dropout(x)",
        "from torch import randn as draw",
        "import torch\ntorch.Generator().manual_seed(3)",
        "import torch\nx = torch.zeros(3).normal_()",
        "import torch\ngetattr(torch, 'rand')(3)",
        "x.bernoulli_(0.5)",
        "from torch.utils.data import RandomSampler",
        "from opacus import PrivacyEngine",
        "from opacus.utils.uniform_sampler import UniformWithReplacementSampler",
        "import gmpy2\ngmpy2.random_state(7)",
        "import importlib\nimportlib.import_module('random')",
        "__import__('random')",
        "def f():\n    from numpy.random import Generator",
    ],
)
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert insecure(text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.from_numpy(x).sum()",
        "import os\nos.urandom(3)",
        "from ..encryption.integers import random_bits\nrandom_bits(e, 3)",
        "import secrets\nsecrets.token_bytes(3)",
        "# import random\ntext = 'np.random'",
    ],
)
def test_and_nothing_else(text: str) -> None:
    assert not insecure(text)
