"""Training steps per second: the plain path beside this project's, the same weights, batch and precision.

    python -m benchmarks.train --sizes S/2 B/2 --amp bf16 no --json benchmarks/results/train_cpu.json

An arm is a whole step on stored moments: latents drawn, labels dropped, loss, backward, AdamW, EMA. `plain` is
benchmarks/reference.py; `ours` is `training.loop.train_step`; `compiled` with compiled blocks, as on a GPU by itself; `unmasked` and
`dit` are `ours` without masking and without masking and decoder (the paper's baseline), compiled with --set train.compile=true;
`no_...` is `ours` without one of its speed-ups (train.switch_off). All arms are in memory together: on a GPU that is too small for
that, give fewer. Utilisation is model FLOPs over time over the best matrix product of the same run. GB is the most that an arm's tensors
take at once, weights, moments and EMA included; on CPUs it wants two warm-up rounds.
"""

import argparse
import gc
import itertools

from benchmarks.common import (add_common_arguments, alternate, gemm_arm, memory_arm, model_flops, print_table, scaled,
                               speedup, spread, start, watch_memory, write_json)
from utils.cli import run
from utils.config import to_dict

# The speed-ups that one process can do with and without.
WITHOUT = ("no_fused_adamw", "no_foreach_ema")
ARMS = ("plain", "ours", "compiled", "unmasked", "dit", *WITHOUT)
COLUMNS = ("model", "masked", "amp", "batch", "arm", "ms/step", "img/s", "TFLOP/s", "of peak", "x plain", "GB", "first step s")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S/2"], help="of the paper's table, as in S/2 B/2 XL/2")
    parser.add_argument("--mask_ratio", nargs="+", type=float, default=[0.5])
    parser.add_argument("--amp", nargs="+", default=["bf16"], choices=("no", "bf16", "fp16"))
    parser.add_argument("--batchsize", nargs="+", type=int, default=[8])
    parser.add_argument("--in_size", type=int, default=32, help="of the latents: 32 for 256 pixels, 64 for 512 (default 32)")
    parser.add_argument("--arms", nargs="+", default=["plain", "ours", "compiled"], choices=ARMS)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all arms but plain")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic kernels, the default of training")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings of the config, as model.depth=2")
    add_common_arguments(parser, rounds=5)
    return parser.parse_args(argv)


def case_config(args, size, ratio, amp, batch, arm):
    from utils.config import load_config

    masked = {"unmasked": 0.0, "dit": 0.0}.get(arm, ratio)
    off = arm.removeprefix("no_") if arm.startswith("no_") else ""
    return load_config(overrides=[
        f"model.model_type=DiT-{size}", f"model.in_size={args.in_size}", f"train.mask_ratio={masked}", f"train.amp={amp}",
        f"train.batchsize={batch}", f"model.use_decoder={arm != 'dit'}", f"train.compile={arm == 'compiled'}",
        f"train.activation_checkpointing={args.checkpointing}", f"train.switch_off=[{off}]", *args.set])


def make_arm(config, arm, device):
    """A function that does one training step of `arm`."""
    import torch

    from benchmarks.reference import PlainTraining
    from models import sample_moments
    from sampling.sample import build_model
    from utils.precision import compile_options, use_compile
    from training.loop import TrainState, make_loss, train_step

    train, model = config.train, config.model
    torch.manual_seed(0)
    net = build_model(model, train).to(device)
    moments = torch.randn(train.batchsize, 2 * model.in_channels, model.in_size, model.in_size, device=device)
    labels = torch.randint(model.num_classes, (train.batchsize,), device=device)
    generator = torch.Generator(device)
    if arm == "plain":
        training = PlainTraining(net, train, device)
        return lambda: training.step(sample_moments(moments, generator), labels, generator)
    if use_compile(train.compile, device):
        net.compile_blocks(**compile_options(train))
    state = TrainState(net, config, device)
    loss = make_loss(train, net)
    return lambda: train_step(state, net, loss, moments, labels, sample_moments, generator)


def measure_case(args, size, ratio, amp, batch, device):
    """Table rows of one size, mask ratio, precision and batch: all its arms, and the matrix product, in turn."""
    import torch

    gc.collect()  # the last case's networks, whose memory this one may need: they refer to themselves
    torch.compiler.reset()  # and its graphs, which count towards the limit of graphs, beyond which nothing is compiled
    configs = {arm: case_config(args, size, ratio, amp, batch, arm) for arm in args.arms}
    product, product_flops = gemm_arm(device, amp)
    memory_pass, pass_bytes = memory_arm(device)
    steps, weights_bytes = {}, {}
    for arm, config in configs.items():
        steps[arm], _, weights_bytes[arm] = watch_memory(lambda: make_arm(config, arm, device), device)
    measured = alternate(steps | {"peak": product, "memory": memory_pass}, args, device, memory=True)
    peak = product_flops / min(measured["peak"]["seconds"])
    bandwidth = pass_bytes / min(measured["memory"]["seconds"])
    rows = []
    for arm, config in configs.items():
        flops = batch * model_flops(config.model, config.train.mask_ratio, training=True)
        entry, seconds = measured[arm], spread(measured[arm]["seconds"])
        rate = flops / seconds["median"]
        memory = entry["peak_bytes"] and (entry["peak_bytes"] + weights_bytes[arm]) / 1e9
        rows.append({"model": size, "masked": config.train.mask_ratio, "amp": amp, "batch": batch, "arm": arm,
                     "ms/step": scaled(seconds, 1000), "img/s": batch / seconds["median"],
                     "TFLOP/s": rate / 1e12, "of peak": rate / peak, "peak TFLOP/s": peak / 1e12, "peak GB/s": bandwidth / 1e9,
                     "GB": memory,
                     "x plain": speedup(measured, "plain", arm) if "plain" in steps and arm != "plain" else None,
                     "first step s": entry["first_s"], "config": {key: to_dict(config)[key] for key in ("model", "train")}})
    return rows


def main():
    args = parse_arguments()
    device = start(args, deterministic=args.deterministic)
    rows = []
    for case in itertools.product(args.sizes, args.mask_ratio, args.amp, args.batchsize):
        found = measure_case(args, *case, device)
        print_table(found, COLUMNS)
        print(f"peak of a {case[2]} matrix product: {found[0]['peak TFLOP/s']:.3g} TFLOP/s, of a pass over memory: "
              f"{found[0]['peak GB/s']:.3g} GB/s\n", flush=True)
        rows += found
        write_json(args.json, device, in_size=args.in_size, rows=rows)


if __name__ == "__main__":
    run(main)
