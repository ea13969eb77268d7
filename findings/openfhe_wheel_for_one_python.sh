#!/usr/bin/env bash
# openfhe 1.6.1.0.22.4: a wheel "for every Python 3 on every platform" holds a library for CPython 3.10 on x86-64 Linux alone.
#
# Valid input: pip install on any other Python 3. The file is called …-py3-none-any.whl, so pip takes it, and pip check is
# content. The import then fails with "No module named 'openfhe.openfhe'", which names neither the version of Python nor what
# is missing. A resolver has no way to choose another release, either: by its tags this one fits everywhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -c 'import sys; print("Python %d.%d" % sys.version_info[:2]); sys.exit(sys.version_info[:2] == (3, 10))' ||
  { echo "on Python 3.10 it is what it says: this needs another"; exit 1; }
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "openfhe==1.6.1.0.22.4"
"$work/venv/bin/pip" check
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution

found = distribution("openfhe")
tags = [line for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
modules = [file.name for file in found.files or () if file.name.endswith(".so") and ".cpython-" in file.name]
try:
    import openfhe  # noqa: F401

    said = "nothing: it was imported"
except ImportError as error:
    said = f"{type(error).__name__}: {error}"
print(f"openfhe {found.version}; {', '.join(tags)}; holds {', '.join(modules)}; importing it says {said}")
seen = tags == ["Tag: py3-none-any"] and all("cpython-310" in name for name in modules) and "openfhe.openfhe" in said
print("as described" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
