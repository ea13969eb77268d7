"""Models and losses that mix rows, draw or remember are refused on public rows, and the rest is what torch computes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from src.errors import InvalidInput
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import rows_that_count
from src.learning.task import Dataset, default_loss
from src.learning.trial import try_out
from src.protocol.faults import PLACE, TaskProblem

Build = Callable[[], nn.Module]


def rows_like(shape: tuple[int, ...], labels: Any = np.int64) -> Dataset:
    return Dataset(np.zeros((0, *shape), np.float32), np.zeros(0, labels), "none")


def tried(build: Build, loss: Any = default_loss, *, shape: tuple[int, ...] = (6,), labels: Any = np.int64) -> None:
    model = build().double().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    try:
        try_out(model, loss, list(model.parameters()), shape=shape, label_dtype=np.dtype(labels))
    finally:
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())


def linear(outputs: int = 2) -> Build:
    return lambda: nn.Linear(6, outputs)


class Made(nn.Module):
    """A linear layer and whatever `how` does with it."""

    def __init__(self, how: Callable[[Any, torch.Tensor], torch.Tensor], outputs: int = 2) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 6), nn.Linear(6, outputs)
        self.seen: list[torch.Tensor] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.how(self, rows)


def made(how: Callable[[Any, torch.Tensor], torch.Tensor], outputs: int = 2) -> Build:
    return lambda: Made(how, outputs)


def remembers(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Half of what the last call saw."""
    before = model.seen[-1] if model.seen else torch.zeros_like(rows)
    model.seen.append(rows.detach())
    return torch.as_tensor(model.b(rows + 0.5 * before[:1]))


def after(*layers: nn.Module, width: int, outputs: int = 2) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, outputs))


class Counter(nn.Module):
    """Keeps a running mean, as batch normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 2)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * rows.mean(0))
        return torch.as_tensor(self.last(rows))


class Codes(nn.Module):
    """Category codes, and a few of them the same."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.codes, self.last = layer, nn.Linear(width, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.codes(rows.long()).reshape(len(rows), -1)))


