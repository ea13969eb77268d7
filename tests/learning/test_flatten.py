"""Flat vectors and safetensors: round trips, one layout, the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.learning.flatten import (
    Signature,
    flatten,
    from_safetensors,
    load_tensors,
    model_to_tensors,
    signature_of,
    to_safetensors,
    unflatten,
    vector_to_tensors,
)

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(width=32, allow_nan=False),
)


def f32(values: list[Any]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


NAMED = st.dictionaries(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), FLOATS, max_size=5)


@settings(deadline=None, max_examples=60)
@given(NAMED)
def test_flatten_and_back_is_the_same_bits(tensors: dict[str, NDArray[Any]]) -> None:
    vector, signature = flatten(tensors)
    assert vector.dtype == np.float32
    assert vector.shape == (signature.size,)
    back = unflatten(vector, signature)
    assert list(back) == sorted(tensors)
    for name, array in tensors.items():
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=60)
@given(NAMED)
def test_safetensors_and_back_is_the_same_bits_whatever_the_order(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["moment"] = np.linspace(0, 1, 3)
    tensors["steps"] = np.array(5)
    data = to_safetensors(tensors)
    assert data == to_safetensors(dict(reversed(tensors.items())))
    back = from_safetensors(data)
    assert set(back) == set(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
        assert back[name].flags.writeable


def test_the_order_is_that_of_the_names() -> None:
    vector, signature = flatten({"b": f32([[3, 4]]), "a.2": f32([2]), "a.10": f32([1])})
    assert vector.tolist() == [1, 2, 3, 4]
    assert signature == Signature((("a.10", (1,)), ("a.2", (1,)), ("b", (1, 2))))


def test_a_model_that_is_not_contiguous_is_stored_in_c_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(from_safetensors(to_safetensors({"w": array}))["w"], array)


def test_only_trainable_parameters_travel_and_load_gives_them_back() -> None:
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    for each in (model, other):
        each[1].bias.requires_grad_(False)
    tensors = model_to_tensors(model)
    assert set(tensors) == {"0.weight", "0.bias", "1.weight"}
    load_tensors(other, tensors)
    for name, array in model_to_tensors(other).items():
        assert np.array_equal(array, tensors[name])
    tensors["0.bias"] += 1
    assert not np.array_equal(model_to_tensors(model)["0.bias"], tensors["0.bias"]), "what comes out is a copy"


def test_a_vector_becomes_torch_tensors() -> None:
    vector, signature = flatten({"w": f32([[1, 2]])})
    assert torch.equal(vector_to_tensors(vector, signature)["w"], torch.tensor([[1.0, 2.0]]))


def test_the_aggregators_part_needs_no_torch() -> None:
    code = (
        "import sys, src.learning.flatten, src.learning.server_optimizer, src.learning.settings, src.learning.task;"
        "assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=True, timeout=60)


W = np.zeros((2, 2), np.float32)


def crafted(dtype: str, item_bytes: int) -> bytes:
    """A well-formed file with three values of `dtype`."""
    header = json.dumps({"w": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * item_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(3 * item_bytes)


def test_the_crafted_file_is_well_formed() -> None:
    assert from_safetensors(crafted("F32", 4))["w"].tolist() == [0, 0, 0]


REFUSED: dict[str, Callable[[], object]] = {
    "another dtype to flatten": lambda: flatten({"w": W.astype(np.float64)}),
    "a vector too short": lambda: unflatten(np.zeros(3, np.float32), signature_of({"w": W})),
    "a vector of float64": lambda: unflatten(np.zeros(4), signature_of({"w": W})),  # type: ignore[arg-type]
    "a signature out of order": lambda: Signature((("b", (1,)), ("a", (1,)))),
    "a signature with a name twice": lambda: Signature((("a", (1,)), ("a", (1,)))),
    "a negative dimension": lambda: Signature((("a", (-1,)),)),
    "a dtype that is not stored": lambda: to_safetensors({"w": W.astype(np.complex64)}),
    "bytes that are no safetensors": lambda: from_safetensors(b"\x08\0\0\0\0\0\0\0not json"),
    "safetensors cut short": lambda: from_safetensors(to_safetensors({"w": W})[:-1]),
    "a stored dtype that is not ours": lambda: from_safetensors(crafted("I32", 4)),
    "bfloat16, unknown to numpy": lambda: from_safetensors(crafted("BF16", 2)),
    "a model with other names": lambda: load_tensors(torch.nn.Linear(2, 2), {"w": W}),
    "a model that is not finite": lambda: load_tensors(torch.nn.Linear(2, 2, bias=False), {"weight": W + np.inf}),
    "a model of another shape": lambda: load_tensors(torch.nn.Linear(2, 3, bias=False), {"weight": W}),
    "a model in float64": lambda: model_to_tensors(torch.nn.Linear(2, 2).double()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    with pytest.raises(InvalidInput):
        REFUSED[what]()


def test_a_refused_load_leaves_the_model_as_it_was() -> None:
    model = torch.nn.Linear(2, 2)
    before = model_to_tensors(model)
    with pytest.raises(InvalidInput, match="'bias'"):
        load_tensors(model, {"weight": W})
    assert all(np.array_equal(array, before[name]) for name, array in model_to_tensors(model).items())
