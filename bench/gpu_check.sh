#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can say about glmx, in nine minutes at most, from a bare checkout and offline.
#
#   bench/gpu_check.sh [--out DIR] [--quick] [--only STAGE,...] [--commit SHA]
#
# It installs glmx as a user would, runs tests/gpu, asks compute-sanitizer, measures the card's ceilings and the benchmarks of bench/gpu,
# and writes DIR/gpu_check.jsonl (default: build/gpu_check) and one table. Stages are listed in bench/gpu/check.py.
# Needs on the PATH: python3 with torch for CUDA, setuptools, pybind11, cmake, ninja, pytest; nvcc; nvidia-smi. Changes no setting of the card.
set -u
cd "$(dirname "$0")/.." || exit 2
for tool in nvidia-smi nvcc "${PYTHON:=python3}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "gpu_check: $tool is not on the PATH: this check needs a machine with an NVIDIA GPU and the CUDA toolkit" >&2
    exit 2
  fi
done
exec "$PYTHON" bench/gpu/check.py "$@"
