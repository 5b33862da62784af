"""Time, memory, energy and cost of a training run on GPUs, by arithmetic: no GPU needed, nothing measured here.

    python -m benchmarks.estimate --config configs/train/maskdit-latent-imagenet.yaml --gpus 8 --gpu h100
    python -m benchmarks.estimate --measured benchmarks/results/train_cpu_*.json

A step is its matrix products, its passes over activations, its optimizer's passes over the weights, its kernel launches and its
exchange of gradients, each at the speed that the GPU reaches in practice. Their sum is the limit: no run is faster. What runs reach
of it is known from the paper's six bars on 8 A100 (`--paper` compares them): 0.56 to 0.76, and the expected time is at their mean.
`--measured` does the same arithmetic for steps that benchmarks.train has timed, with the speeds of products and memory of the same run.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import model_flops, print_table
from utils.cli import UserError, run


class Gpu(NamedTuple):
    """Data sheet: dense matrix products with float32 sums, memory, board power; GB/s of one direction between GPUs of a node."""

    half_tflops: float
    tf32_tflops: float
    memory_gb: float
    memory_tb_per_s: float
    watts: int
    link_gb_per_s: float


GPUS = {  # NVIDIA's data sheets: A100 80GB SXM4, H100 SXM5, H200 SXM5, L40S; Ada (4090) and Ampere GA102 (3090) architecture papers
    "a100": Gpu(312, 156, 80, 2.04, 400, 300),
    "h100": Gpu(989, 494.5, 80, 3.35, 700, 450),
    "h200": Gpu(989, 494.5, 141, 4.8, 700, 450),
    "l40s": Gpu(362, 183, 48, 0.864, 350, 32),
    "4090": Gpu(165, 82.6, 24, 1.008, 450, 32),
    "3090": Gpu(71, 35.6, 24, 0.936, 350, 32),
}
PRODUCT_SHARE = 790 / 989   # measured on an H100: large bf16 products, of the data sheet's number
MEMORY_SHARE = 3.0 / 3.35   # likewise: large copies
LINK_SHARE = 0.8            # assumed: NCCL's all-reduce of large buckets, of the link's number
NODE_NETWORK_GB_PER_S = 400  # assumed: eight 400 Gbit/s adapters in a node of eight GPUs
LAUNCH_S = 6e-6             # 25 ms for the 4,200 kernels of an eager step
KERNELS_PER_BLOCK = {"eager": 96, "compiled": 32, "graphs": 1}  # forward and backward; eager counted, the others assumed
# Bytes kept for the backward pass per token, block and unit of width (a test counts them).
ACTIVATION_BYTES = {"no": 80, "fp16": 48, "bf16": 48}
COMPILED_ACTIVATION_BYTES = {"no": 68, "fp16": 36, "bf16": 36}
PASSES = 4.63               # over eager's kept activations in one step, forward and backward
COMPILED_SHARE = 2 / 3      # of these passes, left by fused kernels
OPTIMIZER_BYTES = {"fused": 52, "separate": 68}  # moved per weight by fused AdamW and foreach EMA, and by unfused ones
STATE_BYTES = 4 + 8 + 4     # per weight: itself, AdamW's two moments, EMA
GRADIENT_BYTES = 4          # per weight
CONTEXT_GB = 1.0            # CUDA context, cuBLAS workspace, fragmentation
REACHED = 0.64              # of the limit, by the paper's runs: see paper_rows

# Steps/s of the paper's Figure on 8 A100, XL/2 at 256 px (read off bars, 3 %) and GB per GPU: (masked, decoder, amp, global batch)
PAPER_BARS = {
    ("DiT TF32", False, "no", 256): (2.25, 39), ("MaskDiT TF32", True, "no", 256): (4.35, 28), ("MaskDiT AMP", True, "fp16", 256): (5.70, 26),
    ("DiT TF32", False, "no", 1024): (0.62, 109), ("MaskDiT TF32", True, "no", 1024): (1.35, 65), ("MaskDiT AMP", True, "fp16", 1024): (2.16, 49),
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Any key of the config can be given as key=value, for example train.batchsize=32.")
    parser.add_argument("--config", help="YAML file of a training run (default: the defaults, XL/2 half masked)")
    parser.add_argument("--gpu", default="h100", help=f"one or several of {','.join(GPUS)} (default h100)")
    parser.add_argument("--gpus", default="8", help="how many in all, one or several numbers, as in 8,64 (default 8)")
    parser.add_argument("--price", type=float, default=2.0, help="dollars per GPU and hour (default 2, an assumption: set your own)")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--paper", action="store_true", help="compare with the paper's measurements on 8 A100 instead")
    compared.add_argument("--measured", nargs="+", type=Path, metavar="FILE", help="compare with these JSON files of benchmarks.train instead")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser.parse_known_args(argv)


# ---- work

def activation_units(model, mask_ratio):
    """Tokens x width, summed over the blocks of encoder and decoder: what activations and passes over them are counted in."""
    from models.maskdit import parse_model_type
    from models.masking import count_kept

    size, patch_size = parse_model_type(model.model_type)
    tokens = (model.in_size // patch_size) ** 2
    units = (model.depth or size.depth) * (model.width or size.width) * count_kept(tokens, mask_ratio)
    return units + (model.decoder_depth * model.decoder_width * tokens if model.use_decoder else 0)


@functools.cache
def count_weights(model):
    """(trained weights, transformer blocks) of a ModelConfig."""
    import torch

    from sampling.sample import build_model

    with torch.device("meta"):
        net = build_model(model)
    blocks = len(net.model.blocks) + (len(net.model.decoder_blocks) if model.use_decoder else 0)
    return sum(p.numel() for p in net.parameters() if p.requires_grad), blocks


def mean_mask_ratio(train):
    """Mean over the run, which schedules change."""
    from training.schedules import mask_ratio

    return sum(mask_ratio(train, (i + 0.5) / 100) for i in range(100)) / 100


# ---- time

class Estimate(NamedTuple):
    """Seconds of one step on one GPU, and their sum as far as one part does not hide behind another."""

    products: float
    passes: float
    optimizer: float
    launches: float
    exchange: float  # of gradients, all of it; as much as the backward pass takes is hidden

    @property
    def limit(self):
        computed = self.products + self.passes
        hidden = 2 / 3 * computed
        return max(computed + self.optimizer, self.launches) + max(0.0, self.exchange - hidden)


def step_time(config, gpu, num_gpus, optimizer="fused"):
    """Estimate of one step of `config` on each of num_gpus GPUs; train.batchsize is per GPU."""
    peak = (gpu.tf32_tflops if config.train.amp == "no" else gpu.half_tflops) * 1e12 * PRODUCT_SHARE
    own_work = step_parts(config, peak, gpu.memory_tb_per_s * 1e12 * MEMORY_SHARE, optimizer)
    return own_work._replace(exchange=exchange_time(count_weights(config.model)[0], gpu, num_gpus))


def step_parts(config, peak, bandwidth, optimizer="fused", launch_s=LAUNCH_S):
    """Estimate of one step of `config` by one process. peak: FLOP/s of matrix products; bandwidth: bytes/s of passes over memory."""
    train, model = config.train, config.model
    ratio = mean_mask_ratio(train)
    weights, blocks = count_weights(model)
    recomputed = 4 / 3 if train.activation_checkpointing else 1.0
    flops = recomputed * train.batchsize * model_flops(model, ratio, training=True)
    passes = PASSES * (COMPILED_SHARE if _compiled(train) else 1.0)
    moved = recomputed * passes * train.batchsize * activation_units(model, ratio) * ACTIVATION_BYTES[train.amp]
    mode = "graphs" if train.cuda_graphs else "compiled" if _compiled(train) else "eager"
    kernels = blocks * KERNELS_PER_BLOCK[mode] * train.grad_accum + (750 if optimizer == "separate" else 50)
    return Estimate(flops / peak, moved / bandwidth, weights * OPTIMIZER_BYTES[optimizer] / bandwidth, kernels * launch_s, exchange=0.0)


def _compiled(train):
    return train.compile is not False  # auto compiles on all of these GPUs


def exchange_time(weights, gpu, num_gpus):
    """Seconds of one all-reduce of float32 gradients in a ring: each GPU sends 2 (n - 1) / n of them."""
    link = gpu.link_gb_per_s if num_gpus <= 8 else min(gpu.link_gb_per_s, NODE_NETWORK_GB_PER_S)
    return 2 * (num_gpus - 1) / num_gpus * 4 * weights / (link * 1e9 * LINK_SHARE)


# ---- memory

def memory_gb(config, gradients_stay):
    """GB (1e9 bytes) of one GPU in training: weights with all that belongs to them, activations of one round, and the context.

    In the backward pass gradients come as activations go, so that the larger of the two counts; but both do if the gradients stay
    through the forward pass, as in DDP's buckets and between the rounds of an accumulated batch.
    """
    train, model = config.train, config.model
    weights, blocks = count_weights(model)
    images = train.batchsize // train.grad_accum
    ratio = train.mask_ratio_min if train.mask_ratio_varies else train.mask_ratio  # the most tokens of the run
    activations = activation_units(model, ratio) * (COMPILED_ACTIVATION_BYTES if _compiled(train) else ACTIVATION_BYTES)[train.amp]
    if train.activation_checkpointing:  # the input of every block, float32, and all of one block
        activations = 4 * activation_units(model, ratio) + activations / blocks
    low_precision_copy = 0 if train.amp == "no" else 2  # made by autocast, kept until the backward pass
    kept, gradients = images * activations + weights * low_precision_copy, weights * GRADIENT_BYTES
    both = kept + gradients if gradients_stay or train.grad_accum > 1 else max(kept, gradients)
    return (weights * STATE_BYTES + both) / 1e9 + CONTEXT_GB


# ---- reports

def run_row(config, name, num_gpus, price):
    """Table row of a whole run."""
    gpu, train = GPUS[name], config.train
    parts = step_time(config, gpu, num_gpus)
    seconds = parts.limit / REACHED
    hours = train.max_num_steps * seconds / 3600
    memory = memory_gb(config, gradients_stay=num_gpus > 1)
    return {"gpus": f"{num_gpus} {name}", "batch": train.batchsize * num_gpus, "limit steps/s": 1 / parts.limit, "steps/s": 1 / seconds,
            "img/s per GPU": train.batchsize / seconds, "GB": memory, "fits": "yes" if memory < gpu.memory_gb * 2**30 / 1e9 else "no",
            "hours": hours, "MWh": hours * num_gpus * gpu.watts / 1e6, "$": hours * num_gpus * price,
            "ms products": 1e3 * parts.products, "ms passes": 1e3 * parts.passes, "ms optimizer": 1e3 * parts.optimizer,
            "ms launches": 1e3 * parts.launches, "ms exchange": 1e3 * parts.exchange}


def paper_config(decoder, amp, batch):
    from utils.config import load_config

    return load_config(overrides=[f"model.use_decoder={decoder}", f"train.mask_ratio={0.5 if decoder else 0}",
                                  f"train.amp={amp}", f"train.batchsize={batch // 8}", "train.compile=false"])


def paper_rows():
    """The paper's bars beside this arithmetic, eager and with unfused AdamW and EMA, as that code ran."""
    rows = []
    for (name, decoder, amp, batch), (steps, gigabytes) in PAPER_BARS.items():
        config = paper_config(decoder, amp, batch)
        limit = 1 / step_time(config, GPUS["a100"], 8, optimizer="separate").limit
        memory = memory_gb(config, gradients_stay=True)
        rows.append({"run": name, "batch": batch, "steps/s": steps, "limit": limit, "reached": steps / limit,
                     "expected": limit * REACHED, "error": limit * REACHED / steps - 1, "GB": float(gigabytes), "GB here": memory,
                     "GB error": memory / gigabytes - 1})
    return rows


