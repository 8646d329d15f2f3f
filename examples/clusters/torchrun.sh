#!/usr/bin/env bash
# One training on several machines without a scheduler. The same line on every machine:
#
#     NNODES=1:4 GPUS=8 ./torchrun.sh HOST RECIPE RUN [--key value ...]
#
# HOST is the machine that has the run folder RUN; it must stay, the others may come and go. NNODES is how many machines
# there are, or least:most. The images must be on every machine, under the same path. docs/clusters.md has the rest.
set -euo pipefail
host=$1 recipe=$2 run=$3
shift 3
exec torchrun --nnodes "${NNODES:-1:2}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-100}" \
    --rdzv-id "$(basename "$run")" --rdzv-backend c10d --rdzv-endpoint "$host:${PORT:-29400}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m megdet -- train "$recipe" --run "$run" --timeout 5 "$@"
