#!/usr/bin/env bash
# The benchmarks on one GPU, without Ray: from the repository root, with torch, transformers, pyarrow and PyYAML installed.
#     bash benchmarks/gpu.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
export PYTHONPATH="$PWD"
large=(--vocab 32000 --seq-len 2048 --precision bf16 --output "$out")
python benchmarks/loop_overhead.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 8 --rounds 3
python benchmarks/bilevel_overhead.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 8 --target-batch 8 --rounds 3
python benchmarks/bilevel_overhead.py --preset 1.3b "${large[@]}" --global-batch 16 --micro-batch 4 --target-batch 4 --rounds 2