def measured_rows(paths):
    """Steps that benchmarks.train has timed beside this arithmetic, with what products and memory gave in the same run."""
    rows = []
    for path in paths:
        try:
            report = json.loads(path.read_text())
            if not report["rows"]:
                raise UserError("it has no rows")
            rows += [_measured_row(row, launch_s=0.0 if report["device"].startswith("CPU") else LAUNCH_S) for row in report["rows"]]
        except OSError as error:
            raise UserError(f"--measured {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--measured {path}: wanted a file that benchmarks.train wrote with --json ({error!r})") from error
    return rows


def _measured_row(row, launch_s):
    from utils.config import from_dict

    config = from_dict(row["config"])
    optimizer = "separate" if row["arm"] == "plain" else "fused"
    limit = step_parts(config, row["peak TFLOP/s"] * 1e12, row["peak GB/s"] * 1e9, optimizer, launch_s).limit
    seconds = row["ms/step"]["median"] / 1000
    memory = memory_gb(config, gradients_stay=row["arm"] == "plain") - CONTEXT_GB
    return {"model": row["model"], "masked": row["masked"], "amp": row["amp"], "batch": row["batch"], "arm": row["arm"],
            "ms/step": 1000 * seconds, "limit": 1000 * limit, "reached": limit / seconds, "expected": 1000 * limit / REACHED,
            "error": limit / REACHED / seconds - 1, "GB": row["GB"], "GB here": row["GB"] and memory,
            "GB error": row["GB"] and memory / row["GB"] - 1}


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def _names(text):
    names = text.lower().split(",")
    for name in names:
        if name not in GPUS:
            raise UserError(f"--gpu {name} is unknown; known are {', '.join(GPUS)}")
    return names


