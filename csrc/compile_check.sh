#!/usr/bin/env bash
# Compiles the GPU kernels alone, without a GPU, for every device they are meant for: with nvcc for
# sm_80, sm_86, sm_89 and sm_90, with hipcc for gfx90a. Says which compiler is missing and goes on
# without it. Fails on an error, a warning, or a register spilled to memory. NVCC and HIPCC may name
# the compilers; then they must be there.
set -euo pipefail
cd "$(dirname "$0")"

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=0

# prints the compiler that the environment names, or else the first usual one that is there
find_compiler() {
  local name=$1 asked=$2 place
  shift 2
  if [[ -n "$asked" ]]; then
    command -v "$asked" || { echo "$name=$asked was not found" >&2; exit 1; }
    return
  fi
  for place in "$@"; do
    command -v "$place" && return
  done
  return 0
}

# arguments: the target's name, then the command
check() {
  local target=$1 source
  shift
  for source in gpu/*.cu; do
    if ! "$@" -std=c++17 -O3 -I. -c "$source" -o "$out/object" >"$out/log" 2>&1; then
      echo "$target: $source does not compile"
      cat "$out/log"
      failed=1
    elif grep -E '[1-9][0-9]* bytes spill|Spill: *[1-9]' "$out/log"; then
      echo "$target: $source spills registers"
      failed=1
    else
      echo "$target: $source compiles"
    fi
  done
}

nvcc=$(find_compiler NVCC "${NVCC:-}" nvcc /usr/local/cuda/bin/nvcc)
if [[ -n "$nvcc" ]]; then
  for arch in sm_80 sm_86 sm_89 sm_90; do
    check "$arch" "$nvcc" -arch="$arch" --fmad=false -Werror all-warnings -Xptxas -v
  done
else
  echo "nvcc was not found: nothing was compiled for sm_80, sm_86, sm_89, sm_90"
fi

hipcc=$(find_compiler HIPCC "${HIPCC:-}" hipcc /opt/rocm/bin/hipcc)
if [[ -n "$hipcc" ]]; then
  export HIP_PLATFORM=amd
  check gfx90a "$hipcc" -x hip --offload-arch=gfx90a -ffp-contract=off -Wall -Wextra -Werror \
    -Rpass-analysis=kernel-resource-usage
else
  echo "hipcc was not found: nothing was compiled for gfx90a (Debian has it: apt-get install hipcc)"
fi

exit "$failed"
