"""Weights that somebody made up, sought: does one row move a sum of clipped gradients by more than the bound?

An aggregator chooses the weights of every round, and a scientist those of the first. So the bound has to hold for all
weights, and ordinary ones do not try it. Candidates here make a unit's terms cancel, so that what is left of their sum
is a rounding error, which a later layer turns into the sign of a gradient; or they are of any size that float32 has.
Each is tried on rows next to which others stand, with one more at the front, and one more at the end. A mechanism in
which a row's gradient depends on its company is found within some dozen candidates; that none is found proves nothing.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..privacy import accounting
from ..privacy.audit import (
    VERDICT_P,
    correct_guesses,
    default_guesses,
    epsilon_lower_bound,
    p_value,
    verdict_delta,
)
from ..privacy.entropy import Entropy
from ..privacy.events import DpSgdSteps
from .dpsgd import noised_sum
from .gradients import clipped_gradient_sum
from .settings import LocalTraining
from .task import Dataset, Loss

CANDIDATES: Final = 200
"""Weights that `sotto audit` tries: a mechanism that depends on company was found within 30, every time."""

COMPANIES: Final = (1, 2, 3, 4, 7, 8, 31)
"""Rows beside each other before one more is added: numbers at which kernels take other ways."""

SCALE: Final = 2.0**60
"""Of weights that cancel: the rounding error of their sum is then in the tens, where tanh and sigmoid are ±1."""

_RELEASES: Final = 50_000
_LEAST_RELEASES: Final = 1_000
_DRAWS: Final = 1 << 25
"""Normals that telling apart may draw, some seconds; for a large model fewer releases."""
_EVERY: Final = 4
"""Every fourth candidate has weights of any size; in the others some cancel."""
_LEADING: Final = 4
"""Weights of a unit that are drawn; the others take away what those have left of the sum, one after another."""
_SMALL: Final = 1e-3
"""Of the weights beside those that cancel."""
_EXPONENT: Final = 120.0
_LARGEST: Final = 3e38
"""Binary exponents, and the size, that float32 has."""
_ROUNDED: Final = 1e-6
"""By how much a sum may be off for being one of floats."""


class Sums(Protocol):
    """What is tried: `gradients.clipped_gradient_sum`, or in tests something that is broken."""

    def __call__(
        self,
        model: torch.nn.Module,
        dataset: Dataset,
        chosen: NDArray[np.int64],
        *,
        loss: Loss,
        max_grad_norm: float,
    ) -> NDArray[np.float64]:
        """The sum of clipped gradients, shape (d,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found: the pair of neighbours that lie farthest apart.

    Attributes:
        candidates: weights that were tried.
        moved: by how much one row more moved a sum, in clipping norms; 1 is allowed.
        rows: in the smaller data set of the pair.
        model: with these weights.
        without, with_it: the two sums, shape (d,), float64.
    """

    candidates: int
    moved: float
    rows: int
    model: torch.nn.Module
    without: NDArray[np.float64]
    with_it: NDArray[np.float64]

    @property
    def broken(self) -> bool:
        """Whether one row moves a sum by more than the bound."""
        return self.moved > 1.0 + _ROUNDED


def attack(
    model: torch.nn.Module, row: Dataset, *, loss: Loss, training: LocalTraining, delta: float, entropy: Entropy
) -> tuple[Found, Apart]:
    """Search `CANDIDATES` weights, and tell the worst pair apart under the noise of a step of `training`."""
    norm = training.max_grad_norm
    found = search(model, row, loss=loss, max_grad_norm=norm, candidates=CANDIDATES, entropy=entropy)
    noise = training.noise_multiplier
    return found, tell_apart(found, noise_multiplier=noise, max_grad_norm=norm, delta=delta, entropy=entropy)


def search(
    model: torch.nn.Module,
    row: Dataset,
    *,
    loss: Loss,
    max_grad_norm: float,
    candidates: int,
    entropy: Entropy,
    sums: Sums = clipped_gradient_sum,
) -> Found:
    """Look for weights of `model`, which stays as it is, with which one row moves a sum farthest.

    Args:
        row: what a row looks like; the label is that of its first one, if there is one. Public.
        candidates: how many weights to try, ≥ 1.
        entropy: decides them.
    """
    worst: Found | None = None
    for number in range(candidates):
        features = _normals(3 * math.prod(row.features.shape[1:]), entropy).astype(np.float32)
        rows = features.reshape(3, *row.features.shape[1:])  # one that cancels, a neutral one, and one more
        made = _made_up(model, rows[0], entropy, cancelling=number % _EVERY != 0)
        for without, with_it in _neighbours(rows, row):
            sides = [
                sums(made, each, np.arange(len(each)), loss=loss, max_grad_norm=max_grad_norm)
                for each in (without, with_it)
            ]
            moved = float(np.linalg.norm(sides[1] - sides[0])) / max_grad_norm
            if worst is None or moved > worst.moved:
                worst = Found(
                    candidates=0, moved=moved, rows=len(without), model=made, without=sides[0], with_it=sides[1]
                )
    assert worst is not None  # there is a candidate
    return Found(**{**{name: getattr(worst, name) for name in Found.__slots__}, "candidates": candidates})


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """How well one step tells a pair of neighbours apart.

    Attributes:
        releases: noised sums that were looked at, each of one of the two, by chance.
        guesses, correct: fixed beforehand, and how many of them were right.
        epsilon: the accountant's ε of one step without sampling, at the δ that was asked for.
        lower_bound: ε of such a step is at least this there, 95 % sure.
        p_value: of `correct`, if the accountant were right at every δ.
    """

    releases: int
    guesses: int
    correct: int
    epsilon: float
    lower_bound: float
    p_value: float

    @property
    def flagged(self) -> bool:
        """Whether the guesses refute the accountant at `privacy.audit.VERDICT_P`."""
        return self.p_value <= VERDICT_P


def tell_apart(found: Found, *, noise_multiplier: float, max_grad_norm: float, delta: float, entropy: Entropy) -> Apart:
    """Noise the two sums again and again, as a step of DP-SGD does, and guess from each which one it was.

    Args:
        noise_multiplier: of a step, above 0.
        max_grad_norm: with which the pair was found.
        delta: at which ε is claimed.
        entropy: decides which sum is noised, and draws the noise.
    """
    size = len(found.without)
    releases = max(_LEAST_RELEASES, min(_RELEASES, _DRAWS // size))
    sides = np.stack([found.without, found.with_it])
    apart = sides[1] - sides[0]
    length = float(np.linalg.norm(apart))
    direction = apart / length if length > 0.0 else np.eye(1, size)[0]
    second = _uniforms(releases, entropy) < 0.5
    scores = np.empty(releases)
    some = max(1, _DRAWS // 16 // size)
    for start in range(0, releases, some):
        of = sides[second[start : start + some].astype(int)]
        noised = noised_sum(torch.from_numpy(of.reshape(-1)), noise_multiplier * max_grad_norm, entropy=entropy)
        scores[start : start + some] = noised.numpy().reshape(of.shape) @ direction
    small = verdict_delta(releases, delta)
    claim, claim_at_small = (_claimed(noise_multiplier, each) for each in (delta, small))
    guesses = default_guesses(releases, epsilon=claim_at_small)
    guessed = {"canaries": releases, "guesses": guesses}
    correct = correct_guesses(scores, second, guesses=guesses)
    return Apart(
        releases=releases,
        guesses=guesses,
        correct=correct,
        epsilon=claim,
        lower_bound=epsilon_lower_bound(**guessed, correct=correct, delta=delta, p=0.05),
        p_value=p_value(**guessed, correct=correct, epsilon=claim_at_small, delta=small)
        if math.isfinite(claim_at_small)
        else 1.0,
    )


def _claimed(noise_multiplier: float, delta: float) -> float:
    return accounting.epsilon([DpSgdSteps(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=1)], delta=delta)


def _neighbours(rows: NDArray[np.float32], like: Dataset) -> Iterator[tuple[Dataset, Dataset]]:
    """Data sets that differ by one row: copies of one row, or every second one, with another row behind or in front."""
    row, neutral, more = rows
    label = like.labels[:1] if len(like) else np.ones(1, like.labels.dtype)
    for count in COMPANIES:
        same = np.stack([row] * count)
        every_second = np.stack([row if number % 2 == 0 else 3 * neutral for number in range(count)])
        for before, after in (
            (same, np.concatenate([same, more[None]])),
            (every_second, np.concatenate([3 * neutral[None], every_second])),
        ):
            yield tuple(Dataset(each, np.resize(label, len(each)), "made up") for each in (before, after))  # type: ignore[misc]


def _made_up(
    model: torch.nn.Module, row: NDArray[np.float32], entropy: Entropy, *, cancelling: bool
) -> torch.nn.Module:
    """A copy of `model` with weights of every size, or small ones and one linear layer whose terms cancel on `row`."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                size = _SMALL if cancelling else 2.0 ** (_EXPONENT * (2.0 * float(_uniforms(1, entropy)[0]) - 1.0))
                values = _normals(parameter.numel(), entropy) * size
                parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
        layers = [layer for layer in made.modules() if isinstance(layer, torch.nn.Linear)] if cancelling else []
        if layers:
            chosen = layers[int(entropy.words(1)[0]) % len(layers)]
            _cancel(chosen, _input_of(chosen, made, row), entropy)
            if layers[-1] is not chosen:
                _saturate(layers[-1])
    return made


def _input_of(layer: torch.nn.Linear, model: torch.nn.Module, row: NDArray[np.float32]) -> NDArray[np.float64]:
    """What a layer sees of a row in float64, shape (in,); of several vectors the first; zeros if it sees nothing."""
    twin = copy.deepcopy(model).double()
    names = {id(each): name for name, each in model.named_modules()}
    seen: list[torch.Tensor] = []
    twin.get_submodule(names[id(layer)]).register_forward_hook(lambda _, given, output: seen.append(given[0]))
    with contextlib.suppress(Exception):  # a model that does not take such a row
        twin(torch.from_numpy(row[None].astype(np.float64)))
    found = seen[0].reshape(-1, layer.in_features)[0].numpy() if seen else np.zeros(layer.in_features)
    return cast("NDArray[np.float64]", found)


def _cancel(layer: torch.nn.Linear, values: NDArray[np.float64], entropy: Entropy) -> None:
    """Every unit gets weights of which the exact sum over these inputs is next to nothing, its terms huge."""
    order = np.argsort(_uniforms(values.size, entropy))
    lead = _normals(_LEADING, entropy) * SCALE
    weights, total = np.zeros(values.size, np.float32), Fraction(0)
    for place, index in enumerate(order):
        x = Fraction(float(values[index]))
        weight = lead[place] if place < _LEADING else float(-total / x) if x else 0.0
        weights[index] = np.float32(np.clip(weight, -_LARGEST, _LARGEST))
        total += Fraction(float(weights[index])) * x
    layer.weight.copy_(torch.from_numpy(np.tile(weights, (layer.out_features, 1))))
    if layer.bias is not None:
        layer.bias.fill_(float(np.clip(float(-total), -_LARGEST, _LARGEST)))


def _saturate(layer: torch.nn.Linear) -> None:
    """The last layer weighs all units alike, and is sure of the wrong answer: every gradient is as long as it gets."""
    layer.weight.copy_(_SMALL * torch.arange(1.0, len(layer.weight) + 1.0)[:, None].expand_as(layer.weight))
    if layer.bias is not None:
        layer.bias.fill_(-1e6)


def _uniforms(count: int, entropy: Entropy) -> NDArray[np.float64]:
    """In (0, 1), shape (count,)."""
    values: NDArray[np.float64] = ((entropy.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return values


def _normals(count: int, entropy: Entropy) -> NDArray[np.float64]:
    uniforms: NDArray[Any] = _uniforms(2 * count, entropy)
    values: NDArray[np.float64] = np.sqrt(-2.0 * np.log(uniforms[:count])) * np.cos(2.0 * np.pi * uniforms[count:])
    return values
