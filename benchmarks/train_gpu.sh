#!/usr/bin/env bash
# Large training steps on one NVIDIA GPU of 141 GB (see docs/performance.md): LlamaGen-3B and a 7B-shaped Emu3.5 against
# `flashar plan`, and the forms of attention against each other. Not run yet. About ten minutes.
# Run from the repository's root; results go to benchmarks/results. Each job is a process of its own: a clean GPU.
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-benchmarks/results}
for job in llamagen-3b emu35-7b; do
  "$PYTHON" benchmarks/train_gpu.py "$job" --repeats 5 --out "$OUT/train_${job//-/_}_gpu.json"
done
"$PYTHON" benchmarks/attention.py --device cuda --out "$OUT/attention_gpu.json"
