"""Draws the figures of the documentation: docs/figures/utility.{json,svg,png}.

What does privacy cost in accuracy, and what does having no trusted server cost on top? The same model on the same rows,
for each ε: central DP-SGD (a server that everybody trusts with their rows), fedsgd (one step a round, no trusted
server, noise in shares), fedavg (each party protects its rows itself). All spend the same example-level (ε, δ), each by
its own accounting, over the same number of steps at the same sampling rate. Seeds are paired: a seed fixes hold-out,
split and initial model for all three.

fedsgd runs without encryption here: the integers are those that Paillier opens, which a test holds. Samples and noise
come from seeded streams, so that whoever draws the figure again gets the same numbers (up to the last bits that another
processor may round another way). Nobody is protected by this: the data are public.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from scipy import stats  # type: ignore[import-untyped]  # ships no types

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EPSILONS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
DELTA: Final = 1e-5
SEEDS: Final = 10
AIM: Final = 0.005
"""What the median of the paired differences between central DP-SGD and fedsgd is to stay within, in AUC."""
LEVEL: Final = 0.95
STRATEGIES: Final = ("central", "fedsgd", "fedavg")
LABELS: Final = {
    "central": "central DP-SGD (trusted server)",
    "fedsgd": "fedsgd (no trusted server)",
    "fedavg": "fedavg (local DP-SGD)",
}
CENTRAL_RATES: Final = {0.1: 0.25, 0.2: 0.25, 0.5: 0.5, 1.0: 1.0, 2.0: 4.0, 4.0: 4.0, 8.0: 2.0}
"""Learning rate of central DP-SGD and of fedsgd, which is the same algorithm: the best of 0.25, 0.5, 1, 2 and 4 for
central DP-SGD by its median AUC on seeds 1000 to 1003, none of which is in the figure. The rows are public."""
FEDAVG_RATES: Final = {0.1: 0.2, 0.2: 0.1, 0.5: 0.5, 1.0: 1.0, 2.0: 1.0, 4.0: 0.5, 8.0: 1.5}
"""Of a party's own steps under fedavg: the best of 0.05, 0.1, 0.2, 0.5, 1 and 1.5, on seeds 1000 to 1002."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of each strategy."""

    epsilon: float
    seed: int
    steps: int
    local_steps: int


def run(setting: Setting) -> dict[str, float]:
    """AUC on hold-out rows by strategy."""
    import torch

    from src.learning.task import find_task

    torch.set_num_threads(1)
    task = find_task("randhie")
    return {name: _RUNS[name](task, setting) for name in STRATEGIES}


def _data(task: Any, seed: int) -> tuple[dict[str, Any], Any]:
    options = {"parties": 3, "seed": seed}
    parties = {name: task.load_data({**options, "party": index}) for index, name in enumerate("abc")}
    return parties, task.load_holdout(options)


def _entropy(name: str, setting: Setting) -> Any:
    from src.privacy.entropy import DeterministicEntropy

    return DeterministicEntropy(b"figure", purpose=f"{name}/{setting.epsilon}", round_number=setting.seed)


def _central(task: Any, setting: Setting) -> float:
    from src.learning.baselines import pool
    from src.learning.dpsgd import train_dpsgd
    from src.learning.evaluation import evaluate
    from src.learning.task import loss_of
    from src.learning.tasks.randhie import DEMO
    from src.learning.together import sums_together

    parties, holdout = _data(task, setting.seed)
    config = replace(
        DEMO.local_training(noise_multiplier=_dp_sgd_noise(setting)),
        steps=setting.steps,
        learning_rate=CENTRAL_RATES[setting.epsilon],
        declared_rows=3 * DEMO.declared_rows,
    )
    model = task.build_model(setting.seed)
    entropy = _entropy("central", setting)
    rows = pool(list(parties.values()))
    train_dpsgd(model, rows, loss=loss_of(task), config=config, entropy=entropy, sums_of=sums_together)
    return evaluate(task, model, holdout)["auc"]


