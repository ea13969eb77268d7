#!/usr/bin/env bash
# torch 2.13.0 on x86-64: the same seed begins a model with other numbers where AVX2 is used than where it is not.
#
# Valid input: torch.manual_seed(5), then 100 numbers, in one process that may use AVX2 and in one that may not, as
# ATEN_CPU_CAPABILITY lets one choose (it is torch's own switch for what it finds in the processor). torch.rand is the same to
# the bit. Of randn, and of what nn.Embedding begins with, a third of the numbers differ in the last digits of a float32; of
# what nn.Linear begins with, half. So a digest of a model that was built from a seed says what processor built it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6"
cat >"$work/draw.py" <<'PYTHON'
import json

import torch

drawn = {}
torch.manual_seed(5)
drawn["rand"] = torch.rand(100).tolist()
torch.manual_seed(5)
drawn["Linear"] = torch.nn.Linear(10, 10).weight.detach().flatten().tolist()
torch.manual_seed(5)
drawn["randn"] = torch.randn(100).tolist()
torch.manual_seed(5)
drawn["Embedding"] = torch.nn.Embedding(10, 10).weight.detach().flatten().tolist()
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "drawn": drawn}))
PYTHON
ATEN_CPU_CAPABILITY=default "$work/venv/bin/python" "$work/draw.py" >"$work/default.json"
ATEN_CPU_CAPABILITY=avx2 "$work/venv/bin/python" "$work/draw.py" >"$work/avx2.json"
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

plain, fast = (json.loads(Path(sys.argv[1], f"{name}.json").read_text()) for name in ("default", "avx2"))
print(f"torch {plain['torch']}; capabilities {plain['capability']} and {fast['capability']}")
if fast["capability"] != "AVX2":
    raise SystemExit("this processor has no AVX2: there is nothing to compare")
same = {}
for what, numbers in plain["drawn"].items():
    differ = sum(one != other for one, other in zip(numbers, fast["drawn"][what], strict=True))
    largest = max(abs(one - other) for one, other in zip(numbers, fast["drawn"][what], strict=True))
    same[what] = differ == 0
    print(f"{what}: {differ} of {len(numbers)} numbers differ, by up to {largest:.3g}")
seen = same == {"rand": True, "Linear": False, "randn": False, "Embedding": False}
print("as described" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
