"""Units of work on models: what they answer, as it comes out of a worker."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.aggregator.work import EXPORTS, HANDLERS, model_shape, write_npz
from src.errors import InvalidInput, NotFoundError
from src.jobs.computations import ExportSpec
from src.jobs.executors.units import WorkContext, decode_reply, encode_unit, execute
from src.learning.flatten import flatten, from_safetensors, to_safetensors
from src.storage.blobs import Blobs

HOLDOUT = {"parties": 3, "seed": 0, "holdout": 0.2}
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "0.bias": np.array([np.nan, -0.0], np.float32),
    "file": np.array(3, np.int64),
    "allow_pickle": np.zeros((0, 2), np.float64),
}
"""All dtypes that a model's file may hold; a scalar and an empty array; names that `np.savez` could not take."""


@pytest.fixture
def context(tmp_path: Path) -> WorkContext:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return WorkContext(Blobs(tmp_path / "blobs"), workspace)


def run(context: WorkContext, name: str, **params: Any) -> dict[str, Any]:
    """The unit as a worker runs it: JSON in, JSON out."""
    return decode_reply(execute(encode_unit(name, params, version=1), HANDLERS, context))


def npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_an_export_holds_every_array_by_name_with_its_dtype_shape_and_bits(context: WorkContext) -> None:
    model = context.blobs.write(to_safetensors(TENSORS))
    made = run(context, "export_model", sha256=model.sha256, format="npz")
    assert made["size"] == context.blobs.size(made["sha256"])
    found = npz(context.blobs.path(made["sha256"]))
    assert set(found) == set(TENSORS)
    for name, array in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_the_same_model_gives_the_same_bytes_in_whatever_order_and_whenever(context: WorkContext) -> None:
    model = context.blobs.write(to_safetensors(TENSORS))
    first = run(context, "export_model", sha256=model.sha256, format="npz")
    assert run(context, "export_model", sha256=model.sha256, format="npz") == first
    path = context.workspace / "other"
    with path.open("w+b") as file:
        write_npz(dict(reversed(TENSORS.items())), file)
    assert path.read_bytes() == context.blobs.read(first["sha256"])
    with zipfile.ZipFile(path) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=5))
def test_a_model_with_any_names_is_exported_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]
) -> None:
    tensors = {name: np.full(size, size, np.float32) for name, size in sizes.items()}
    path = tmp_path_factory.mktemp("npz") / "model.npz"
    try:
        with path.open("w+b") as file:
            write_npz(tensors, file)
    except InvalidInput:
        assert any("\0" in name or name.endswith(".npy") for name in tensors)
    else:
        found = npz(path)
        assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in tensors.items()}


@pytest.mark.parametrize("name", ["a\0b", "a.npy", "n" * 5000], ids=["NUL", "suffix", "length"])
def test_a_name_that_an_npz_file_cannot_tell_apart_is_refused(context: WorkContext, name: str) -> None:
    model = context.blobs.write(to_safetensors({name: np.zeros(1, np.float32)}))
    with pytest.raises(InvalidInput, match="cannot stand in an npz file"):
        run(context, "export_model", sha256=model.sha256, format="npz")


def test_nothing_in_an_export_is_pickled_or_leads_out_of_a_directory(context: WorkContext) -> None:
    path = context.workspace / "model.npz"
    with path.open("w+b") as file:
        write_npz({"../../x": np.zeros(2, np.float32)}, file)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(context.workspace / "inside")
        assert b"|O" not in archive.read("../../x.npy")
    assert [each.name for each in (context.workspace / "inside").rglob("*.npy")] == ["x.npy"]


def test_every_format_that_a_job_may_ask_for_can_be_written() -> None:
    formats = ExportSpec.model_fields["format"].annotation
    assert set(getattr(formats, "__args__", ())) == set(EXPORTS)


def test_the_dimension_of_a_model_is_known_without_a_worker() -> None:
    data = to_safetensors({"a": np.zeros((3, 4), np.float32), "b": np.zeros((), np.float32)})
    assert model_shape(data) == 13


@pytest.mark.parametrize(
    "data", [b"", b"weights", bytes(100), to_safetensors({"a": np.zeros(3)}), to_safetensors(TENSORS)[:-1]]
)
def test_what_is_no_model_of_float32_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        model_shape(data)


def test_the_dimension_of_a_task_is_that_of_its_model_whatever_the_seed(context: WorkContext) -> None:
    dimension = run(context, "task_shape", task="randhie", seed=0)["dimension"]
    assert dimension == 177
    for seed in (0, 7):
        built = run(context, "initial_model", task="randhie", seed=seed)
        data = context.blobs.read(built["sha256"])
        assert flatten(from_safetensors(data))[1].size == built["dimension"] == dimension
        assert built["size"] == len(data)
    with pytest.raises(NotFoundError, match="no task is called 'other'"):
        run(context, "task_shape", task="other", seed=0)


def test_an_evaluation_gives_metrics_and_says_on_which_rows(context: WorkContext) -> None:
    sha256 = run(context, "initial_model", task="randhie", seed=0)["sha256"]
    found = run(context, "evaluate_model", task="randhie", options=HOLDOUT, sha256=sha256)
    assert set(found["metrics"]) == {"accuracy", "auc", "n"}
    assert "held-out" in found["rows"]


@pytest.mark.parametrize("wrong", ["shape", "NaN"])
def test_a_model_that_cannot_be_measured_is_refused_for_good(context: WorkContext, wrong: str) -> None:
    """Not a failure of the worker, after which it would be tried again."""
    sha256 = run(context, "initial_model", task="randhie", seed=0)["sha256"]
    tensors = from_safetensors(context.blobs.read(sha256))
    if wrong == "shape":
        tensors["0.weight"] = tensors["0.weight"][:-1]
    else:
        tensors["0.weight"] = np.full_like(tensors["0.weight"], np.nan)
    sha256 = context.blobs.write(to_safetensors(tensors)).sha256
    with pytest.raises(InvalidInput):
        run(context, "evaluate_model", task="randhie", options=HOLDOUT, sha256=sha256)
