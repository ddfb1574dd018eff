#!/usr/bin/env bash
# The NVIDIA results of training, on one idle GPU (80 GB). Not run yet: see docs/performance.md.
#
#     benchmarks/train_gpu.sh             everything, about 15 minutes
#     benchmarks/train_gpu.sh steps       one part, each below 10 minutes: steps attention
#
# Run from the repository's root; results go to benchmarks/results. Each job is a process of its own: a clean GPU.
# DRY=1 tries every command with small models on the CPU, in a temporary directory.
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # for a PYTHON in which flashar-pl is not installed
OUT=${OUT:-benchmarks/results}
DEVICE=cuda BATCH=64 REPEATS=10 SMALL=()
ATTENTION=()
if [[ -n ${DRY:-} ]]; then
  OUT=${DRY_OUT:-$(mktemp -d)}
  DEVICE=cpu BATCH=1 REPEATS=1 SMALL=(--layers 1 --grid 2x2) ATTENTION=(--tiny)
fi

steps() { # both stages with this package's loss and with a plain one
  for preset in llamagen-b llamagen-l; do
    "$PYTHON" -m flashar_pl.cli benchmark train --preset $preset --batch-size $BATCH --device $DEVICE \
      --dtype bf16 --repeats $REPEATS --out "$OUT/train_${preset//-/_}_gpu.json" ${SMALL[@]+"${SMALL[@]}"}
  done
}
attention() { # a line for each form of masked attention, bool masks and FlexAttention among them, forward and backward
  "$PYTHON" benchmarks/attention.py --device $DEVICE --repeats $REPEATS --out "$OUT/attention_gpu.json" \
    ${ATTENTION[@]+"${ATTENTION[@]}"}
}

mkdir -p "$OUT"
for part in "${@:-steps attention}"; do
  for each in $part; do "$each"; done
done
