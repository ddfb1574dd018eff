#!/usr/bin/env bash
# The NVIDIA results of decoding, on one idle GPU (141 GB for the 34B model). Not run yet: see docs/performance.md.
#
#     benchmarks/gpu.sh             everything, estimated at 25 minutes
#     benchmarks/gpu.sh latency     one part, each meant to stay below 10 minutes: tests latency throughput large emu profile targets
#
# Run from the repository's root; results go to benchmarks/results. What is there is kept, so a run can be continued.
# DRY=1 tries every command with a tiny model on the CPU, in a temporary directory; presets are only looked up.
set -uo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # for a PYTHON in which flashar-pl is not installed
OUT=${OUT:-benchmarks/results}
DEVICE=cuda
RUNNERS=eager,compiled,graphs,compiled-graphs
GRAPHS=graphs
FAST=graphs,compiled-graphs,fused
OWN=fused
FORMATS=plain,int8,fp8
VQ=vq16 IBQ=ibq
EXTRA=() MODEL=() COLLECT=()
if [[ -n ${DRY:-} ]]; then
  OUT=${DRY_OUT:-$(mktemp -d)}
  DEVICE=cpu RUNNERS=eager GRAPHS=auto FAST=eager OWN=eager FORMATS=plain,int8
  VQ=pixels:64 IBQ=pixels:64
  EXTRA=(--repeats 1 --threads 1) MODEL=(--checkpoint "$OUT/tiny") COLLECT=(--collect-only)
fi
failed=()

tiny() { # DRY: the model in place of all others
  [[ -e $OUT/tiny ]] || "$PYTHON" - "$OUT/tiny" << 'TINY' || exit 1
import sys
from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.models import FlashAR

model = FlashAR(LlamaGen(LlamaGenConfig(64, 2, 4, vocab_size=64, num_classes=10, multiple_of=32)), branch_layer=1)
save_model(sys.argv[1], model, Description(model.config(), grid=(2, 2)))
TINY
}

bench() { # name preset options
  local name=$1 preset=$2
  shift 2
  if [[ -e $OUT/$name ]]; then
    echo "$OUT/$name is there and kept"
    return
  fi
  local model=(--preset "$preset")
  if [[ -n ${DRY:-} ]]; then
    tiny
    "$PYTHON" -m flashar_pl.cli plan "${model[@]}" --gpu h200 > /dev/null || failed+=("$preset")
    model=("${MODEL[@]}")
  fi
  echo "== $name"
  "$PYTHON" -m flashar_pl.cli benchmark "${model[@]}" --device $DEVICE --dtype bf16 --out "$OUT/$name" "$@" \
    ${EXTRA[@]+"${EXTRA[@]}"} || failed+=("$name")
}

tests() { # every way of decoding against the plain model; what only a GPU can check: graphs, waits, memory
  [[ -n ${DRY:-} ]] && tiny
  [[ -e $OUT/doctor_gpu.json ]] && echo "$OUT/doctor_gpu.json is there and kept" ||
    "$PYTHON" -m flashar_pl.cli doctor --device $DEVICE --runners $RUNNERS --weight-formats $FORMATS \
      --out "$OUT/doctor_gpu.json" ${MODEL[@]+"${MODEL[@]}"} || failed+=(doctor)
  [[ -e $OUT/doctor_fused_gpu.json ]] && echo "$OUT/doctor_fused_gpu.json is there and kept" ||
    "$PYTHON" -m flashar_pl.cli doctor --device $DEVICE --runners $OWN --out "$OUT/doctor_fused_gpu.json" \
      ${MODEL[@]+"${MODEL[@]}"} || failed+=("doctor fused")
  "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu ${COLLECT[@]+"${COLLECT[@]}"} tests || failed+=(tests)
}
latency() { # L, one image: all runners, then the formats of weights
  bench decode_llamagen_l_latency_gpu llamagen-l --batch-sizes 1 --cfg-scale 2.0 --runners $RUNNERS,$OWN --pixels $VQ
  bench decode_llamagen_l_formats_gpu llamagen-l --batch-sizes 1 --cfg-scale 2.0 --runners $GRAPHS \
    --weight-formats $FORMATS --skip-plain
}
throughput() { # L, many images
  local sizes=8,64,256,512,auto
  [[ -n ${DRY:-} ]] && sizes=2,auto
  bench decode_llamagen_l_throughput_gpu llamagen-l --batch-sizes $sizes --cfg-scale 2.0 --runners $FAST --skip-plain \
    --pixels $VQ
}
large() { # XXL
  local sizes=1,64
  [[ -n ${DRY:-} ]] && sizes=1
  bench decode_llamagen_xxl_gpu llamagen-xxl --batch-sizes $sizes --cfg-scale 2.0 --runners $FAST --skip-plain
}
emu() { # 34B, 32 x 32 codes: guided, with the official empty prompt's length beside a caption's
  bench decode_emu35_34b_gpu emu35-34b --batch-sizes 1 --cfg-scale 5.0 --runners $GRAPHS,$OWN --skip-plain \
    --pixels $IBQ
  bench decode_emu35_34b_runners_gpu emu35-34b --plans diagonal --batch-sizes 1 --cfg-scale 5.0 \
    --runners ${FAST/#graphs,compiled-graphs,fused/compiled-graphs} --skip-plain
}
profile() { # where a step's time goes
  local preset=llamagen-l
  [[ -n ${DRY:-} ]] && preset=llamagen-b
  local name
  for plan in diagonal raster; do
    name=$OUT/profile_llamagen_l_${plan}_gpu.md
    "$PYTHON" benchmarks/profile_decode.py --preset $preset --plan $plan --dtype bf16 --device $DEVICE \
      ${DRY:+--grid 2x2} > "$name.part" && mv "$name.part" "$name" && cat "$name" || failed+=("profile $plan")
  done
}
targets() {
  "$PYTHON" benchmarks/targets.py --results "$OUT" || failed+=(targets)
}

mkdir -p "$OUT"
parts=("${@:-all}")
[[ ${parts[0]} == all ]] && parts=(tests latency throughput large emu profile targets)
for part in "${parts[@]}"; do
  case $part in
    tests | latency | throughput | large | emu | profile | targets) "$part" ;;
    *)
      echo "part is '$part'; expected tests, latency, throughput, large, emu, profile or targets" >&2
      exit 2
      ;;
  esac
done
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
