#!/usr/bin/env bash
# One training run on the nodes of a hostfile through DeepSpeed's launcher, which reaches them by ssh without a password
# (pdsh must be installed). Given once, on one node, with the environment active:
#   bash train/launch/deepspeed.sh --config train/recipes/stage2_full.yaml --data ... --images ... --out ... --resume
# HOSTFILE: default train/launch/hostfile. ZERO: 2 or 3 (default 3). PORT: a free one on the first node (default 29500).
# Variables that the other nodes need, such as NCCL_SOCKET_IFNAME=..., go into ~/.deepspeed_env, one a line.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --master_port "${PORT:-29500}" --no_local_rank --module \
    medllava.train "$@" --deepspeed "$here/../deepspeed/zero${ZERO:-3}.json"