def _fedsgd(task: Any, setting: Setting) -> float:
    from src.learning.simulate import SumSettings, simulate_fedsgd
    from src.learning.tasks.randhie import DEMO
    from src.learning.together import sums_together
    from src.privacy.accounting import calibrate_sampled_sum
    from src.protocol.derive import failure_probability

    noise_multiplier = calibrate_sampled_sum(
        epsilon=setting.epsilon,
        delta=DELTA,
        sampling_rate=DEMO.sampling_rate,
        rounds=setting.steps,
        dimension=177,
        tau_of=None,  # the shares' standard deviation is tens of thousands of units: exp(-2π²σ²) is no float
        failure_probability=failure_probability(setting.steps),
    )
    parties, holdout = _data(task, setting.seed)
    settings = SumSettings(
        rounds=setting.steps,
        sampling_rate=DEMO.sampling_rate,
        max_grad_norm=DEMO.max_grad_norm,
        noise_multiplier=noise_multiplier,
        learning_rate=CENTRAL_RATES[setting.epsilon],
        declared_rows=dict.fromkeys(parties, DEMO.declared_rows),
    )
    history = simulate_fedsgd(
        task,
        parties,
        holdout=holdout,
        settings=settings,
        seed=setting.seed,
        entropy=_entropy("fedsgd", setting),
        sums_of=sums_together,
    )
    return history[-1]["auc"]


def _fedavg(task: Any, setting: Setting) -> float:
    from src.learning.simulate import FederationSettings, simulate
    from src.learning.tasks.randhie import DEMO

    parties, holdout = _data(task, setting.seed)
    local = replace(
        DEMO.local_training(noise_multiplier=_dp_sgd_noise(setting)),
        steps=setting.local_steps,
        learning_rate=FEDAVG_RATES[setting.epsilon],
    )
    settings = FederationSettings(
        rounds=setting.steps // setting.local_steps,
        local=local,
        clipping_norm=DEMO.clipping_norm,
        party_noise_multiplier=DEMO.party_noise_multiplier,
    )
    history = simulate(
        task,
        list(parties.values()),
        holdout=holdout,
        settings=settings,
        seed=setting.seed,
        entropy=_entropy("fedavg", setting),
    )
    return history[-1]["auc"]


_RUNS: Final = {"central": _central, "fedsgd": _fedsgd, "fedavg": _fedavg}


def _dp_sgd_noise(setting: Setting) -> float:
    from src.learning.tasks.randhie import DEMO
    from src.privacy.accounting import calibrate_dp_sgd

    return calibrate_dp_sgd(epsilon=setting.epsilon, delta=DELTA, sampling_rate=DEMO.sampling_rate, steps=setting.steps)


