#!/usr/bin/env bash
# On a machine with a GPU, and no network: first checks that the kernels are right there, then measures them, within ten
# minutes, and writes benchmarks/results/kernels-<gpu>.json. Needs torch, triton, pytest and pytest-benchmark.
#
#   benchmarks/gpu_check.sh [OUT_FOLDER]     copies the result there too
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-}
export PYTHONPATH=$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
raw=$(mktemp --suffix .json)
trap 'rm -f "$raw"' EXIT

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name())'
timeout 180 "$python" -m pytest tests/kernels/test_gpu.py -m gpu -q -x -p no:cacheprovider

"$python" benchmarks/host_time.py

# In order of importance, each with its own time, so that a slow one costs only itself; every part leaves its result.
measure() {
  timeout "$1" "$python" -m pytest benchmarks/bench_kernels.py -q -p no:cacheprovider --benchmark-enable \
      --benchmark-json="$raw" --benchmark-columns=median -m "" -k "$2" &&
    "$python" benchmarks/report_kernels.py collect --add "$raw" || echo "gpu_check: not measured: $2" >&2
}
measure 60 "noise_pred_loss"
measure 150 "masked_adamw"
measure 60 "lpips"
measure 50 "accumulate_saliency or gradient_dots or candidates"
measure 60 "saliency_mask"
"$python" benchmarks/report_kernels.py table
if [[ -n $out ]]; then cp benchmarks/results/kernels-*.json "$out"; fi
