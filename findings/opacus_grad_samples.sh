#!/usr/bin/env bash
# Opacus 1.6.0: of three layers that its validator takes, per-sample gradients do not add up to the batch's gradient.
#
# Valid input: ordinary float64 batches of eight rows, a summed loss, a model that `ModuleValidator` finds nothing against.
# The sum of `grad_sample` over the rows should be what autograd computes for the batch, to rounding; for a plain Conv2d it
# is. It is not for Conv2d with padding_mode "reflect", "replicate" or "circular" (the rule pads with zeros whatever the
# mode), for EmbeddingBag where a word is twice in a bag (it counts once), and for Embedding with a padding_idx (whose row
# should have no gradient). No warning, no error: such a model trains, towards something else.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "opacus==1.6.0" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PYTHON'
import copy
import warnings
from importlib.metadata import version

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

warnings.filterwarnings("ignore")
torch.manual_seed(0)


class Bags(nn.Module):
    """Bags of four words, in the form of words and offsets, which is the one that Opacus has a rule for."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode="sum")

    def forward(self, rows):
        return self.bag(rows.reshape(-1), torch.arange(0, rows.numel(), rows.shape[1]))


def off(model, rows):
    """How far the sum of per-sample gradients is from the batch's gradient, relative to it; over all parameters."""
    model = model.double()
    assert ModuleValidator.validate(model, strict=False) == []
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    (wrapped(rows) + 1).square().sum().backward()
    found = [parameter.grad_sample.sum(0) for parameter in wrapped.parameters()]
    wanted = torch.autograd.grad((model(rows) + 1).square().sum(), list(model.parameters()))
    difference = sum(float((one - other).square().sum()) for one, other in zip(found, wanted))
    return (difference / sum(float(each.square().sum()) for each in wanted)) ** 0.5


images = torch.randn(8, 1, 6, 6, dtype=torch.float64)
words = torch.tensor([[1, 1, 2, 3], [0, 2, 2, 4]] * 4)
found = {
    f"Conv2d, padding_mode {mode}": off(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), images)
    for mode in ("zeros", "reflect", "replicate", "circular")
}
found["EmbeddingBag, a word twice"] = off(Bags(), words)
found["Embedding"] = off(nn.Embedding(5, 3), words)
found["Embedding, padding_idx"] = off(nn.Embedding(5, 3, padding_idx=1), words)
print(f"opacus {version('opacus')}, torch {torch.__version__}")
for layer, value in found.items():
    print(f"{layer}: off by {value:.1%}")
right = {"Conv2d, padding_mode zeros", "Embedding"}
seen = all((value < 1e-9) == (layer in right) for layer, value in found.items())
print("as described" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
