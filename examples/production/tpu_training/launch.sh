#!/usr/bin/env bash
# Start one process a chip on this host of a slice: the same command on every host, with the options of train.py.
#
# TorchTPU wants the addresses and the shape of the slice to be decided before the processes start. On a slice of
# several hosts TPU_WORKER_HOSTNAMES lists them (GKE sets it; on TPU VMs give it, with JOB_COMPLETION_INDEX counting
# the hosts from 0). Every process sees its chip as tpu:0.
set -euo pipefail

chips="${CHIPS_PER_HOST:-4}"
export TORCH_TPU_DEVICES_PER_HOST="$chips"
settings=$(python -m torch.tpu.distributed)
eval "$(sed 's/^/export /' <<<"$settings")"
exec torchrun --nproc-per-node "$chips" \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
  "$(dirname "$0")/train.py" --device tpu "$@"
