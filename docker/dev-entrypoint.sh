#!/bin/sh
# Run the mounted checkout. The stubs are made anew from the mounted protos, into a directory of this container's own,
# so that neither an old checkout nor the mount decides which ones are used.
set -eu
cd /checkout
PYTHON=python3 bash ./generate_grpc.sh
exec python3 -m src "$@"
