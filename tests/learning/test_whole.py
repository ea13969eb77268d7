"""A stored model is its whole state: what a freshly built one takes by `load_state_dict(strict=True)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn

from src.errors import InvalidInput
from src.learning.flatten import flatten, model_to_tensors, to_safetensors
from src.learning.kept import arrays_of
from src.learning.model_file import Entry, ModelFile, digest_of, parameters_of, read_model_file
from src.learning.task import Task
from src.learning.whole import built, check_copied, check_model, digest_of_rest, load_model, model_file_of


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


class Buffers(nn.Module):
    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(6), persistent=persistent)
        self.head = nn.Linear(6, 2)


class Kinds(nn.Module):
    """Of every dtype that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.order = nn.Parameter(torch.randperm(6), requires_grad=False)
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("b16", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("f64", torch.randn(3, dtype=torch.float64))
        self.register_buffer("u8", torch.randint(0, 255, (5,), dtype=torch.uint8))
        self.register_buffer("scalar", torch.randn(()))
        self.register_buffer("nothing", torch.zeros(0, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 5)
        self.decoder = nn.Linear(5, 10, bias=False)
        self.decoder.weight = self.embed.weight


class Renamed(nn.Module):
    """Keeps its parameters under other names than it has them, as recurrent layers of DP libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 4)
        self._register_state_dict_hook(self._rename)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(self._restore)  # type: ignore[no-untyped-call]

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}cell.")]:
            state[f"{prefix}{name.rpartition('.')[2]}_l0"] = state.pop(name)

    @staticmethod
    def _restore(state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{name}_l0" in state:
                state[f"{prefix}cell.{name}"] = state.pop(f"{prefix}{name}_l0")


def whole() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 2))])


class Twice(nn.Module):
    """Layers that torch knows, in a list besides; and a list of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)
        self.order, self.weights, self.sizes = [self.a, self.b], (self.a.weight,), [6, 4, 2]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "whole": whole,
    "frozen": frozen,
    "buffers": Buffers,
    "kinds": Kinds,
    "tied": Tied,
    "renamed": Renamed,
    "renamed inside": lambda: nn.Sequential(Renamed(), nn.Linear(4, 2)),
    "weight norm": weight_norm,
    "listed": Listed,
    "listed twice": Twice,
    "recurrent": lambda: nn.LSTM(6, 4, 2),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    "compiled": lambda: cast(nn.Module, torch.compile(whole(), backend="eager")),
}


def build(which: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[which]()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("which", MODELS)
def test_what_is_stored_is_taken_strictly_by_a_model_of_any_seed_and_is_that_model(which: str) -> None:
    model = build(which, 5)
    content = model_file_of(model).to_bytes()
    assert content == model_file_of(build(which, 5)).to_bytes()  # the same bytes each time
    fresh = build(which, 0)
    fresh.load_state_dict(load(content), strict=True)
    assert same(state(fresh), state(model))
    again = build(which, 1)
    load_model(again, read_model_file(content))
    assert same(state(again), state(model))


@pytest.mark.parametrize("which", MODELS)
def test_parameters_are_put_into_a_stored_model_without_torch(which: str) -> None:
    """So an aggregator that has none writes the whole model of a job that came with its first one."""
    stored, trained = model_file_of(build(which, 5)), build(which, 5)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    tensors = model_to_tensors(trained)
    assert flatten(parameters_of(model_file_of(trained).to_bytes()))[1] == flatten(tensors)[1]
    made = read_model_file(stored.to_bytes()).with_parameters(tensors).to_bytes()
    fresh = build(which, 0)
    fresh.load_state_dict(load(made), strict=True)
    assert same(state(fresh), state(trained))


@pytest.mark.parametrize("which", MODELS)
def test_others_state_dicts_are_taken_too(which: str) -> None:
    model = build(which, 5)
    content = save({name: value.clone() for name, value in model.state_dict().items()})
    fresh = build(which, 0)
    load_model(fresh, read_model_file(content))
    assert same(state(fresh), state(model))


def test_a_model_that_is_all_trained_is_stored_as_ever() -> None:
    model = build("whole", 5)
    content = model_file_of(model).to_bytes()
    assert content == to_safetensors(model_to_tensors(model))
    assert b"__metadata__" not in content


@pytest.mark.parametrize("which", ["frozen", "buffers", "kinds", "tied", "renamed"])
def test_of_trained_parameters_alone_the_rest_is_the_models_own(which: str) -> None:
    """As artifacts were, and models of rounds are."""
    model, other = build(which, 5), build(which, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    load_model(other, read_model_file(to_safetensors(model_to_tensors(model))))
    assert same(state(other), state(model))


def test_values_lie_where_mapped_readers_expect_them(tmp_path: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file_of(build("kinds", 5)).to_bytes())
    model = build("kinds", 5)
    with safe_open(path, framework="pt") as file:
        for name, value in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)


@pytest.mark.parametrize("which", ["frozen", "buffers", "kinds"])
def test_the_digest_of_what_is_not_trained_is_of_seed_and_bits(which: str) -> None:
    assert (
        digest_of_rest(build(which, 5)) == digest_of_rest(build(which, 5)) == model_file_of(build(which, 5)).not_trained
    )
    assert digest_of_rest(build(which, 5)) != digest_of_rest(build(which, 6))


def test_the_digest_is_of_frozen_values_and_of_no_trained_one() -> None:
    model = build("frozen", 5)
    before = digest_of_rest(model)
    with torch.no_grad():
        next(iter(model[2].parameters())).zero_()  # type: ignore[index]
    assert digest_of_rest(model) == before
    with torch.no_grad():
        value = next(iter(model[0].parameters()))  # type: ignore[index]
        value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(9.0))
    assert digest_of_rest(model) != before


