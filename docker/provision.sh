#!/bin/sh
# Make the kits of a federation of three in memory, and put each into its own volume: once.
# The operator's kit (the authority's key, which could let others in) is not kept: this is a demonstration.
set -eu
kits="aggregator party-a party-b party-c scientist"

found=0
for kit in $kits; do
  [ -e "/kits/$kit/roster.json" ] && found=$((found + 1))
done
if [ "$found" -eq 5 ]; then
  echo "the kits are there already"
  exit 0
elif [ "$found" -gt 0 ]; then
  echo "some volumes have a kit and some have none: kits of two deals do not mix; start over with 'down --volumes'" >&2
  exit 1
fi

sotto provision --out /tmp/kits --federation demo --party a --party b --party c --threshold 2 --address aggregator:50051
for kit in $kits; do
  cp -R -p "/tmp/kits/$kit/." "/kits/$kit/"
done
