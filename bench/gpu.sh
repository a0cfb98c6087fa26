#!/usr/bin/env bash
# What a few minutes of one GPU should show, the most valuable first: bench/gpu.sh OUT [first|second|rest]
#
#   (none)   first, then second: ten minutes in all
#   first    compile, ceilings, is every kernel right, int8 with and without graphs; where the time goes; the tests
#   second   tiles; all of ours, then beside the peers: eager, quanto, compiled; then of `rest` what there is time for
#   rest     LoKr, streamed, TREAD, fluxfast-train doctor, the memory checker
#   STAGE…   those stages, `setup` first
#   plan     prints each part's stages and limits, and runs nothing
#
# OUT gets two files a part: a page (.md) and everything behind it (.tar.gz). Both are there whatever fails or is killed, and
# figures are written down one by one, so that a stage that runs out of time costs only what it had not measured.
#
# The machine has python3 (3.12) with torch, triton, transformers, peft and pytest, and no network. Environment:
#   WHEELS=folder  what the machine lacks, as bench/wheels.sh makes it (default: .wheels, if it is there); with Triton's cache in
#                  it, which holds for the default WORK alone, `prewarm` has little to do
#   BUDGET=seconds for one part (default: what its limits add up to)
#   WORK=folder    for what both parts use: installed wheels, Triton's cache, results (default: /tmp/fluxfast-gpu)
#   FLUXFAST_COMMIT=…  what results are said to be of, where files are not those of a checkout's commit
#   SMALL=1        small models and shapes, on the CPU too: to try this script. The default where there is no GPU; 0: never
set -uo pipefail
usage="usage: bench/gpu.sh OUT [first|second|rest|STAGE…], or bench/gpu.sh plan"
# each part's stages, in their order
first="setup prewarm smoke smoke-short int8 profile ceilings tests rates"
rest="others doctor memcheck racecheck"
second="setup prewarm sweep ours eager compiled rates $rest"
rest="setup $rest"

[ $# -gt 0 ] || { echo "$usage" >&2 && exit 2; }
out=$1
shift
case "$out:${1:-}" in
plan:) part=plan stages= ;;
*:first | *:second | *:rest) part=$1 stages=${!1} ;;
*:?*)
  part=picked stages=$*
  for name in $stages; do
    case " $first $second " in
    *" $name "*) ;;
    *) echo "there is no stage $name; $usage" >&2 && exit 2 ;;
    esac
  done
  ;;
*:)
  # each part leaves what it has, whatever becomes of the other; a signal is for the one that runs
  trap 'kill -TERM "$running"; wait "$running"; exit 143' TERM INT HUP
  for part in first second; do
    bash "$0" "$out" "$part" &
    running=$!
    wait "$running"
  done
  exit
  ;;
esac
begun=$(date +%s)
PYTHON=${PYTHON:-python3}
PATH=$PATH:/usr/local/nvidia/bin
has_gpu() { [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }; }
if [ -z "${SMALL:-}" ] && ! has_gpu; then SMALL=1; fi
if [ "${SMALL:=}" = 0 ]; then SMALL=; fi
# for the page and the archive, after the last stage
closing=20
shared=${WORK:-/tmp/fluxfast-gpu}

# ---- what runs: NAME LIMIT COMMAND… ------------------------------------------------------------------------------------------

# in a process that has imported everything already
warm() { "$PYTHON" -m fluxfast_bench.warm run "$socket" "$@"; }

bench() { warm fluxfast_bench.main "$1" --results "$results" "${@:2}"; }

doctor() { warm fluxfast.cli.main doctor $examined; }

steps() { bench step --one-process --stored-ceilings --optimizer torch-adamw --recompute "$policy" --shapes "$@"; }

smoke() { bench smoke --one-process --shapes "$@"; }

if [ -n "$SMALL" ]; then
  both=tiny long=tiny short=tiny rounds=1 policy=none jobs=2 slower=6
  tests="tests/kernels/test_gelu_kernels.py"
  warm="--contestants fluxfast,fluxfast-int8+int8,fluxfast-nf4+int8,fluxfast-int4+int8 --shapes 1024px-b1"
  smoked=fluxfast,fluxfast-int8+int8,fluxfast-int8+int8+graphs,fluxfast-nf4+int8,fluxfast-int4+int8,fluxfast-fp8_e4m3+e4m3
  few="--most 1" examined=--short
else
  both=1024px-b1,512px-b1 long=1024px-b1 short=512px-b1 rounds=2 policy=full jobs=14 slower=1
  tests="tests/kernels tests/ops tests/model/test_graphs.py"
  warm="" few="" examined=--all
  smoked=fluxfast-int8+int8,fluxfast-int8+int8+graphs,fluxfast,fluxfast+graphs,fluxfast+fused,fluxfast-int8+int8+lokr,fluxfast+lokr,fluxfast-nf4+int8,fluxfast-int4+int8,fluxfast-fp8_e4m3+e4m3
