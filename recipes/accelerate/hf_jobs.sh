#!/usr/bin/env bash
# recipes/accelerate/hf_jobs.sh --base org/base --method opcm --push-to org/merged org/a org/b
# HF Jobs: NODES jobs (default 1) of FLAVOR, PROCESSES processes in each, for at most TIMEOUT. What follows the script's
# name goes to `hfmerge merge`; name models by Hub ID and use `--push-to`, since the machines and their disks vanish.
# Before: `pip wheel --no-deps --wheel-dir dist .`. With HF_JOBS_FLAGS=--dry-run the jobs are printed, not started.
set -euo pipefail

nodes=${NODES:-1} processes=${PROCESSES:-2} flavor=${FLAVOR:-cpu-performance} timeout=${TIMEOUT:-12h}
: "${1:?usage: hf_jobs.sh [flags of hfmerge merge] MODEL...}"
compgen -G "dist/hfmerge-*.whl" > /dev/null || { echo "no dist/hfmerge-*.whl: run pip wheel --no-deps --wheel-dir dist ." >&2; exit 1; }
group=hfmerge-$(date +%s)

for ((node = 0; node < nodes; node++)); do
    flags=(--flavor "$flavor" --timeout "$timeout" --secrets HF_TOKEN --volume ./dist:/dist --name "$group-$node")
    launch="torchrun --nproc_per_node $processes"
    if ((nodes > 1)); then
        # the jobs of a group reach one another on every port, and do not share a disk
        flags+=(--detach --network-group "$group" --network-alias "node$node")
        launch+=" --nnodes $nodes --node_rank $node --master_addr \${HF_NETWORK_GROUP_PREFIX}node0 --master_port 29500"
    fi
    # shellcheck disable=SC2086  # several flags in one variable
    hf jobs run "${flags[@]}" ${HF_JOBS_FLAGS:-} python:3.12 \
        bash -c "pip install --quiet /dist/hfmerge-*.whl && exec $launch -m hfmerge merge \"\$@\"" hfmerge "$@"
done
