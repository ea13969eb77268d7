#!/usr/bin/env bash
# dp-accounting 0.6.0: its privacy loss distribution charges randomized response once, however often it ran.
#
# Valid input: binary randomized response with noise parameter 0.5 (ε = ln 3 = 1.0986), ten times, at δ = 1e-5, neighbours
# that replace one record. `compose(event, 10)` and `SelfComposedDpEvent(event, 10)` give the ε of one run, while ten calls
# of `compose(event)` give 10.99; all three leave the same ledger behind. The Rényi accountant says 10.99 to all. In
# `PLDAccountant._maybe_compose` the branch for this event is the only one of those that sample nothing which leaves the
# count out. No warning, no error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "dp-accounting==0.6.0" "numpy==2.4.6" "scipy==1.17.1"
"$work/venv/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

RELATION = dp.NeighboringRelation.REPLACE_ONE
ONE = dp.RandomizedResponseDpEvent(noise_parameter=0.5, num_buckets=2)
TEN = dp.SelfComposedDpEvent(ONE, 10)

counted, nested, one_by_one = (PLDAccountant(RELATION) for _ in range(3))
counted.compose(ONE, 10)
nested.compose(TEN)
for _ in range(10):
    one_by_one.compose(ONE)
once = PLDAccountant(RELATION).compose(ONE).get_epsilon(1e-5)
renyi = RdpAccountant(neighboring_relation=RELATION).compose(ONE, 10).get_epsilon(1e-5)
ten = [accountant.get_epsilon(1e-5) for accountant in (counted, nested, one_by_one)]
print(f"dp-accounting {version('dp-accounting')}; ln 3 = {math.log(3):.4f}")
print(f"privacy loss distribution, one run: epsilon {once:.4f}")
print("ten runs: compose(event, 10) {:.4f}, SelfComposedDpEvent {:.4f}, composed one by one {:.4f}".format(*ten))
print(f"Renyi accountant, ten runs: {renyi:.4f}; ledgers equal: {counted.ledger == nested.ledger == one_by_one.ledger}")
seen = ten[0] == ten[1] == once < 1.2 and ten[2] > 10.9 and renyi > 10.9
seen = seen and counted.ledger == nested.ledger == one_by_one.ledger == TEN
print("as described: a count is forgotten" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