fi
ours=fluxfast-int8+int8

run() { # STAGE
  case $1 in
  setup)
    stage setup 20 setup
    serve
    stage imports 30 warm fluxfast_bench.main --version
    ;;
  prewarm) [ -e "$shared/compiled" ] || stage prewarm 35 bench prewarm --jobs "$jobs" $warm ;;
  ceilings) stage ceilings 15 bench ceilings --shapes "$both" --seconds 0.05 ;;
  smoke) stage smoke 60 smoke "$long" --contestants "$smoked" ;;
  smoke-short) stage smoke-short 15 smoke "$short" --contestants "$ours,$ours+graphs" ;;
  int8) stage int8 35 steps "$both" --rounds 1 --steps 5 --contestants "$ours,$ours+graphs" ;;
  profile) stage profile 30 bench profile --shapes "$both" --recompute "$policy" --contestants "$ours,$ours+device-modulation,fluxfast" ;;
  tests) stage tests 40 bench tests $tests --jobs "$jobs" ;;
  sweep) stage sweep 30 swept ;;
  ours)
    stage ours 45 steps "$both" --rounds "$rounds" --steps 5 \
      --contestants "$ours+graphs,$ours+graphs:none,fluxfast+graphs,fluxfast+fused+graphs,$ours+device-modulation+graphs"
    ;;
  eager)
    stage eager 45 steps "$both" --rounds "$rounds" --steps 5 --contestants "$ours+graphs,diffusers,quanto-int8,fluxfast+graphs"
    ;;
  compiled)
    stage compiled 70 steps "$both" --rounds "$rounds" --steps 5 --contestants "$ours+graphs,diffusers-compile,fluxfast+graphs"
    ;;
  others)
    stage others left steps "$long" --rounds "$rounds" --steps 5 \
      --contestants "$ours+graphs,$ours+graphs+lokr,$ours+tread+graphs,fluxfast-int4+int8,fluxfast-int4+int8+streamed,fluxfast-nf4+int8+graphs,sdnq-int8,bnb-nf4"
    ;;
  rates) stage rates left rates ;;
  doctor) stage doctor left doctor ;;
  memcheck) stage memcheck left checked memcheck fluxfast-int4+int8+streamed ;;
  racecheck) stage racecheck left checked racecheck "$ours" ;;
  esac
}

setup() {
  if [ -n "$wheels" ] && [ ! -e "$site/.done" ]; then
    # beside what is there, which may not be ours to change, and before it
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl && touch "$site/.done"
    local suffix
    suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    [ -e "$wheels/_C$suffix" ] && cp "$wheels/_C$suffix" fluxfast/
    # Triton's cache holds absolute paths
    if [ -e "$wheels/triton.tar.xz" ]; then
      tar -C "$(dirname "$TRITON_CACHE_DIR")" -xJf "$wheels/triton.tar.xz"
      # made by the very Triton that is here?
      "$PYTHON" -c 'from triton.runtime.cache import triton_key; print(triton_key())' | cmp - "$wheels/triton.key" && touch "$shared/compiled"
    fi
  fi
  "$PYTHON" -c 'import importlib.util, os
for name in "torch", "transformers", "diffusers":
    source = importlib.util.find_spec(name).origin
    print(source, "has bytecode:", os.path.exists(importlib.util.cache_from_source(source)))
import torch, triton, fluxfast
from fluxfast.ops.dispatch import HAS_NATIVE
print("torch", torch.__version__, "triton", triton.__version__, "native module", HAS_NATIVE)
print(torch.cuda.is_available() and torch.cuda.get_device_name())'
  local status=$?
  command -v nvidia-smi >/dev/null && nvidia-smi >"$work/nvidia-smi.txt" 2>&1
  return $status
}

swept() {
  # a CPU has Triton's interpreter alone
  if [ -n "$SMALL" ]; then export TRITON_INTERPRET=1; fi
  bench sweep --shapes "$both" --jobs "$jobs" $few
}

checked() { # TOOL CONTESTANT
  if ! command -v compute-sanitizer >/dev/null; then echo "there is no compute-sanitizer here"; return 0; fi
  compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9 "$PYTHON" -c \
    'import sys; from fluxfast_bench.main import main; sys.exit(main())' \
    smoke --results "$results" --one-process --shapes tiny --contestants "$2"
}

rates() {
  if [ -n "$SMALL" ]; then echo "a tiny model gives no rates"; return 0; fi
  warm fluxfast_bench.main predict --from-results "$results" --rates "$work/rates.json"
}

