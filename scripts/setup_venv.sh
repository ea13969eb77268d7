#!/usr/bin/env bash
# Make (or complete) the virtual environment named by $1 from constraints.txt, with everything the demo and the tests need.
# EXTRAS picks what is installed (default: dev). PYTHON picks the interpreter (default: the newest python3.11+ on PATH).
set -euo pipefail
venv=${1:?usage: setup_venv.sh DIR}
extras=${EXTRAS:-dev}

find_python() {
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Sotto needs Python 3.11 or newer, and none was found on PATH." >&2
  echo "  Debian/Ubuntu:  sudo apt-get install python3 python3-venv" >&2
  echo "  macOS:          brew install python@3.12" >&2
  echo "  or point at it: make setup PYTHON=/path/to/python3.12" >&2
  exit 1
}

python=$(find_python)
if [ ! -x "$venv/bin/python" ]; then
  echo "sotto: creating $venv with $("$python" --version) (once, about a minute)"
  if ! "$python" -m venv "$venv" 2>"${TMPDIR:-/tmp}/sotto-venv.$$"; then
    cat "${TMPDIR:-/tmp}/sotto-venv.$$" >&2
    rm -rf "$venv" "${TMPDIR:-/tmp}/sotto-venv.$$"
    echo "Python's venv module is missing or broken. On Debian/Ubuntu: sudo apt-get install python3-venv" >&2
    exit 1
  fi
  rm -f "${TMPDIR:-/tmp}/sotto-venv.$$"
fi
[ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null ||
  "$venv/bin/python" -m pip install --disable-pip-version-check uv

# Where pip is told of local wheels, use them; where it is not, ask for the CPU build, so that nobody downloads CUDA unasked.
find_links=$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)
find_links=${PIP_FIND_LINKS:-$find_links}
backend=()
[ -n "$find_links" ] || backend=(--torch-backend cpu)
UV_FIND_LINKS=$find_links "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" ${backend[@]+"${backend[@]}"} \
  --constraint constraints.txt --editable ".[$extras]"
echo "sotto: $venv is ready"
