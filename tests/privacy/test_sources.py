"""What protects somebody draws from no generator that is not cryptographically secure.

Held for every file of the package but those that are exempt by name, each with its reason; so it holds for the path of
DP-SGD and of noise, wherever a file of it lies. Names are followed through imports, aliases and assignments:
`from torch import randn as r` is found as well as `torch.randn`, and what a generator is asked for (`rng.normal`)
whatever the generator is called.
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
    "opacus",
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
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "feature_dropout",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "gumbel_softmax",
        "rrelu",
        "RReLU",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
        "FractionalMaxPool2d",
        "FractionalMaxPool3d",
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
        # of numpy's generators
        "binomial",
        "chisquare",
        "dirichlet",
        "exponential",
        "gumbel",
        "integers",
        "laplace",
        "logistic",
        "lognormal",
        "multivariate_normal",
        "negative_binomial",
        "normal",
        "permutation",
        "permuted",
        "rand",
        "randint",
        "randn",
        "random_integers",
        "random_sample",
        "rayleigh",
        "shuffle",
        "standard_cauchy",
        "standard_exponential",
        "standard_gamma",
        "standard_normal",
        "standard_t",
        "triangular",
        "uniform",
        "vonmises",
        "weibull",
        # of Python's; its SystemRandom is secure, but not as what makes noise: its normals are floats
        "SystemRandom",
        "betavariate",
        "choices",
        "expovariate",
        "gammavariate",
        "gauss",
        "getrandbits",
        "lognormvariate",
        "normalvariate",
        "paretovariate",
        "vonmisesvariate",
        "weibullvariate",
        # of scipy's and torch's distributions, and of Opacus
        "rvs",
        "rsample",
        "_generate_noise",
    }
)
"""Named on anything, whatever its name, or imported from anywhere."""

WELL_KNOWN = {"torch": "torch", "np": "numpy", "numpy": "numpy"}
"""What these names mean where a file does not say so itself."""

EXEMPT = {
    "learning/synthetic.py": "generates rows, which are nobody's, from a public seed",
    "learning/tasks/randhie.py": "splits public rows, and sets initial parameters, from a public seed",
}
"""Files that may use such generators, and why."""

OURS = {
    "encryption/keys.py": {".integers"},
    "learning/kept.py": {"random", "random.Random", "numpy.random", "numpy.random.Generator", "torch.Generator"},
    "learning/trial.py": {"torch.get_rng_state", "torch.set_rng_state"},
    "party/node.py": {".SystemRandom"},
}
"""Names that a file has for something else: numbers that are read from JSON; finding out whether a model draws, and
whether it keeps generators; the operating system's own generator, of which a sample is asked."""

FILES = sorted(path for path in SRC.rglob("*.py") if path.relative_to(SRC).as_posix() not in EXEMPT)

PATH = (
    "aggregator/work.py",
    "cli/train.py",
    "learning/audit.py",
    "learning/canaries.py",
    "learning/dpsgd.py",
    "learning/gradients.py",
    "learning/made_up.py",
    "learning/per_example.py",
    "learning/simulate.py",
    "learning/standalone.py",
    "learning/standalone_artifact.py",
    "learning/standalone_job.py",
    "learning/standalone_json.py",
    "learning/trial.py",
    "party/work.py",
    "privacy/entropy.py",
    "privacy/noise.py",
    "privacy/rounding.py",
    "privacy/sampling.py",
)
"""Of DP-SGD, noise and audit: were one of these renamed or made exempt, this would say so."""


