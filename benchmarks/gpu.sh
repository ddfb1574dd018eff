#!/usr/bin/env bash
# The NVIDIA results: one script, one run, on one GPU (141 GB for the 34B model). Not run yet: see docs/performance.md.
# Run from the repository's root; results go to benchmarks/results.
set -euo pipefail
FLASHAR=${FLASHAR:-.venv/bin/flashar}
OUT=${OUT:-benchmarks/results}
for preset in llamagen-l llamagen-xxl; do
  "$FLASHAR" benchmark --preset "$preset" --batch-sizes 1,8,64,auto --cfg-scale 2.0 --device cuda --dtype bf16 \
    --vq --png --out "$OUT/decode_${preset//-/_}_bf16_gpu"
done
"$FLASHAR" benchmark --preset emu35-34b --batch-sizes 1 --cfg-scale 5.0 --grid 32x32 --device cuda --dtype bf16 \
  --skip-plain --out "$OUT/decode_emu35_34b_bf16_gpu"
for preset in llamagen-b llamagen-l; do
  "$FLASHAR" benchmark train --preset "$preset" --batch-size 64 --device cuda --repeats 10 \
    --out "$OUT/train_${preset//-/_}_gpu.json"
done