# ---- how it runs -------------------------------------------------------------------------------------------------------------

if [ "$part" = plan ]; then
  serve() { :; }
  stage() {
    echo "$part $1 $2"
    if [ "$2" != left ]; then total=$((total + $2)); fi
  }
  for part in first second rest; do
    total=$closing
    for name in ${!part}; do run "$name"; done
    echo "$part total $total"
  done
  exit 0
fi

out=$(mkdir -p "$out" && cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
root=$PWD
wheels=${WHEELS:-}
if [ -z "$wheels" ] && [ -d .wheels ]; then wheels=.wheels; fi
if [ -n "$wheels" ]; then wheels=$(cd "$wheels" && pwd) || exit 1; fi
site=$shared/site
work=$shared/$part
rm -rf "$work"
results=$work/results
mkdir -p "$work/logs" "$results" "$site" || exit 1
export PYTHONPATH=$root:$root/kernels:$root/bench:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$shared/triton TORCHINDUCTOR_CACHE_DIR=$shared/inductor
export -f warm bench steps smoke doctor setup swept checked rates
socket=$shared/$part.socket
export PYTHON SMALL both few examined jobs policy wheels site work results socket
# the first part's ceilings are the second's as well
[ "$part" != first ] && [ -d "$shared/first/results" ] && cp -r "$shared/first/results" "$work/"
planned=$("$root/bench/gpu.sh" plan | awk -v part="$part" '$1 == part && $2 == "total" { print $3 }')
# "left" is no number of seconds
case $part in rest | picked) planned=300 ;; esac
: "${BUDGET:=$((planned * slower))}"
child=
server=

left() { echo $((BUDGET - closing - ($(date +%s) - begun))); }

stage() { # NAME LIMIT COMMAND…; the limit may be "left"
  local name=$1 limit=$2 start status code
  shift 2
  [ "$limit" = left ] && limit=$(left) || limit=$((limit * slower))
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  start=$(date +%s)
  if [ "$limit" -lt 5 ]; then
    status="no time left"
  else
    # bash, because timeout knows no functions
    timeout --kill-after=5 "$limit" bash -c '"$@"' bash "$@" >"$work/logs/$name.log" 2>&1 &
    child=$!
    wait "$child"
    code=$?
    child=
    case $code in
    0) status=ok ;;
    124 | 137) status="out of time after $limit s" ;;
    *) status="failed ($code)" ;;
    esac
  fi
  echo "| $name | $status | $(($(date +%s) - start)) |" | tee -a "$work/stages.md"
}

page() { # the page, as far as it can be made without Python
  echo "# $part: $(date -u +%Y-%m-%dT%H:%M:%SZ), $(git -C "$root" describe --always --dirty 2>/dev/null)"
  printf '\n| stage | | s |\n| --- | --- | ---: |\n'
  cat "$work/stages.md"
  if [ -s "$work/report.md" ]; then printf '\n' && sed 's/^#/##/' "$work/report.md"; fi
  printf '\n## The ends of the logs\n'
  local log
  for log in "$work"/logs/*.log; do
    [ -e "$log" ] || continue
    printf '\n%s\n\n```\n' "$(basename "$log")"
    tail -n 12 "$log" | tail -c 3000
    printf '```\n'
  done
}

serve() { # once what it imports is there
  "$PYTHON" -m fluxfast_bench.warm serve "$socket" >"$work/logs/warm.log" 2>&1 &
  server=$!
}

pack() {
  page >"$work/summary.md"
  cp "$work/summary.md" "$out/fluxfast-gpu-$part.md"
  tar -C "$work" -czf "$out/.tmp.tar.gz" . && mv "$out/.tmp.tar.gz" "$out/fluxfast-gpu-$part.tar.gz"
}

finish() {
  trap '' TERM INT HUP
  # first what takes no time: who has asked us to stop may not wait for the rest
  pack
  timeout --kill-after=2 $((closing * slower)) bash -c 'bench report --summary "$work/report.md"' >"$work/logs/report.log" 2>&1 ||
    echo "| report | failed | |" >>"$work/stages.md"
  pack
  [ -n "$server" ] && kill "$server"
  echo "$out/fluxfast-gpu-$part.md"
}

stop() { # SIGNAL
  trap '' TERM INT HUP
  echo "| stopped by SIG$1 | | |" >>"$work/stages.md"
  if [ -n "$child" ]; then
    # timeout hands it on to all that the stage has started
    kill -TERM "$child"
    wait "$child"
  fi
  exit 143
}

: >"$work/stages.md"
trap finish EXIT
for signal in TERM INT HUP; do trap "stop $signal" "$signal"; done
for name in $stages; do run "$name"; done
exit 0
