#!/usr/bin/env bash
# What the GPU machine of bench/gpu.sh lacks, as wheels in a folder: bench/wheels.sh FOLDER (for example .wheels, which git ignores)
#
# For Python 3.12 on Linux, x86-64. bitsandbytes keeps its one library for CUDA 13: all of them would be ten times as large.
# Environment: NATIVE=python3.12  also builds the native module fluxfast._C for that Python, which needs its headers and a compiler.
#              WARM=python        also compiles what gpu.sh's prewarm would, by that Python's Triton, which must be of the machine's
#                                 version and build, for TARGET (default: sm_90)
set -euo pipefail
folder=$(mkdir -p "${1:?usage: bench/wheels.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# the peers and what they need; what fluxfast's own settings are made with
names="diffusers importlib-metadata optimum-quanto sdnq pydantic pydantic-core annotated-types typing-inspection bitsandbytes lycoris-lora toml"
platforms=""
for version in 2_28 2_27 2_24 2_17; do platforms="$platforms --platform manylinux_${version}_x86_64"; done
# shellcheck disable=SC2086
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
  --platform manylinux2014_x86_64 --dest "$folder" $names

"$PYTHON" - "$folder" <<'PYTHON'
"""bitsandbytes' wheel without the libraries of other devices, and without their lines in its RECORD."""
import re, sys, zipfile
from pathlib import Path

for wheel in Path(sys.argv[1]).glob("bitsandbytes-*.whl"):
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as made:
        unwanted = {
            name for name in source.namelist()
            if re.search(r"libbitsandbytes_.*\.so$", name) and not name.endswith(("_cuda130.so", "_cpu.so"))
        }
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in unwanted).encode()
            if name not in unwanted:
                made.writestr(source.getinfo(name), content)
        assert any(name.endswith("_cuda130.so") for name in made.namelist()), f"{wheel}: no library for CUDA 13"
    slim.replace(wheel)
PYTHON

if [ -n "${NATIVE:-}" ]; then
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  "$NATIVE" -m venv "$build/venv"
  "$build/venv/bin/python" -m pip install --quiet "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
  FLUXFAST_REQUIRE_EXT=1 "$build/venv/bin/python" setup.py --quiet build_ext --build-temp "$build/temp" --build-lib "$build/lib"
  cp "$build"/lib/fluxfast/_C*.so "$folder/"
fi
if [ -n "${WARM:-}" ]; then
  # gpu.sh's own folder, because Triton's cache holds absolute paths
  cache=/tmp/fluxfast-gpu/triton
  rm -rf "$cache"
  PYTHONPATH=$PWD:$PWD/kernels:$PWD/bench TRITON_CACHE_DIR=$cache "$WARM" -c \
    'import sys; from fluxfast_bench.main import main; sys.exit(main())' \
    prewarm --target "${TARGET:-sm_90}" --results "$(mktemp -d)"
  "$WARM" -c 'from triton.runtime.cache import triton_key; print(triton_key())' >"$folder/triton.key"
  tar -C "$(dirname "$cache")" -cJf "$folder/triton.tar.xz" "$(basename "$cache")"
fi
du -sh "$folder"
