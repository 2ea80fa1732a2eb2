#!/usr/bin/env bash
# Measures the flow and a training run on one GPU, in at most 8 minutes and without a network, and writes one page of
# Markdown, for RESULTS.md:
#
#   bash benchmarks/gpu.sh [PAGE]              # default: gpu.md in a new temporary folder
#
# From a checkout whose dependencies are installed. With torch and safetensors alone the parts on the flow run, and the
# page names those that did not. Each part has a time limit, and one that fails does not stop the others.
#
#   DEVICE=cpu bash benchmarks/gpu.sh [PAGE]   # a dry try of this file on a CPU: tiny sizes, figures that mean nothing
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

device=${DEVICE:-cuda}
python=${PYTHON:-python}
folder=$(mktemp -d)
page=${1:-$folder/gpu.md}
parts=$folder/parts.md
summary=$folder/summary.md
failed=0
touch "$parts" "$summary"

# The sizes, and the limits in seconds: their sum is 470.
if [ "$device" = cuda ]; then
    tests=45 speed=45 largest=35 backprop=40 step=45 precision=35 checkpoint=20 train=205
    speed_sizes=(--seconds 1)
    largest_sizes=(--seconds 18)
    backprop_sizes=(--depths 34 74 --hidden 48 --batch 32 --resolution 32 --repeat 3)
    step_sizes=(--tables small eiw --seconds 8)
    checkpoint_sizes=(--megabytes 400 1600 --rounds 3)
    train_sizes=(model.preset=eiw-small model.shuffle=order model.backprop=auto train.precision=bf16 train.lr=1.0e-3
        train.global_batch=256 train.micro_batch=256 train.max_hours=0.05 workers.gpus=1 workers.cpus=4 data.loader_workers=2 eval.every=1000)
else
    tests=240 speed=120 largest=120 backprop=120 step=240 precision=240 checkpoint=120 train=240
    speed_sizes=(--presets eiw-tiny --batch 2 --seconds 0.1)
    largest_sizes=(--seconds 1)
    backprop_sizes=()
    step_sizes=(--tables small --seconds 1 --batch 2)
    checkpoint_sizes=(--megabytes 4 --rounds 1)
    train_sizes=(model.shuffle=order train.global_batch=8 train.micro_batch=8 train.max_hours=0.004 workers.gpus=0
        workers.cpus=1 eval.every=1000)
fi

# part TITLE SECONDS NEEDS GOOD COMMAND...: runs a part. NEEDS: modules without which it is skipped; GOOD: an exit code
# that is good besides 0.
part() {
    local title=$1 seconds=$2 needs=$3 good=$4 output=$folder/output began=$SECONDS code how
    shift 4
    for module in $needs; do
        if ! "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)"; then
            echo "| $title | skipped: $module is not installed | |" >>"$summary"
            echo "$title: skipped, $module is not installed"
            return
        fi
    done
    echo "$title ..."
    timeout --kill-after=10 "$seconds" "$@" >"$output" 2>"$output.errors" </dev/null
    code=$?
    how="done"
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        how="**stopped after $seconds s**"
    elif [ $code -ne 0 ] && [ $code -ne "$good" ]; then
        how="**failed with exit code $code**"
    fi
    [ "$how" = "done" ] || failed=1
    echo "$title: $how, $((SECONDS - began)) s"
    echo "| $title | $how | $((SECONDS - began)) |" >>"$summary"
    {
        printf '\n## %s\n\n    ' "$title"
        printf '%s ' "${@//$folder/FOLDER}"
        printf '\n\n'
        if grep -q '^|' "$output"; then
            cat "$output"
        else
            tail -n 30 "$output" | sed 's/^/    /'
        fi
        [ "$how" = "done" ] || { echo && tail -n 15 "$output.errors" | sed 's/^/    /'; }
    } >>"$parts"
}

part "Tests of the flow" $tests "pytest hypothesis" 0 env EIWTRAIN_TEST_DEVICE="$device" \
    "$python" -m pytest -q -p no:cacheprovider tests/flow/test_flow_on_gpu.py
part "Speed of the presets, bfloat16" $speed "" 0 "$python" -m benchmarks.gpu speed --device "$device" "${speed_sizes[@]}"
part "Largest batch and depth" $largest "" 0 "$python" -m benchmarks.gpu largest --device "$device" "${largest_sizes[@]}"
part "Memory and time against depth, bfloat16" $backprop "pydantic yaml" 0 \
    "$python" -m benchmarks.backprop --model eiw --quick --dtype bfloat16 --device "$device" "${backprop_sizes[@]}"
part "A step beside other libraries, bfloat16" $step "pydantic yaml deepspeed" 0 \
    "$python" -m benchmarks.step --dtype bfloat16 --device "$device" "${step_sizes[@]}"
part "Drift and errors of gradients" $precision "pydantic PIL skimage" 0 \
    "$python" -m benchmarks.precision --quick --device "$device"
part "What a checkpoint holds up" $checkpoint "fsspec" 0 \
    "$python" -m benchmarks.checkpoint --device "$device" --ranks 1 --folder "$folder" "${checkpoint_sizes[@]}"
# 75: it stopped at train.max_hours, as it was asked to
part "Training EIW-Flow for three minutes" $train "ray deepspeed mlflow" 75 env EIWTRAIN_STORAGE="$folder/runs" \
    EIWTRAIN_DATA="$folder/data" "$python" -m eiwtrain.run configs/quickstart.yaml run.name=gpu workers.min=1 \
    train.max_steps=1000000 train.log_every_seconds=15 "${train_sizes[@]}"

{
    echo "# On a GPU"
    echo
    "$python" - "$device" <<'PYTHON'
import os
import platform
import sys

import torch

if sys.argv[1] == "cuda" and torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    print(f"{about.name}, {about.total_memory / 1e9:.0f} GB, compute capability {about.major}.{about.minor};", end=" ")
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()};", end=" ")
else:
    print(f"No GPU was used ({sys.argv[1]});", end=" ")
print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores.")
PYTHON
    command -v nvidia-smi >/dev/null && echo "Driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)."
    echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%d), $SECONDS s in all:"
    printf '\n    bash benchmarks/gpu.sh\n\n'
    echo "| part | how it ended | s |"
    echo "|---|---|--:|"
    cat "$summary" "$parts"
} >"$page"
echo "the page is $page"
exit $failed