def named(tree: ast.AST) -> Iterator[str]:
    """Every imported name, and every dotted name as its import spells it out; methods as `.name`."""
    known = dict(WELL_KNOWN)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                top = alias.name.partition(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f".{alias.name}"
                if not node.level:
                    yield f"{node.module}.{alias.name}"
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    _follow_assignments(tree, known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield f".{node.attr}"
            found = _spelt_out(node, known)
            if found:
                yield found
        elif isinstance(node, ast.Subscript):
            yield from _by_key(node, known)
        elif isinstance(node, ast.Call):
            yield from _looked_up(node, known)


def _spelt_out(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name, if it begins with one that is known."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not (isinstance(node, ast.Name) and node.id in known):
        return ""
    return ".".join([known[node.id], *reversed(parts)])


def _follow_assignments(tree: ast.AST, known: dict[str, str]) -> None:
    """`r = torch`, and what is made of `r`; as often as it takes."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs += [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs.append((node.target, node.value))
    found = True
    while found:
        found = False
        for target, value in pairs:
            text = _spelt_out(value, known)
            if text and isinstance(target, ast.Name) and target.id not in known:
                known[target.id] = text
                found = True


def _by_key(node: ast.Subscript, known: dict[str, str]) -> Iterator[str]:
    """What `numpy.__dict__["random"]`, `vars(torch)["randn"]` and `sys.modules["random"]` name."""
    if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
        return
    key, owner = node.slice.value, node.value
    if isinstance(owner, ast.Attribute) and owner.attr == "modules":
        yield key
    elif isinstance(owner, ast.Attribute) and owner.attr == "__dict__":
        yield f"{_spelt_out(owner.value, known)}.{key}"
    elif isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "vars" and owner.args:
        yield f"{_spelt_out(owner.args[0], known)}.{key}"


def _looked_up(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    """What `getattr(torch, "randn")`, `import_module("random")` and `__import__("random")` name."""
    texts = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if function in ("import_module", "__import__"):
        yield from texts
    if function == "getattr" and texts:
        yield f".{texts[0]}"
        yield f"{_spelt_out(call.args[0], known)}.{texts[0]}"


def insecure(text: str) -> set[str]:
    """The forbidden names in a file."""
    found, tree = set(), ast.parse(text)
    for name in named(tree):
        below = any(name == module or name.startswith(module + ".") for module in MODULES)
        if below:
            found.add(name)
        if name.startswith("torch.") and name.rpartition(".")[2] in TORCH:
            found.add(name)
        if name.startswith(".") and (name[1:] in METHODS or name == ".*"):
            found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_no_insecure_generator_is_named(path: Path) -> None:
    allowed = OURS.get(path.relative_to(SRC).as_posix(), set())
    assert insecure(path.read_text(encoding="utf-8")) <= allowed


def test_numbers_that_anybody_can_compute_are_taken_for_what_is_public_alone() -> None:
    users = {
        path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if "public_draws" in path.read_text("utf-8")
    }
    assert users == {"learning/synthetic.py", "learning/trial.py"}


def test_the_path_of_dp_sgd_and_of_noise_is_looked_at() -> None:
    looked_at = {path.relative_to(SRC).as_posix() for path in FILES}
    assert set(PATH) <= looked_at
    rooms = {path for room in ("privacy", "encryption") for path in (SRC / room).rglob("*.py")}
    assert rooms <= set(FILES)
    standalone = {path.relative_to(SRC).as_posix() for path in (SRC / "learning").glob("standalone*.py")}
    assert standalone <= set(PATH)


@pytest.mark.parametrize("name", EXEMPT)
def test_what_is_exempt_is_there_and_needs_it(name: str) -> None:
    assert insecure((SRC / name).read_text(encoding="utf-8"))


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
        "import gmpy2\ngmpy2.random_state(7)",
        "import importlib\nimportlib.import_module('random')",
        "__import__('random')",
        "def f():\n    from numpy.random import Generator",
        "def f(rng): return rng.normal(size=3)",
        "def f(rng): return rng.standard_normal(3)",
        "def f(g): g.shuffle(x)",
        "def f(g): return g.permutation(3)",
        "def f(g): return g.integers(3)",
        "from torch import *\nrandn(3)",
        "import torch\nr = torch\nr.randn(3)",
        "import torch\nr = torch.nn\ns = r.functional\ns.dropout(x)",
        "import torch\n(r := torch).rand(3); r.rand(3)",
        "import torch\nr: object = torch\nr.rand(3)",
        "from .tools import torch\ntorch.rand(3)",
        "import torch\ntorch.ops.aten.randn(3)",
        "import torch\ntorch.Tensor.normal_(x)",
        "import torch\ntorch.nn.functional.gumbel_softmax(x)",
        "from torch.nn import functional as F\nF.gumbel_softmax(x)",
        "import torch\ntorch.nn.Dropout(0.5)",
        "from torch.nn import Dropout2d",
        "import numpy\nnumpy.__dict__['random'].rand()",
        "import torch\nvars(torch)['rand'](3)",
        "import sys\nsys.modules['random'].random()",
        "import secrets\nsecrets.SystemRandom().gauss(0, 1)",
        "from secrets import SystemRandom",
        "import scipy\nscipy.stats.norm.rvs()",
        "from opacus.optimizers.optimizer import _generate_noise",
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
