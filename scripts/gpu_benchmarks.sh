#!/usr/bin/env bash
# Check and measure everything that wants a GPU, in about an hour on one H100: numbers as JSON and pictures in benchmarks/results/gpu.
#     bash scripts/gpu_benchmarks.sh
# What has its JSON already is not measured again. A part that fails is named at the end, and the others run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/env.sh --test) || exit 1  # --test: pytorch-fid, which fid is compared with
out=benchmarks/results/gpu
failed=()
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_benchmarks: no CUDA GPU here" >&2
    exit 2
fi
mkdir -p "$out"

measure() {  # NAME MODULE [arguments]
    local name=$1 module=$2
    shift 2
    if [ -f "$out/$name.json" ]; then return; fi
    printf '\n== %s\n' "$name"
    "$PYTHON" -m "benchmarks.$module" "$@" --json "$out/$name.json" || failed+=("$name")
}

measure gpu_check gpu_check  # first: what is wrong here need not be measured

# Two arms at a time: each holds 12 GB of weights and moments, and unmasked activations at batch 128 are 38 GB compiled, 57 eager.
# Kernels are deterministic, as in training.
measure train_xl2_plain_32 train --size XL/2 --batchsize 32 --arms plain ours --rounds 10
measure train_xl2_plain_128 train --size XL/2 --batchsize 128 --arms plain ours --rounds 10
measure train_xl2_masked_32 train --size XL/2 --batchsize 32 --arms compiled unmasked --rounds 10 --set train.compile=true
measure train_xl2_masked_128 train --size XL/2 --batchsize 128 --arms compiled unmasked --rounds 10 --set train.compile=true
measure train_xl2_dit_32 train --size XL/2 --batchsize 32 --arms compiled dit --rounds 10 --set train.compile=true
measure train_xl2_dit_128 train --size XL/2 --batchsize 128 --arms compiled dit --rounds 10 --set train.compile=true
measure train_xl2_any_kernel_32 train --size XL/2 --batchsize 32 --arms ours compiled --rounds 10 --set train.deterministic=false
measure train_xl2_any_kernel_128 train --size XL/2 --batchsize 128 --arms ours compiled --rounds 10 --set train.deterministic=false
measure train_xl2_512px_masked train --size XL/2 --batchsize 32 --arms compiled unmasked --rounds 10 --set train.compile=true model.in_size=64
measure train_xl2_512px_dit train --size XL/2 --batchsize 32 --arms compiled dit --rounds 10 --set train.compile=true model.in_size=64
measure train_xl2_checkpointing_32 train --size XL/2 --batchsize 32 --arms ours --rounds 10 --set train.activation_checkpointing=true
measure train_xl2_checkpointing_128 train --size XL/2 --batchsize 128 --arms ours --rounds 10 --set train.activation_checkpointing=true
measure train_s2_bf16 train --size S/2 --batchsize 256 --rounds 20
measure train_s2_fp16 train --size S/2 --amp fp16 --batchsize 256 --rounds 20
measure sample_xl2_bf16 sample --size XL/2 --batchsize 32 --rounds 2
measure sample_xl2_fp32 sample --size XL/2 --amp no --batchsize 32 --rounds 2
measure sample_xl2_tf32 sample --size XL/2 --amp no --batchsize 32 --rounds 2 --set sample.tf32=true
measure update_xl2 update --size XL/2 --batchsize 32 --rounds 5
measure extraction extraction --encode 200 --batch 64
measure fid fid
measure loader loader
"$PYTHON" -m benchmarks.plot "$out"/train_xl2_{plain,masked,dit}_{32,128}.json --output "$out/train_xl2.png" || failed+=(plot)
"$PYTHON" -m benchmarks.plot "$out"/train_xl2_512px_{masked,dit}.json --output "$out/train_xl2_512px.png" || failed+=(plot_512px)
"$PYTHON" -m benchmarks.plot "$out"/train_s2_{bf16,fp16}.json --output "$out/train_s2.png" || failed+=(plot_s2)
"$PYTHON" download_assets.py --name fashion-mnist && "$PYTHON" -m experiments.run --setting gpu && "$PYTHON" -m experiments.costs --setting gpu || failed+=(experiments)

if ((${#failed[@]})); then
    echo "gpu_benchmarks: failed: ${failed[*]}" >&2
    exit 1
fi
echo "gpu_benchmarks: everything is in $out and experiments/results/gpu"