def paired(first: list[float], second: list[float]) -> dict[str, float]:
    """Differences first - second: median, mean, and the interval of the mean (Student's t over the seeds)."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    half = 0.0
    if len(differences) > 1:
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1))
        half = quantile * statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "median": _rounded(statistics.median(differences)),
        "mean": _rounded(mean),
        "low": _rounded(mean - half),
        "high": _rounded(mean + half),
    }


def collect(found: dict[tuple[float, int], dict[str, float]], *, steps: int, local_steps: int) -> dict[str, Any]:
    """The content of utility.json."""
    epsilons = sorted({epsilon for epsilon, _ in found})
    seeds = sorted({seed for _, seed in found})
    rows = []
    for epsilon in epsilons:
        auc = {name: [_rounded(found[epsilon, seed][name]) for seed in seeds] for name in STRATEGIES}
        rows.append(
            {
                "epsilon": epsilon,
                "auc": auc,
                "median": {name: _rounded(statistics.median(values)) for name, values in auc.items()},
                "central_minus_fedsgd": paired(auc["central"], auc["fedsgd"]),
                "central_minus_fedavg": paired(auc["central"], auc["fedavg"]),
                "learning_rate": {"central": CENTRAL_RATES[epsilon], "fedavg": FEDAVG_RATES[epsilon]},
            }
        )
    return {
        "task": "randhie",
        "metric": "AUC on hold-out rows",
        "delta": DELTA,
        "parties": 3,
        "seeds": seeds,
        "steps": steps,
        "fedavg_local_steps": local_steps,
        "interval": LEVEL,
        "rows": rows,
    }


def draw(content: dict[str, Any], directory: Path) -> None:
    """utility.svg and utility.png: medians and all seeds above, paired differences below."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sotto"  # else every drawing has other ids
    from matplotlib import pyplot

    colours = {"central": "#444444", "fedsgd": "#1f6feb", "fedavg": "#d9822b"}
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    epsilons = [row["epsilon"] for row in content["rows"]]
    for shift, name in zip((0.96, 1.0, 1.04), STRATEGIES, strict=True):
        for row in content["rows"]:
            values = row["auc"][name]
            above.scatter([row["epsilon"] * shift] * len(values), values, s=8, alpha=0.3, color=colours[name])
        medians = [row["median"][name] for row in content["rows"]]
        above.plot([each * shift for each in epsilons], medians, marker="o", color=colours[name], label=LABELS[name])
    above.set_ylabel("AUC on hold-out rows")
    above.legend(loc="lower right", frameon=False)
    above.set_title(f"The same (ε, δ = {DELTA:g}) for each row, {len(content['seeds'])} paired seeds")
    for shift, name in ((0.98, "fedsgd"), (1.02, "fedavg")):
        pairs = [row[f"central_minus_{name}"] for row in content["rows"]]
        below.errorbar(
            [each * shift for each in epsilons],
            [pair["mean"] for pair in pairs],
            yerr=[
                [pair["mean"] - pair["low"] for pair in pairs],
                [pair["high"] - pair["mean"] for pair in pairs],
            ],
            fmt="o",
            capsize=3,
            color=colours[name],
            label=f"central - {name}",
        )
    below.axhline(0, color="black", linewidth=0.8)
    below.axhspan(-AIM, AIM, color="black", alpha=0.06, label=f"±{AIM:g}")
    below.set_ylabel(f"difference in AUC\n(mean, {LEVEL:.0%} interval)")
    below.set_xlabel("ε of each row")
    below.legend(loc="upper right", frameon=False)
    below.set_xscale("log")
    below.set_xticks(epsilons, [f"{each:g}" for each in epsilons])
    below.minorticks_off()
    figure.savefig(directory / "utility.svg", metadata={"Date": None})
    figure.savefig(directory / "utility.png", dpi=150, metadata={"Software": None})


def main() -> int:
    """Run, write, draw, and say whether the aim was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="where the figure goes")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0")
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS, choices=EPSILONS, metavar="E")
    parser.add_argument("--steps", type=int, default=300, help="of each strategy")
    parser.add_argument("--local-steps", type=int, default=20, help="of a party in a round of fedavg")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--redraw", action="store_true", help="from the utility.json that is there")
    chosen = parser.parse_args()
    if chosen.steps % chosen.local_steps:
        parser.error("--local-steps has to divide --steps")
    chosen.out.mkdir(parents=True, exist_ok=True)
    target = chosen.out / "utility.json"
    if not chosen.redraw:
        content = collect(_run_all(chosen), steps=chosen.steps, local_steps=chosen.local_steps)
        target.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(target.read_text())
    draw(content, chosen.out)
    for row in content["rows"]:
        pair = row["central_minus_fedsgd"]
        medians = ", ".join(f"{name} {row['median'][name]:.4f}" for name in STRATEGIES)
        print(
            f"epsilon {row['epsilon']:g}: {medians}; central - fedsgd: median {pair['median']:+.4f}, "
            f"mean {pair['mean']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}]"
        )
    worst = max(abs(row["central_minus_fedsgd"]["median"]) for row in content["rows"])
    print(f"{'yes' if worst <= AIM else 'NO '}  every median difference to central DP-SGD is within {AIM:g} AUC")
    return 0 if worst <= AIM else 1


def _run_all(chosen: argparse.Namespace) -> dict[tuple[float, int], dict[str, float]]:
    settings = [
        Setting(epsilon, seed, chosen.steps, chosen.local_steps)
        for epsilon in chosen.epsilons
        for seed in range(chosen.seeds)
    ]
    found = {}
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for setting, result in zip(settings, pool.imap(run, settings), strict=True):
            found[setting.epsilon, setting.seed] = result
            print(f"epsilon {setting.epsilon:g}, seed {setting.seed}: {result}", file=sys.stderr, flush=True)
    return found


def _rounded(value: float) -> float:
    """Differences beyond are those of a processor's last bits."""
    return round(value, 6)


if __name__ == "__main__":
    sys.exit(main())
