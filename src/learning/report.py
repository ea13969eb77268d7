"""`report.png`: how accuracy and the privacy budget moved from round to round, beside what a central site reaches."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import InvalidInput
from ..files import write_over
from ..privacy.accounting import MEANINGLESS_EPSILON

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TICKS: Final = 8
_TICK_STEPS: Final = tuple(size * 10**power for power in range(7) for size in (1, 2, 5))
_INK, _MUTED, _GRID, _PAPER = "#1d2733", "#5f6b7a", "#e3e7ec", "#ffffff"
_FEDERATION, _CENTRAL, _CENTRAL_DP, _BUDGET = "#0b6e99", "#8a5a00", "#4d7c3a", "#b3362c"
_LABELS: Final = {"central": "central, no privacy", "central_dp": "central DP-SGD, same ε"}
_COLOURS: Final = {"central": _CENTRAL, "central_dp": _CENTRAL_DP}
_STYLES: Final = {"central": (0, (5, 3)), "central_dp": (0, (1, 1.6))}


def write_report(
    path: Path,
    rounds: Sequence[Mapping[str, float]],
    *,
    comparison: Mapping[str, float],
    budget: Mapping[str, float],
    party_level: Mapping[str, float],
    title: str = "A federation under lock and key",
    subtitle: str = "",
) -> None:
    """Write the picture as PNG (1500 × 900 pixels); an existing file is replaced at once, never half-written.

    Args:
        path: where to.
        rounds: one mapping a round, in order: `round` (from 1), `auc` (hold-out, in [0, 1]; may be absent where a
            round was not evaluated) and `epsilon` (example level, spent so far by the party that spent most).
        comparison: AUC of baselines, `central` and `central_dp`; either may be absent.
        budget: `epsilon` and `delta` of the example level, that no party may exceed.
        party_level: `epsilon` (may be infinite) and `delta` of the release, and `parties`.
        title, subtitle: public text.

    Raises:
        InvalidInput: no rounds, or a key is missing.
    """
    _require(rounds, budget, party_level)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=150, facecolor=_PAPER)
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display, safe in a worker
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.subplots_adjust(left=0.075, right=0.965, top=0.76, bottom=0.245, wspace=0.2)
    figure.text(0.075, 0.93, title, fontsize=17, fontweight="bold", color=_INK)
    figure.text(0.075, 0.878, subtitle, fontsize=10.5, color=_MUTED)
    _accuracy(left, rounds, comparison)
    _budget(right, rounds, budget)
    figure.text(0.075, 0.035, _guarantees(rounds, budget, party_level), fontsize=9.5, color=_INK, linespacing=1.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=_PAPER)
    write_over(path, buffer.getvalue(), secret=False)


def party_level_text(party_level: Mapping[str, float]) -> str:
    """One honest sentence on the party-level guarantee of the release."""
    epsilon = party_level["epsilon"]
    shown = "∞" if math.isinf(epsilon) else f"{epsilon:,.2f}" if epsilon < 10 else f"{epsilon:,.0f}"
    text = f"Party level (one party's whole update, replaced by zero): ε = {shown} at δ = {party_level['delta']:g}"
    if epsilon > MEANINGLESS_EPSILON:
        return f"{text},\nno meaningful party-level guarantee with so few parties ({party_level['parties']:.0f})"
    return text


def _guarantees(
    rounds: Sequence[Mapping[str, float]], budget: Mapping[str, float], party_level: Mapping[str, float]
) -> str:
    spent = f"ε = {rounds[-1]['epsilon']:.2f} of {budget['epsilon']:g} spent at δ = {budget['delta']:g}"
    return (
        f"Example level (one row added or removed, each party's own ledger): {spent}.\n{party_level_text(party_level)}."
    )


def _require(
    rounds: Sequence[Mapping[str, float]], budget: Mapping[str, float], party_level: Mapping[str, float]
) -> None:
    if not rounds:
        raise InvalidInput("a report needs at least one round")
    for what, mapping, keys in (
        *(("a round", row, ("round", "epsilon")) for row in rounds),
        ("the budget", budget, ("epsilon", "delta")),
        ("the party level", party_level, ("epsilon", "delta", "parties")),
    ):
        missing = [key for key in keys if key not in mapping]
        if missing:
            raise InvalidInput(f"{what} lacks {', '.join(missing)}")


def _accuracy(axes: Axes, rounds: Sequence[Mapping[str, float]], comparison: Mapping[str, float]) -> None:
    evaluated = [row for row in rounds if "auc" in row]
    numbers, scores = [row["round"] for row in evaluated], [row["auc"] for row in evaluated]
    _frame(axes, "AUC on held-out people", rounds)
    shown = [*scores, *(comparison[key] for key in _LABELS if key in comparison)]
    for key, label in _LABELS.items():
        if key in comparison:
            text = f"{label}: {comparison[key]:.3f}"
            axes.axhline(comparison[key], color=_COLOURS[key], linestyle=_STYLES[key], linewidth=1.6, label=text)
    if evaluated:
        text = f"federation: {scores[-1]:.3f}"
        axes.plot(numbers, scores, color=_FEDERATION, linewidth=2.4, marker="o", markersize=4.5, label=text, zorder=3)
        low, high = min(shown), max(shown)
        margin = max(0.01, 0.12 * (high - low))
        axes.set_ylim(low - margin, high + margin)
        handles, labels = axes.get_legend_handles_labels()  # the federation was drawn last and is listed first
        axes.legend(
            handles[-1:] + handles[:-1],
            labels[-1:] + labels[:-1],
            loc="lower right",
            frameon=False,
            fontsize=10,
            labelcolor=_INK,
            handlelength=2.4,
        )
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color=_MUTED, fontsize=12)


def _budget(axes: Axes, rounds: Sequence[Mapping[str, float]], budget: Mapping[str, float]) -> None:
    numbers, spent = [row["round"] for row in rounds], [row["epsilon"] for row in rounds]
    _frame(axes, "ε spent, example level", rounds)
    limit = budget["epsilon"]
    axes.fill_between(numbers, spent, step=None, color=_FEDERATION, alpha=0.12, linewidth=0)
    axes.plot(numbers, spent, color=_FEDERATION, linewidth=2.4, marker="o", markersize=4.5, zorder=3)
    axes.axhline(limit, color=_BUDGET, linewidth=1.6)
    axes.annotate(
        f"budget: ε = {limit:g}",
        (0.0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(6, 5),
        textcoords="offset points",
        color=_BUDGET,
        fontsize=10,
    )
    axes.set_ylim(0, 1.14 * max(limit, *spent))


def _frame(axes: Axes, heading: str, rounds: Sequence[Mapping[str, float]]) -> None:
    axes.set_title(heading, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel("round", color=_MUTED, fontsize=10)
    first, last = round(rounds[0]["round"]), round(rounds[-1]["round"])
    step = next(size for size in _TICK_STEPS if size * _MOST_TICKS >= last - first)
    axes.set_xticks([first, *range(first - first % step + step, last + 1, step)])
    pad = max(0.4, 0.03 * (last - first))
    axes.set_xlim(first - pad, last + pad)
    axes.tick_params(colors=_MUTED, labelsize=9.5, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
