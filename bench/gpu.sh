#!/usr/bin/env bash
# Everything that a short GPU rental should measure, the most valuable first: bench/gpu.sh OUT
#
# The machine has python3 with torch, triton, transformers and peft, and no network. Environment:
#   WHEELS=folder   of wheels to install (what the machine lacks: diffusers, the peers, …)
#   SMALL=1         the small model on whatever device there is: to try this script
#   BUDGET=seconds  for all stages (default 1500); a stage gets its own limit, and no more than what is left
# A stage that fails or runs out of time costs only itself. OUT/summary.md is made anew after every measurement.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
begun=$(date +%s)
budget=${BUDGET:-1500}
results=$out/results
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
: >"$out/stages.txt"

left() { echo $((budget - ($(date +%s) - begun))); }

stage() { # NAME LIMIT COMMAND…
  local name=$1 limit=$2 start status
  shift 2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  start=$(date +%s)
  if [ "$limit" -lt 5 ]; then
    status="no time left"
  else
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 && status=ok || status="failed ($?)"
  fi
  echo "$name: $status, $(($(date +%s) - start)) s" | tee -a "$out/stages.txt"
  if [ "$status" != ok ] && [ -e "$out/$name.log" ]; then tail -n 5 "$out/$name.log"; fi
}

bench() { python3 -c 'import sys; from fluxfast_bench.main import main; sys.exit(main())' "$@"; }
export -f bench

measure() { # NAME LIMIT ARGUMENTS…
  local name=$1 limit=$2
  shift 2
  # bash, because timeout knows no functions
  stage "$name" "$limit" bash -c 'bench "$@"' bash "$@"
  timeout 60 bash -c 'bench "$@"' bash report --results "$results" --summary "$out/summary.md" >"$out/report.log" 2>&1 ||
    echo "report: failed, see report.log" | tee -a "$out/stages.txt"
}

if [ -n "${WHEELS:-}" ]; then
  site=$out/site
  # beside what is there, which may not be ours to change, and before it
  stage wheels 180 python3 -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi
stage build 240 python3 setup.py build_ext --inplace
stage device 60 python3 -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.txt" 2>&1

if [ -n "${SMALL:-}" ]; then
  stage tests 240 python3 -m pytest tests/kernels/test_gelu_kernels.py -x -q -p no:cacheprovider
  measure step 240 step --results "$results" --shapes tiny --rounds 2 --seconds 0.2 \
    --contestants diffusers,fluxfast,fluxfast-int8,quanto-int8
  measure ops 180 ops --results "$results" --shapes tiny --seconds 0.05 --ops gelu,gated_residual --contenders fluxfast,eager
  measure startup 120 startup --results "$results"
  exit 0
fi

# the kernels that a step is made of, on the device: a wrong one makes the rest worthless
stage tests 240 python3 -m pytest tests/kernels tests/ops tests/model/test_graphs.py -x -q -p no:cacheprovider
# the targets' pairs
measure step-1024 330 step --results "$results" --shapes 1024px-b1 --rounds 3 --seconds 2 --limit 150 \
  --contestants diffusers-compile,fluxfast-int8+int8,fluxfast,diffusers,quanto-int8,fluxfast-int8+int8:none
measure step-512 240 step --results "$results" --shapes 512px-b1 --rounds 3 --seconds 1.5 --limit 150 \
  --contestants diffusers-compile,fluxfast-int8+int8,fluxfast-int8+int8+graphs,fluxfast,quanto-int8,fluxfast-int8+int8:none,fluxfast-int8+int8+graphs:none,fluxfast-int8+int8+tread,fluxfast-int8+int8+tread+graphs
measure ops 180 ops --results "$results" --shapes 1024px-b1 --seconds 0.2
# the other peers, beside ours again: an anchor makes runs comparable, but a table is of one run
measure step-peers 330 step --results "$results" --shapes 1024px-b1 --rounds 3 --seconds 2 --limit 120 \
  --contestants diffusers-compile,fluxfast-int8+int8,sdnq-int8,bnb-nf4,fluxfast-nf4+int8,fluxfast-int4+int8,fluxfast-int4+int8+streamed,fluxfast-int8+int8+tread,fluxfast-fp8_e4m3+e4m3,torchao-fp8,torchao-int8,quanto-int4,quanto-int2
measure step-scaling 240 step --results "$results" --shapes 512px-b2,512px-b4,768px-b1,1024px-b2 --rounds 2 --seconds 1.5 --limit 120 \
  --contestants diffusers-compile,fluxfast-int8+int8
measure vram 240 vram
measure trace 120 step --results "$out/trace-results" --shapes 1024px-b1 --rounds 1 --seconds 1 \
  --contestants fluxfast-int8+int8 --torch-profile "$out/trace"
exit 0
