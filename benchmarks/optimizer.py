"""What a step does after the backward pass: AdamW and EMA, fused as this project runs them and one tensor at a time.

    python -m benchmarks.optimizer --model DiT-S/2 --json benchmarks/results/optimizer.json

All arms work on their own copy of the same weights and gradients. GB/s counts the bytes that the arithmetic needs: 28 per weight for
AdamW (weight, gradient and two moments read; weight and moments written), 12 for EMA. `memory` is what no arm can better: the EMA
of two single tensors with as many numbers; `of memory` is the share of its GB/s.
"""

import argparse

from benchmarks.common import add_common_arguments, alternate, memory_arm, print_table, scaled, speedup, spread, start, write_json
from utils.cli import run

BYTES = {"AdamW": 28, "EMA": 12}
COLUMNS = ("update", "arm", "ms", "GB/s", "of memory", "x plain")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings of the config, as model.depth=2")
    add_common_arguments(parser, rounds=11)
    return parser.parse_args(argv)


def make_arms(config, device):
    """{(update, arm): function}, and the number of weights."""
    import copy

    import torch

    from benchmarks.reference import PlainTraining
    from sampling.sample import build_model
    from training.loop import TrainState

    plain_net = build_model(config.model).to(device)
    state = TrainState(copy.deepcopy(plain_net), config, device)
    plain = PlainTraining(plain_net, config.train, device)
    for net in (plain.net, state.net):
        generator = torch.Generator(device).manual_seed(0)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    weights = sum(p.numel() for p in plain.net.parameters())
    arms = {("AdamW", "plain"): plain.optimizer.step, ("AdamW", "ours"): state.optimizer.step,
            ("EMA", "plain"): plain.update_ema, ("EMA", "ours"): state.ema.update,
            ("EMA", "memory"): memory_arm(device, weights)[0]}
    return arms, weights


def main():
    from utils.config import load_config

    args = parse_arguments()
    device = start(args)
    arms, weights = make_arms(load_config(overrides=[f"model.model_type={args.model}", *args.set]), device)
    measured = alternate(arms, args, device)
    seconds = {name: spread(entry["seconds"]) for name, entry in measured.items()}
    speed = {name: BYTES[name[0]] * weights / 1e9 / value["median"] for name, value in seconds.items()}
    rows = [{"update": update, "arm": arm, "ms": scaled(seconds[update, arm], 1000),
             "GB/s": speed[update, arm], "of memory": speed[update, arm] / speed["EMA", "memory"],
             "x plain": speedup(measured, (update, "plain"), (update, arm)) if arm != "plain" else None}
            for update, arm in arms]
    print_table(rows, COLUMNS)
    write_json(args.json, device, model=args.model, weights=weights, rows=rows)


if __name__ == "__main__":
    run(main)
