#!/usr/bin/env bash
# dp-accounting 0.6.0: a noise multiplier of 1 instead of 1.0 makes its Rényi accountant forget a composition.
#
# Valid input: a Poisson sample of rate 0.05 is given to 16 Gaussian mechanisms of noise multiplier 1, at δ = 1e-5. By the
# documentation of `SelfComposedDpEvent` that is 16 applications. Written 1.0 they cost ε = 20.1; written 1, or as numpy's
# float32(1), ε = 1.6, which is what one of them costs. No warning, no error. `_effective_gaussian_noise_multiplier` takes
# whatever is not an instance of `float` for an event that it cannot handle, and hands it back; its caller only looks
# whether it got an event. numpy's float64 is a `float`, and so is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "dp-accounting==0.6.0" "numpy==2.4.6" "scipy==1.17.1"
"$work/venv/bin/python" - <<'PYTHON'
import logging
from importlib.metadata import version

import dp_accounting as dp
import numpy as np
from dp_accounting.rdp import RdpAccountant

logging.disable(logging.WARNING)  # of orders that are left out, which it says of every figure here


def epsilon(multiplier, times):
    parts = dp.SelfComposedDpEvent(dp.GaussianDpEvent(multiplier), times)
    return RdpAccountant().compose(dp.PoissonSampledDpEvent(0.05, parts)).get_epsilon(1e-5)


one, many = epsilon(1.0, 1), epsilon(1.0, 16)
found = {"int": epsilon(1, 16), "float32": epsilon(np.float32(1), 16), "float64": epsilon(np.float64(1), 16)}
print(f"dp-accounting {version('dp-accounting')}, numpy {np.__version__}")
print(f"one mechanism: epsilon {one:.4f}; sixteen, multiplier 1.0: {many:.4f}")
for kind, value in found.items():
    print(f"sixteen, multiplier of type {kind}: {value:.4f}")
seen = found["int"] == found["float32"] == one and found["float64"] == many and many > 10 * one
print("as described: an int or a float32 is charged for one of sixteen" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
