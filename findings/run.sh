#!/usr/bin/env bash
# Run the findings whose names are given, or all of them; exits with 1 where a library no longer behaves as was found.
set -uo pipefail
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then set -- *.sh; fi
changed=()
for name in "$@"; do
  script=${name%.sh}.sh
  [ "$script" != run.sh ] || continue
  echo "== $script"
  bash "./$script" || changed+=("$script")
done
if [ "${#changed[@]}" -gt 0 ]; then
  echo "not as described: ${changed[*]}"
  exit 1
fi