def _counts(text):
    counts = text.split(",")
    if not all(count.isdigit() and int(count) for count in counts):
        raise UserError(f"--gpus {text}: wanted numbers above 0, as in 8 or 8,64,512")
    return [int(count) for count in counts]


def report(args, overrides):
    from utils.config import load_config

    if args.paper or args.measured:
        rows = paper_rows() if args.paper else measured_rows(args.measured)
        print_table(rows, [key for key in rows[0] if any(row[key] is not None for row in rows)])
        print(f"reached of the limit, geometric mean: {geometric_mean([row['reached'] for row in rows]):.3f}")
        return rows
    config = load_config(args.config, overrides)
    rows = [run_row(config, name, count, args.price) for name in _names(args.gpu) for count in _counts(args.gpus)]
    print(f"{config.model.model_type}, {config.model.in_size}x{config.model.in_size} latents, mask ratio "
          f"{mean_mask_ratio(config.train):.2f}, precision {config.train.amp}, {config.train.max_num_steps:,} steps")
    print_table(rows, [key for key in rows[0] if not key.startswith("ms ")])
    print()
    print_table(rows, ["gpus"] + [key for key in rows[0] if key.startswith("ms ")])
    print(f"\nlimit: the roofline. steps/s, hours, MWh (at full board power) and $: at {REACHED} of it, as the paper's runs reached; "
          f"{args.price:g} $ per GPU and hour.")
    return rows


def main():
    args, overrides = parse_arguments()
    rows = report(args, overrides)
    if args.json is not None:
        from benchmarks.common import write_json
        from utils import distributed

        write_json(args.json, distributed.device(), rows=rows)


if __name__ == "__main__":
    run(main)
