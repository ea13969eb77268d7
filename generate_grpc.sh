#!/usr/bin/env bash
# Make the stubs and their type hints from proto/ into src/communication/generated/ (committed; never edited by hand).
#   ./generate_grpc.sh           write them
#   ./generate_grpc.sh --check   fail when they are not what proto/ gives
set -euo pipefail
cd "$(dirname "$0")"

case "${1:-}" in "" | --check) ;; *) echo "usage: $0 [--check]" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
for need in "import grpc_tools:grpcio-tools" "import mypy_protobuf:mypy-protobuf" "import google.longrunning:googleapis-common-protos"; do
  "$python" -c "${need%%:*}" 2>/dev/null || { echo "${need##*:} is missing: run 'make setup', then 'make proto'" >&2; exit 1; }
done
exec "$python" scripts/generate_grpc.py "$@"
