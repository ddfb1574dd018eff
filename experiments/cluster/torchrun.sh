#!/bin/bash
# Several nodes without Slurm: run this on every node with the same words, from the root of the repository.
#   experiments/cluster/torchrun.sh HOST NODES CONFIG_OR_CHECKPOINT
#   experiments/cluster/torchrun.sh node0 2 experiments/emu35_34b.yaml --data.batch_size 16
#   experiments/cluster/torchrun.sh node0 2 runs/emu35_34b/checkpoints/last.ckpt
# The same words continue a run that was stopped, from the newest checkpoint of its directory.
# HOST is one of the nodes, reachable from all on port 29500 (or PORT). GPUS is the number of processes on each node.
set -eu
HOST=$1 NODES=$2 FROM=$3
shift 3
case "$FROM" in
    *.yaml) WORDS=(--config "$FROM") ;;
    *) WORDS=(--ckpt_path "$FROM") ;;
esac
WORDS+=(--trainer.num_nodes "$NODES")
if [ ! -f "$FROM" ] || grep -q ShardedStrategy "$FROM"; then  # DDP has no shards to copy
    WORDS+=(--trainer.strategy.init_args.replicas "$NODES")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d \
    --rdzv-endpoint "$HOST:${PORT:-29500}" --rdzv-id flashar -m flashar_pl.cli fit "${WORDS[@]}" "$@"
