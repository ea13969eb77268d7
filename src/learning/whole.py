"""The whole state of a torch model: what is trained of it, what is not, and whether a task's model can be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from safetensors import deserialize
from safetensors.torch import save

from ..errors import EvaluationError, InvalidInput, SottoError
from ..logs import type_and_place
from ..protocol.faults import SENTENCES, TaskProblem
from ..text import brief, shown
from .flatten import load_tensors
from .kept import arrays_of, changed
from .model_file import Entry, ModelFile, digest_of

if TYPE_CHECKING:
    from .task import Task

SHOWN_NAMES: Final = 3
_NOWHERE: Final = (0, (), ())
_OF_TORCH: Final = frozenset(vars(torch.nn.Module()))


def check_model(model: object) -> None:
    """Refuse what cannot be trained as a model of a task, whatever the rows are.

    Raises:
        InvalidInput: it is no module; a layer is not initialised; a parameter that is trained is not float32; none is
            trained; or its state is not made of tensors, each trained parameter whole.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput(f"a task's build_model returns a torch.nn.Module; here it returns a {type(model).__name__}")
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, value in named if torch.nn.parameter.is_lazy(value)]
    if lazy:
        raise InvalidInput(
            f"{_names(lazy)} is not initialised: a lazy layer learns its shape from the first rows that it sees, and a "
            "model's parameters are the same everywhere before any row is seen; name the number of inputs"
        )
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise InvalidInput(
                f"parameter {shown(name)} is {_dtype(parameter)}; models are trained in float32 (model.float())"
            )
    _check_registered(model)
    if not trained:
        raise InvalidInput("the model has no parameter to train: all of them, if any, have requires_grad=False")
    _trained_names(model)


def check_copied(model: torch.nn.Module) -> None:
    """Refuse a model that cannot be copied: trials and training work on copies.

    Raises:
        InvalidInput: says what was raised by its type; its text is the task's.
    """
    try:
        copy.deepcopy(model)
    except Exception as error:  # of whatever the task put into it
        raise InvalidInput(
            f"the model cannot be copied ({type(error).__name__}), and is trained as a copy: it holds a tensor that "
            "was computed as it was built, as torch.nn.utils.weight_norm leaves one (take "
            "torch.nn.utils.parametrizations.weight_norm), or an open file or connection",
            private=brief(error),
        ) from error