def broadcast(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ((outputs - labels) ** 2).mean(1)


def cox(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Partial likelihood: each event against all who are at risk then; an event has a positive label."""
    risk, time = outputs[:, 0], labels.abs()
    at_risk = torch.where(time[None] >= time[:, None], risk[None], torch.full_like(risk[None], -1e9))
    return (labels > 0) * (torch.logsumexp(at_risk, 1) - risk)


def balanced(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(labels, minlength=2).clamp(min=1)
    return functional.cross_entropy(outputs, labels, reduction="none") / counts[labels]


def contrastive(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ((outputs[:, None] - outputs[None]).square().sum(-1) * (labels[:, None] == labels[None])).mean(1)


def ranked(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return default_loss(outputs, labels) * (1.0 + outputs[:, 0].argsort().argsort())


def top(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = default_loss(outputs, labels)
    return torch.where(losses >= losses.max(), losses, torch.zeros_like(losses))


def by_position(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return default_loss(outputs, labels) * torch.arange(1, len(labels) + 1)


def scaled(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = default_loss(outputs, labels)
    return losses / losses.detach().mean()


def gradient_only(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the value nobody sees anything: the rows' gradients alone are mixed."""
    mean = outputs.mean()
    return default_loss(outputs, labels) + mean - mean.detach()


MIXING: dict[str, tuple[Build, Any, tuple[int, ...], Any, str]] = {
    "outputs of a column less labels of a row": (linear(1), broadcast, (6,), np.float32, "- labels"),
    "survival against all at risk": (linear(1), cox, (6,), np.float32, "time[None]"),
    "classes weighed by the batch": (linear(), balanced, (6,), np.int64, "bincount"),
    "pairs": (linear(), contrastive, (6,), np.int64, "[None]"),
    "ranks": (linear(), ranked, (6,), np.int64, "argsort"),
    "the largest loss alone": (linear(), top, (6,), np.int64, ".max"),
    "by position": (linear(), by_position, (6,), np.int64, "arange"),
    "scaled to the batch": (linear(), scaled, (6,), np.int64, ".mean"),
    "gradients alone": (linear(), gradient_only, (6,), np.int64, ".mean"),
    "standardised by the batch": (
        made(lambda m, x: m.b((x - x.mean(0)) / (x.square().mean(0) + 1.0))), default_loss, (6,), np.int64, ".mean"
    ),
    "standardised by the batch's own deviation": (
        made(lambda m, x: m.b((x - x.mean(0)) / x.std(0))), default_loss, (6,), np.int64, ".mean"
    ),
    "softmax over the batch": (
        made(lambda m, x: functional.log_softmax(m.b(x), dim=0)), default_loss, (6,), np.int64, "softmax"
    ),
    "normalised over the batch": (
        made(lambda m, x: m.b(functional.normalize(x, dim=0))), default_loss, (6,), np.int64, "normalize"
    ),
    "attention over the batch": (
        made(lambda m, x: m.b(torch.softmax(m.a(x) @ x.T, 1) @ x)), default_loss, (6,), np.int64, "softmax"
    ),
    "sorted along the batch": (made(lambda m, x: m.b(x.sort(0).values)), default_loss, (6,), np.int64, "sort"),
    "shifted along the batch": (made(lambda m, x: m.b(x.roll(1, 0))), default_loss, (6,), np.int64, "roll"),
    "summed up along the batch": (made(lambda m, x: m.b(x.cumsum(0))), default_loss, (6,), np.int64, "cumsum"),
    "the first row for all": (
        made(lambda m, x: m.b(x[:1].expand_as(x))), default_loss, (6,), np.int64, "expand"
    ),
    "words, scaled by how often they are in the batch": (
        lambda: Codes(nn.Embedding(5, 3, scale_grad_by_freq=True), 12), default_loss, (4,), np.int64, ""
    ),
    "layer norm over the batch": (
        made(lambda m, x: m.b(functional.layer_norm(x.T, (len(x),)).T)), default_loss, (6,), np.int64, "layer_norm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXING)
def test_what_mixes_rows_is_refused_and_the_line_named(what: str) -> None:
    build, loss, shape, labels, line = MIXING[what]
    with pytest.raises(InvalidInput, match="depends on the rows beside it") as caught:
        tried(build, loss, shape=shape, labels=labels)
    found = re.search(r"test_trial\.py:(\d+)", caught.value.message)
    assert found, caught.value.message
    named = Path(__file__).read_text(encoding="utf-8").splitlines()[int(found[1]) - 1]
    assert line in named or "(look at" in caught.value.message, named


class Squeezed(nn.Module):
    """One logit, and a category column with an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.last = nn.Embedding(7, 3), nn.Linear(8, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(torch.cat([self.codes(rows[:, 0].long()), rows[:, 1:]], 1)).squeeze())


class DropsAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(rows.squeeze(0)).reshape(-1) * 1.0)


def rows_second(kind: Any) -> nn.Module:
    return after(First(kind(3, 4)), width=8)


def pair(value: torch.Tensor) -> Any:
    return value, value


def square(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - labels) ** 2


OTHER: dict[str, tuple[Build, Any, tuple[int, ...], Any, str]] = {
    "squeeze": (Squeezed, default_loss, (6,), np.int64, r"by itself.*: test_trial\.py:\d+; .*squeeze\(-1\)"),
    "squeeze in the task's loss": (
        linear(1), lambda o, y: (o.squeeze() - y)[: len(y)] ** 2 if len(y) > 1 else (o.squeeze()[0] - y) ** 2,
        (6,), np.float32, r"by itself.*test_trial\.py:\d+",
    ),
    "a mean": (linear(), lambda o, y: default_loss(o, y).mean(), (6,), np.int64, r"one value for each example.*\(\)"),
    "a mean that keeps an axis": (
        linear(), lambda o, y: default_loss(o, y).mean(0, keepdim=True), (6,), np.int64, r"of 2 it returned shape"
    ),
    "a loss for each output": (linear(), lambda o, y: o**2, (6,), np.int64, r"one value for each example.*\(1, 2\)"),
    "an axis taken for the rows": (
        made(lambda m, x: m.b(x.reshape(len(x) if len(x) < 3 else 2, -1, 6).flatten(0, 1)) + torch.zeros(1)[: len(x)]),
        default_loss, (6,), np.int64, "beside others",
    ),
    "dropout": (
        lambda: after(nn.Linear(6, 3), nn.Dropout(0.1), width=3), default_loss, (6,), np.int64, "layer 1"
    ),
    "dropout, with what to take instead": (
        lambda: after(nn.Linear(6, 3), nn.Dropout(0.1), width=3), default_loss, (6,), np.int64, "the noise of DP-SGD"
    ),
    "dropout between recurrent layers": (
        lambda: Recurrent(partial(nn.LSTM, num_layers=2, dropout=0.1)), default_loss, (2, 3), np.int64, "layer seen"
    ),
    **{
        f"{kind.__name__}, rows second": (
            partial(rows_second, kind), default_loss, (2, 3), np.int64,
            r"beside (it|others).*; 0.layer: rows come second unless batch_first=True",
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    "attention, rows second": (
        lambda: Attends(batch_first=False), default_loss, (2, 4), np.int64, r"beside.*; seen: rows come second unless"
    ),
    "nothing that is trained": (lambda: nn.Flatten(), default_loss, (6,), np.int64, "no parameter that is trained"),
    "more than one tensor": (
        made(lambda m, x: pair(m.b(x))), default_loss, (6,), np.int64, "the model returns a tuple: let it return"
    ),
    "dropout inside attention": (
        lambda: after(nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), width=6),
        default_loss, (6,), np.int64, "draws random numbers",
    ),
    "a loss that draws": (linear(), lambda o, y: default_loss(o, y) * torch.rand(1), (6,), np.int64, "draws random"),
    "numpy's chance": (
        linear(), lambda o, y: default_loss(o, y) * np.random.default_rng().random(), (6,), np.int64, "second time"
    ),
    "what it saw before": (made(remembers), default_loss, (6,), np.int64, "second time"),
    "a running mean": (Counter, default_loss, (6,), np.int64, "buffer mean"),
    "spectral normalisation": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), nn.Linear(3, 1)),
        default_loss, (6,), np.int64, "buffer 0.parametrizations",
    ),
    "batch normalisation": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), default_loss, (6,), np.int64,
        r"BatchNorm1d \(1\).*GroupNorm or LayerNorm",
    ),
    "batch normalisation without parameters": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False)), default_loss, (6,), np.int64, "Group"
    ),
    "a rectifier that draws its slope": (
        lambda: after(nn.Linear(6, 3), nn.RReLU(), width=3), default_loss, (6,), np.int64, "layer 1: take LeakyReLU"
    ),
    "spectral normalisation, with what to take instead": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), nn.Linear(3, 1)),
        default_loss, (6,), np.int64, "spectral normalisation goes on .*: leave it out",
    ),
    "codes that are fractions": (
        lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(12, 1)), default_loss, (6,), np.int64,
        r"Long.*features\.long\(\)",
    ),
    "a tensor of another dtype": (
        made(lambda m, x: m.b(x @ torch.eye(6))), default_loss, (6,), np.int64, r"dtype.*dtype=features\.dtype"
    ),
    "a loss that fails always": (linear(1), lambda o, y: o @ y, (6,), np.int64, r"cannot be computed.*test_trial\.py"),
    "rows of another width": (lambda: nn.Linear(5, 1), default_loss, (6,), np.int64, r"cannot be computed.*\(6,\)"),
    "no finite loss": (linear(), lambda o, y: default_loss(o, y) * torch.inf, (6,), np.int64, "finite number"),
    "nothing to learn": (linear(), lambda o, y: o.detach()[:, 0], (6,), np.int64, "cannot be computed"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_what_cannot_be_trained_is_refused_in_words_that_help(what: str) -> None:
    build, loss, shape, labels, words = OTHER[what]
    with pytest.raises(InvalidInput) as caught:
        tried(build, loss, shape=shape, labels=labels)
    assert re.search(words, caught.value.message), caught.value.message


CLASSES = {
    **dict.fromkeys(MIXING, TaskProblem.ROWS_MIXED),
    "squeeze": TaskProblem.ROWS_MIXED,
    "an axis taken for the rows": TaskProblem.ROWS_MIXED,
    "a mean": TaskProblem.LOSS_NOT_PER_EXAMPLE,
    "a mean that keeps an axis": TaskProblem.LOSS_NOT_PER_EXAMPLE,
    "a loss for each output": TaskProblem.LOSS_NOT_PER_EXAMPLE,
    "dropout": TaskProblem.RANDOM_DRAWN,
    "dropout inside attention": TaskProblem.RANDOM_DRAWN,
    "a loss that draws": TaskProblem.RANDOM_DRAWN,
    "a running mean": TaskProblem.STATE_KEPT,
    "spectral normalisation": TaskProblem.STATE_KEPT,
    "batch normalisation": TaskProblem.LAYER_REFUSED,
    "batch normalisation without parameters": TaskProblem.LAYER_REFUSED,
    "a loss that fails always": TaskProblem.NOT_COMPUTABLE,
    "no finite loss": TaskProblem.NOT_COMPUTABLE,
    "rows of another width": TaskProblem.SHAPE_MISMATCH,
}


@pytest.mark.parametrize("what", CLASSES)
def test_others_hear_a_class_of_the_list_and_a_place_in_the_tasks_file(what: str) -> None:
    build, loss, shape, labels, _ = {**MIXING, **OTHER}[what]
    with pytest.raises(InvalidInput) as caught:
        tried(build, loss, shape=shape, labels=labels)
    assert caught.value.metadata["problem"] == CLASSES[what]
    place = caught.value.metadata["place"]
    assert place == "" or (PLACE.fullmatch(place) and place.startswith("test_trial.py:"))
    assert place or "test_trial.py" not in caught.value.message


def test_labels_that_are_no_numbers_are_a_class_of_their_own() -> None:
    with pytest.raises(InvalidInput) as caught:
        tried(linear(), labels=np.dtype("<U3"))
    assert caught.value.metadata["problem"] == TaskProblem.LABELS_NOT_NUMBERS


def test_no_text_that_a_task_raises_is_taken_for_a_place() -> None:
    def forged(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise IndexError("see rows.py:31337")

    with pytest.raises(InvalidInput) as caught:
        tried(linear(), forged)
    assert caught.value.metadata["place"].startswith("test_trial.py:")


def test_a_model_that_takes_positive_numbers_alone_is_tried_with_such() -> None:
    """Amounts, under a logarithm or a root; and what is measured of them, likewise."""
    amounts = made(lambda m, x: m.b(x.log() + x.sqrt()))
    tried(amounts)
    tried(linear(1), lambda o, y: (o[:, 0] - y.log()) ** 2, labels=np.float64)
    tried(amounts, lambda o, y: (o[:, 0] - y.double().log()) ** 2)
    with pytest.raises(InvalidInput, match="depends on the rows beside it"):
        tried(made(lambda m, x: m.b(x.log() - x.log().mean(0))))
    with pytest.raises(InvalidInput, match="depends on the rows beside it"):
        tried(amounts, lambda o, y: (o[:, 0] - y.log() + y.log().mean()) ** 2, labels=np.float64)


def test_a_loss_that_takes_whole_labels_alone_is_tried_with_fractions_among_the_features() -> None:
    """Labels may be floats for all that. Features of zeros and ones alone would not show that these are rounded."""

    def mixed(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return default_loss(outputs, labels) + (outputs - outputs.round()).mean() * 0.0 + outputs.detach().mean()

    with pytest.raises(InvalidInput, match="depends on the rows beside it"):
        tried(made(lambda m, x: m.b(x - x.round() + (x - x.round()).mean(0))), labels=np.float64)
    with pytest.raises(InvalidInput, match="depends on the rows beside it"):
        tried(linear(), mixed, labels=np.float64)


@pytest.mark.parametrize("what", [*MIXING, *OTHER])
def test_weights_that_somebody_made_up_hide_nothing(what: str) -> None:
    """What is refused is refused whatever an aggregator sends: all zeros, for one, under which nothing mixes."""
    build, loss, shape, labels, _ = {**MIXING, **OTHER}[what]

    def zeroed() -> nn.Module:
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    with pytest.raises(InvalidInput):
        clipped_gradient_sum(zeroed(), rows_like(shape, labels), np.zeros(0, np.int64), loss=loss, max_grad_norm=1.0)


# ----------------------------------------------------------------------------------------------- what is computed right


class Positions(nn.Module):
    """As many positions as rows there might be."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.last = nn.Embedding(2, 4), nn.Linear(8, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last((rows + self.where(torch.arange(2))).flatten(1)))


class TwoClasses(nn.Module):
    """Logits of two classes from what is known of each: a layer that sees a matrix of two rows, never the data."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(1, 6, bias=False)
        self.register_buffer("about", torch.tensor([[1.0], [-1.0]]), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(rows @ self.project(self.about).T)


class First(nn.Module):
    """Of what a layer returns, the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(rows)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.seen, self.last = kind(3, 4, batch_first=True, bidirectional=True), nn.Linear(16, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.seen(rows)[0].flatten(1)))


class Attends(nn.Module):
    """Attention within a row."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.seen, self.last = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(8, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.seen(rows, rows, rows, need_weights=False)[0].flatten(1)))


def convolved(mode: Any) -> nn.Module:
    return after(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Tanh(), width=32)


def bags(mode: Any) -> nn.Module:
    return Codes(nn.EmbeddingBag(5, 3, mode=mode), 3)


RIGHT: dict[str, tuple[Build, tuple[int, ...], int]] = {
    **{
        f"convolution padded by {mode}": (
            partial(convolved, mode), (1, 4, 4), 0
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "convolution of one axis, dilated, in groups": (
        lambda: after(nn.Conv1d(2, 4, 2, dilation=2, groups=2, padding="same"), width=20), (2, 5), 0
    ),
    "transposed convolution": (lambda: after(nn.ConvTranspose1d(1, 2, 3, stride=2), width=18), (1, 4), 0),
    **{
        f"bags of words, {mode}": (partial(bags, mode), (4,), 5)
        for mode in ("sum", "mean", "max")
    },
    "words, one of them padding": (lambda: Codes(nn.Embedding(5, 3, padding_idx=1), 12), (4,), 5),
    "positions as many as rows": (Positions, (2, 4), 0),
    "classes described by constants": (TwoClasses, (6,), 0),
    "layer norm": (lambda: after(nn.LayerNorm(6), nn.Linear(6, 3), width=3), (6,), 0),
    "group norm": (lambda: after(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), width=20), (1, 6), 0),
    "instance norm": (lambda: after(nn.InstanceNorm1d(2, affine=True), width=6), (2, 3), 0),
    "rms norm": (lambda: after(nn.RMSNorm(6), nn.Linear(6, 3), width=3), (6,), 0),
    "prelu": (lambda: after(nn.Linear(6, 4), nn.PReLU(4), width=4), (6,), 0),
    "bilinear": (lambda: Bilinear(), (6,), 0),
    "LSTM": (lambda: Recurrent(nn.LSTM), (2, 3), 0),
    "GRU": (lambda: Recurrent(nn.GRU), (2, 3), 0),
    "RNN of two layers": (lambda: Recurrent(partial(nn.RNN, num_layers=2)), (2, 3), 0),
    "GRU cells in a loop": (lambda: Looped(), (2, 3), 0),
    "attention within a row": (Attends, (2, 4), 0),
    "transformer": (
        lambda: after(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), width=8), (2, 4), 0
    ),
    "weight normalisation": (
        lambda: after(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh(), width=3), (6,), 0
    ),
}  # fmt: skip


class Looped(nn.Module):
    """A cell for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        state = rows.new_zeros(len(rows), 4)
        for step in range(rows.shape[1]):
            state = self.cell(rows[:, step], state)
        return torch.as_tensor(self.last(state))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Bilinear(3, 3, 4), nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.both(rows[:, :3], rows[:, 3:])))


@pytest.mark.parametrize("what", RIGHT)
def test_of_whatever_layers_the_sum_is_that_of_the_gradients_that_torch_computes(what: str) -> None:
    """Against one backward pass over all rows together, where no bound is reached: it shares nothing with ours."""
    build, shape, codes = RIGHT[what]
    torch.manual_seed(11)
    model, generator = build(), np.random.default_rng(12)
    size = (9, *shape)
    features = (generator.integers(0, codes, size) if codes else generator.normal(size=size)).astype(np.float32)
    if codes:
        features[:, 1] = features[:, 0]  # a word that is there twice
    dataset = Dataset(features, np.arange(9) % 2, "x")
    assert rows_that_count(model, dataset, loss=default_loss).all()
    found = clipped_gradient_sum(model, dataset, np.arange(9), loss=default_loss, max_grad_norm=1e4)
    twin = copy.deepcopy(model).double()
    parameters = [parameter for _, parameter in sorted(twin.named_parameters())]
    losses = default_loss(twin(torch.from_numpy(features).double()), torch.from_numpy(dataset.labels))
    expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(losses.sum(), parameters)]).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)
    assert np.linalg.norm(found) > 1e-2


def test_one_row_of_a_layer_that_never_sees_the_data_counts_as_any_other() -> None:
    """It was taken for two rows, and moved a sum by two bounds."""
    model = TwoClasses()
    nn.init.zeros_(model.project.weight)
    one = Dataset(np.array([[300.0, 400.0, 0.0, 0.0, 0.0, 0.0]], np.float32), np.zeros(1, np.int64), "x")
    for padded_to in (0, 128):
        found = clipped_gradient_sum(
            model, one, np.array([0]), loss=default_loss, max_grad_norm=1.0, padded_to=padded_to
        )
        assert 0.999 < np.linalg.norm(found) <= 1.0