def test_a_buffer_that_no_state_holds_counts_as_well() -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Buffers(persistent=False)

    assert digest_of_rest(made(1)) == digest_of_rest(made(1)) != digest_of_rest(made(2))


@pytest.mark.parametrize("which", ["whole", "tied", "renamed", "weight norm", "listed"])
def test_where_all_is_trained_there_is_no_digest(which: str) -> None:
    assert digest_of_rest(build(which, 5)) == ""


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))


def none_trained() -> nn.Module:
    return nn.Linear(6, 2).requires_grad_(False)


class Half(nn.Module):
    """A state that holds only a part of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 2)
        self._register_state_dict_hook(self._part)  # type: ignore[no-untyped-call]

    @staticmethod
    def _part(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        state["a.weight"] = module.get_parameter("a.weight")[0]


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 2)

    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Unregistered(nn.Module):
    """A plain list or mapping, which torch does not look into."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.a = nn.Linear(6, 2)
        self.held = held


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bfloat16": (
        lambda: nn.Linear(6, 2).to(torch.bfloat16),
        "parameter 'weight' is bfloat16; models are trained in float32",
    ),
    "float16": (lambda: nn.Linear(6, 2).half(), "parameter 'weight' is float16; models are trained in float32"),
    "float64": (lambda: nn.Linear(6, 2).double(), "parameter 'weight' is float64; models are trained in float32"),
    "complex": (lambda: nn.Linear(6, 2, dtype=torch.complex64), "parameter 'weight' is complex64"),
    "one of two": (lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2).double()), "parameter '1.weight' is float64"),
    "lazy": (lazy, "'0.weight', '0.bias' is not initialised: a lazy layer"),
    "none trained": (none_trained, "no parameter to train"),
    "no parameters": (nn.ReLU, "no parameter to train"),
    "a list": (lambda: [nn.Parameter(torch.zeros(3))], "returns a torch.nn.Module; here it returns a list"),
    "parameters in a list beside a layer": (
        lambda: Unregistered([parameter()]),
        "'held' holds parameters that torch does not know of: take torch.nn.ParameterList",
    ),
    "parameters by name, further down": (
        lambda: nn.Sequential(Unregistered({"w": parameter()})),
        "'0.held' holds parameters that torch does not know of",
    ),
    "layers in a list": (
        lambda: Unregistered((nn.Linear(6, 2),)),
        "'held' holds layers that torch does not know of: take torch.nn.ModuleList",
    ),
    "a state": (lambda: nn.Linear(6, 2).state_dict(), "here it returns a OrderedDict"),
    "a class": (lambda: nn.Linear, "here it returns a type"),
    "nothing": (lambda: None, "here it returns a NoneType"),
    "a tuple": (lambda: (nn.Linear(6, 2), 3), "here it returns a tuple"),
    "extra state": (Extra, "'_extra_state' in the model's state is a dict: only tensors can be stored"),
    "a part": (Half, "'a.weight' in the model's state is a part of a trained parameter"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_trained_is_refused_with_a_sentence(which: str) -> None:
    make, said = REFUSED[which]
    for ask in (check_model, model_file_of, model_to_tensors):
        with pytest.raises(InvalidInput, match=said):
            ask(make())


@pytest.mark.parametrize("which", MODELS)
def test_what_can_be_trained_is_let_through(which: str) -> None:
    check_model(build(which, 0))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused_with_what_to_take_instead() -> None:
    with Path(__file__).open() as file:
        for model, kind in (
            (nn.utils.weight_norm(nn.Linear(6, 2)), "RuntimeError"),
            (Unregistered(file), "TypeError"),
        ):
            check_model(model)
            with pytest.raises(InvalidInput, match=rf"cannot be copied \({kind}\).*parametrizations.weight_norm\)"):
                check_copied(model)


def test_a_file_that_lacks_something_or_has_another_shape_leaves_no_doubt() -> None:
    model = build("frozen", 5)
    stored = model_file_of(model)
    for entries, said in (
        ({name: each for name, each in stored.entries.items() if name != "0.bias"}, "'0.bias' is missing"),
        ({**stored.entries, "0.bias": Entry("F32", (1,), b"\0" * 4)}, "'0.bias' differs"),
        ({**stored.entries, "other": stored.entries["0.bias"]}, "'other' differs"),
    ):
        with pytest.raises(InvalidInput, match=said):
            load_model(build("frozen", 0), ModelFile(entries, stored.trained, stored.not_trained))


MALFORMED = (
    "[]",
    "{",
    '{"trained": 3}',
    '{"trained": {"0.bias": 3}, "not_trained": ""}',
    '{"trained": {"x": "x"}, "not_trained": ""}',
    "[" * 9999,
)


@pytest.mark.parametrize("said", MALFORMED, ids=lambda said: said[:30])
def test_a_malformed_description_is_refused(said: str) -> None:
    content = save({"0.bias": torch.zeros(2)}, {"sotto": said})
    with pytest.raises(InvalidInput, match="does not say which"):
        read_model_file(content)


def test_metadata_that_are_null_are_none() -> None:
    head = b'{"0.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":null}'
    stored = read_model_file(len(head).to_bytes(8, "little") + head + bytes(4))
    assert list(stored.entries) == ["0.bias"]


def test_two_values_of_one_parameter_are_refused() -> None:
    stored = model_file_of(build("tied", 5))
    entries = {**stored.entries, "decoder.weight": model_file_of(build("tied", 6)).entries["decoder.weight"]}
    with pytest.raises(InvalidInput, match="two names in this file, and two values"):
        ModelFile(entries, stored.trained, "").parameters()


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_or_read(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        read_model_file(data)


NAMES = st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(NAMES, st.binary(max_size=9), max_size=4))
def test_any_state_is_read_as_it_was_written(values: dict[str, bytes]) -> None:
    entries = {name: Entry("U8", (len(data),), data) for name, data in values.items()}
    stored = ModelFile(entries, {}, digest_of(entries) or "-")
    assert read_model_file(stored.to_bytes()) == stored
    assert {name: bytes(each.numpy()) for name, each in load(stored.to_bytes()).items()} == values
    assert np.array_equal(sorted(stored.rest), sorted(values))


# --- what no file holds -----------------------------------------------------------------------------------------------


class Projected(nn.Module):
    """A fixed projection, kept in one of the ways that `state_dict` does not see."""

    def __init__(self, way: str, projection: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        if way == "buffer":
            self.register_buffer("projection", projection, persistent=False)
        elif way == "array":
            self.projection: Any = projection.numpy()
        elif way == "list":
            self.projections = [projection]
        elif way == "closure":
            self.project = lambda features: features @ projection
        else:
            self.projection = projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.head(features[:, :3]))


class OfWay:
    """A task whose model keeps a projection in that way, drawn from the seed or not."""

    name = "of way"

    def __init__(self, way: str, *, drawn: bool) -> None:
        self._way, self._drawn = way, drawn

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Projected(self._way, torch.rand(6, 3) if self._drawn else torch.eye(6)[:, :3])


WAYS = ["buffer", "attribute", "array", "list", "closure"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_what_is_drawn_from_the_seed_and_no_file_would_hold_is_refused_by_name(way: str, seed: int) -> None:
    with pytest.raises(InvalidInput, match=r"project.* is drawn from the seed, and not in the model's state_dict"):
        built(cast(Task, OfWay(way, drawn=True)), seed)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_the_same_with_every_seed_need_not_be_in_the_file(way: str) -> None:
    assert isinstance(built(cast(Task, OfWay(way, drawn=False)), 3), Projected)


@pytest.mark.parametrize("make", [frozen, Buffers, Kinds, Tied], ids=lambda make: make.__name__)
def test_what_a_file_holds_is_no_part_of_what_it_would_lack(make: Callable[[], nn.Module]) -> None:
    assert arrays_of(make()) == {}
