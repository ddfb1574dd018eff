#!/usr/bin/env bash
# The committed CPU results: synthetic LlamaGen-B, one image with guidance 2 (two rows), 16 x 16 codes, one thread, plain
# and packed weights. About 20 minutes on one core. Run from the repository's root; results go to benchmarks/results.
set -euo pipefail
export OMP_NUM_THREADS=1
FLASHAR=${FLASHAR:-.venv/bin/flashar}
OUT=${OUT:-benchmarks/results}
for dtype in fp32 bf16; do
  "$FLASHAR" benchmark --preset llamagen-b --batch-sizes 1 --cfg-scale 2.0 --device cpu --threads 1 \
    --weight-formats plain,packed --dtype "$dtype" --out "$OUT/decode_llamagen_b_${dtype}_cpu"
done
for batch in 4 16; do
  "$FLASHAR" benchmark train --preset llamagen-b --batch-size $batch --device cpu --dtype bf16 --repeats 3 \
    --out "$OUT/train_llamagen_b_${batch}_cpu.json"
done
"$FLASHAR" benchmark train --preset llamagen-l --batch-size 4 --device cpu --dtype bf16 --repeats 1 \
  --out "$OUT/train_llamagen_l_4_cpu.json"
