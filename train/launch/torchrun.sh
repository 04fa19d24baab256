#!/usr/bin/env bash
# One training run on several nodes. Give the same line on every node, in any order; what follows goes to medllava.train:
#   HOST=node1 NODES=2 bash train/launch/torchrun.sh --config train/recipes/stage2_lora.yaml --data ... --out ... --resume
#
# HOST: name or address of one of the nodes, which all can reach; PORT on it must be free and open to them.
# PER_NODE: processes on this node (default: one for each of its GPUs).
# RUN: a name that two runs on the same HOST and PORT must not share.
# --data, --images, --init-from and --out lie on a disk that all nodes see at the same path.
set -eu
exec python -m torch.distributed.run \
    --nnodes "${NODES:?say how many nodes there are}" --nproc-per-node "${PER_NODE:-gpu}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "${RUN:-medllava}" --rdzv-endpoint "${HOST:?name one of the nodes}:${PORT:-29500}" \
    -m medllava.train "$@"
