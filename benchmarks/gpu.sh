#!/usr/bin/env bash
# The benchmarks on one GPU, without Ray: from the repository root, with torch, transformers, pyarrow, PyYAML, rich and matplotlib installed.
#     bash benchmarks/gpu.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
export PYTHONPATH="$PWD"
large=(--vocab 32000 --seq-len 2048 --precision bf16 --output "$out")
# Targets on one H200: 370m at least 45 % MFU, 1.3b at least 50 %.
python benchmarks/throughput.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 16 --target-batch 4
python benchmarks/throughput.py --preset 1.3b "${large[@]}" --global-batch 16 --micro-batch 8 --target-batch 4 --rounds 2
python benchmarks/loop_overhead.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 8 --rounds 3
python benchmarks/bilevel.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 8 --target-batch 8 \
    --tables cost memory growth --rounds 4 --runs 3
# Its reference computes in fp32 and takes four forwards for each group of target sequences: shorter, and fewer of them.
python benchmarks/bilevel.py --preset 370m "${large[@]}" --global-batch 32 --micro-batch 4 --target-batch 8 \
    --seq-len 1024 --tables fidelity --points 10 20 --target-pool 64
python benchmarks/bilevel.py --preset 1.3b "${large[@]}" --global-batch 16 --micro-batch 4 --target-batch 4 \
    --tables cost memory --settings default fast central one_sided ghost --rounds 2 --runs 2
python benchmarks/memory_model.py --preset 370m "${large[@]}" --global-batch 8 --micro-batch 8 --target-batch 4
# Where an audited step holds LM and optimizer twice, 1.3b does not fit 80 GB.
python benchmarks/memory_model.py --preset 1.3b "${large[@]}" --global-batch 4 --micro-batch 4 --target-batch 4 \
    --cases none selective full "full, chunks" central
python benchmarks/bilevel.py --preset quickstart --output "$out" --tables peers