def _check_registered(model: torch.nn.Module) -> None:
    """Refuse parameters and layers in a plain list or mapping: torch finds none of them, trains and stores none."""
    known = {id(each) for each in (*model.modules(), *model.parameters())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OF_TORCH or not isinstance(value, Mapping | list | tuple):
                continue
            kept = [each for each in (value.values() if isinstance(value, Mapping) else value) if id(each) not in known]
            where = shown(f"{path}.{name}" if path else name)
            if any(isinstance(each, torch.nn.Parameter) for each in kept):
                raise InvalidInput(f"{where} holds parameters that torch does not know of: take torch.nn.ParameterList")
            if any(isinstance(each, torch.nn.Module) for each in kept):
                raise InvalidInput(f"{where} holds layers that torch does not know of: take torch.nn.ModuleList")


def model_file_of(model: torch.nn.Module) -> ModelFile:
    """A model's state as it is stored; copies.

    Raises:
        InvalidInput: it cannot be trained (`check_model`).
    """
    check_model(model)
    state = model.state_dict()
    trained = _trained_names(model)
    return ModelFile(_entries(state), trained, digest_of(_entries(_not_trained(model))))


def digest_of_rest(model: torch.nn.Module) -> str:
    """The digest of what is not trained of a model: frozen parameters and all buffers; empty where it has none."""
    return digest_of(_entries(_not_trained(model)))


def require_rest(model: torch.nn.Module, digest: str) -> None:
    """Refuse a model of which something else is not trained than everybody else has; an empty digest is not known.

    Raises:
        InvalidInput: with the class NOT_TRAINED_STATE_DIFFERS.
    """
    problem = TaskProblem.NOT_TRAINED_STATE_DIFFERS
    if digest and digest_of_rest(model) != digest:
        raise InvalidInput(SENTENCES[problem], problem=problem.value)


def load_model(model: torch.nn.Module, stored: ModelFile) -> None:
    """Set a model's state: the whole of it where the file has it, or else what is trained. In place.

    Raises:
        InvalidInput: names, shapes or dtypes are not the model's, or a value is not finite; or the file has only a part
            of what is not trained.
    """
    if not stored.described and stored.entries.keys() == model.state_dict().keys():
        stored = ModelFile(stored.entries, _trained_names(model), "")  # as others write `state_dict`
    rest = {name: stored.entries[name] for name in stored.rest}
    load_tensors(model, stored.parameters())
    if not rest:
        return
    own = _entries(model.state_dict())
    for name, entry in rest.items():
        known = own.get(name)
        if known is None or (known.dtype, known.shape) != (entry.dtype, entry.shape):
            raise InvalidInput(f"the tensors are not this model's: {shown(name)} differs in name, shape or dtype")
    lacking = sorted(own.keys() - stored.entries.keys())
    if lacking:
        raise InvalidInput(f"the file does not hold all of the model: {_names(lacking)} is missing")
    model.load_state_dict({name: _tensor(entry) for name, entry in stored.entries.items()}, strict=True)


def holds_all(model: torch.nn.Module, stored: ModelFile) -> bool:
    """Whether a file holds all that `load_state_dict` takes."""
    return stored.entries.keys() >= model.state_dict().keys()


def _trained_names(model: torch.nn.Module) -> dict[str, str]:
    """Of each tensor of the state that is trained, its parameter's name.

    Raises:
        InvalidInput: the state is not made of tensors, or not of parameters as they are.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    by_id = {id(each): name for name, each in parameters.items()}
    by_place = {_place(each): name for name, each in parameters.items() if each.numel()}
    storages = {each.untyped_storage().data_ptr() for each in parameters.values() if each.numel()}
    found: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise InvalidInput(
                f"{shown(name)} in the model's state is a {type(value).__name__}: only tensors can be stored"
            )
        parameter = by_id.get(id(value)) or by_place.get(_place(value) if value.numel() else _NOWHERE)
        if parameter is not None:
            found[name] = parameter
        elif value.numel() and value.untyped_storage().data_ptr() in storages:
            raise InvalidInput(f"{shown(name)} in the model's state is a part of a trained parameter, not all of it")
    lacking = sorted(parameters.keys() - set(found.values()))
    if lacking:
        raise InvalidInput(f"the model's state_dict does not hold {_names(lacking)}, which is trained")
    return found


def _not_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a row meets and that is not trained, also what `state_dict` leaves out."""
    trained = _trained_names(model)
    named: dict[str, torch.Tensor] = dict(model.named_buffers())
    named |= {name: each for name, each in model.named_parameters() if not each.requires_grad}
    named |= {name: each for name, each in model.state_dict(keep_vars=True).items() if name not in trained}
    return named


def _place(value: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return value.data_ptr(), tuple(value.shape), tuple(value.stride())


def _entries(state: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    try:
        written = deserialize(save(copies))  # type: ignore[no-untyped-call]
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidInput("the model's state cannot be stored", private=str(error)) from error
    return {str(name): Entry(str(each["dtype"]), tuple(each["shape"]), bytes(each["data"])) for name, each in written}


def _tensor(entry: Entry) -> torch.Tensor:
    from safetensors.torch import load

    return load(ModelFile({"t": entry}, {}, "-").to_bytes())["t"]


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _names(names: list[str]) -> str:
    return ", ".join(map(shown, names[:SHOWN_NAMES])) + (" …" if len(names) > SHOWN_NAMES else "")


def built(task: Task, seed: int) -> torch.nn.Module:
    """The task's model, of which `check_model` has nothing to say.

    Raises:
        InvalidInput: as `check_model` and `check_copied`; or a tensor that no file of the model would hold is another
            with another seed.
    """
    model = _built(task, seed)
    unheld = arrays_of(model)
    drawn = changed(unheld, arrays_of(_built(task, seed ^ 1))) if unheld else []
    if drawn:
        raise InvalidInput(
            f"{_names(drawn)} is drawn from the seed, and not in the model's state_dict: whoever loads a result into a "
            "model of another seed would have another model, in silence. Take register_buffer(name, tensor), "
            "persistent, or draw it from a fixed seed of its own"
        )
    return model


def _built(task: Task, seed: int) -> torch.nn.Module:
    model: object = task.build_model(seed)
    check_model(model)
    assert isinstance(model, torch.nn.Module)
    check_copied(model)
    return model


def restored(task: Task, stored: ModelFile, *, seed: int | None, not_trained: str) -> torch.nn.Module:
    """A task's model as it was stored, whole.

    Args:
        seed: of which the task builds what the file does not hold; None: not known.
        not_trained: the digest of that; empty: not known.

    Raises:
        EvaluationError: the task's model cannot be built, or something else of it is not trained here than there.
        InvalidInput: the file is another model's, or lacks what is not known.
    """
    try:
        model = built(task, seed or 0)
    except Exception as error:
        why = error.message if isinstance(error, SottoError) else type_and_place(error)
        raise EvaluationError(f"the model of task {task.name!r} cannot be built: {why}", private=brief(error)) from None
    if seed is None and digest_of_rest(model) and not holds_all(model, stored):
        raise InvalidInput(
            "the file holds what is trained of the model alone, and the rest is not known: hand in a job's "
            "model.safetensors, or all of state_dict()"
        )
    load_model(model, stored)
    expected = not_trained or stored.not_trained
    if expected and digest_of_rest(model) != expected:
        raise EvaluationError(f"at this aggregator, {SENTENCES[TaskProblem.NOT_TRAINED_STATE_DIFFERS]}")
    return model
