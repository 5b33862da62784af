"""What a training step costs: measured against token count and width, and counted for the paper's models.

    python3 -m experiments.costs --setting cpu

arms.json: time of a training step of each arm of the setting, the arms in turn (benchmarks/common.py): what seconds are reckoned from.
steps.json: the same of three arms with encoders of every width on every token count.
paper.json: FLOPs (torch's counter) and memory (tensors that torch keeps for the backward pass) of the paper's sizes; the
same on every machine, nothing is computed.
"""

import argparse
from pathlib import Path

from benchmarks.estimate import STATE_BYTES
from experiments.settings import arm_config, flops_per_image, image_flops, load_setting
from utils.cli import run

ARMS = {"dit": (False, 0.0), "unmasked": (True, 0.0), "masked": (True, 0.5)}  # decoder, mask ratio
PAPER_SIZES, PAPER_LATENTS = ("S/2", "B/2", "L/2", "XL/2"), {"256 px": 32, "512 px": 64}
MEMORY_SIZE = "XL/2"
STEPS = 10  # of an arm, in each of its turns


def parse_arguments(argv=None):
    from benchmarks.common import add_common_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, help="name of a YAML file in experiments/, which lists tokens and widths under costs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values of the setting")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of the results (default: %(default)s)")
    add_common_arguments(parser, rounds=5)
    return parser.parse_args(argv)


def measure_arms(setting, args, device):
    """Rows {arm, seconds of each round, FLOPs of a step} of the arms that start fresh, ten steps a round."""
    import torch

    from benchmarks.common import alternate
    from benchmarks.train import make_arm

    torch.compiler.reset()
    names = [arm for arm in setting.arms if not setting.start(arm)]
    configs = {arm: arm_config(setting, arm, setting.seeds[0]) for arm in names}
    steps = {arm: make_arm(config, "ours", device) for arm, config in configs.items()}
    measured = alternate({arm: lambda step=step: [step() for _ in range(STEPS)] for arm, step in steps.items()}, args, device)
    return [{"arm": arm, "seconds": [seconds / STEPS for seconds in measured[arm]["seconds"]],
             "flops": config.train.batchsize * flops_per_image(config)} for arm, config in configs.items()]


def measure_steps(setting, args, device):
    """Rows {tokens, width, batch, arm, ms per step, FLOPs per image}: encoder of depth 4, decoder of depth 1 and half the width."""
    import torch

    from benchmarks.common import alternate, spread
    from benchmarks.train import make_arm

    rows = []
    for width in setting.costs["widths"]:
        for side in setting.costs["sides"]:
            batch = max(1, setting.costs["tokens_per_step"] // side**2)
            torch.compiler.reset()  # each size has graphs of its own, and their number is limited
            configs = {arm: _step_config(side, width, batch, setting.amp, *ARMS[arm]) for arm in ARMS}
            measured = alternate({arm: make_arm(config, "ours", device) for arm, config in configs.items()}, args, device)
            for arm, config in configs.items():
                rows.append({"tokens": side**2, "width": width, "batch": batch, "arm": arm, "seconds": measured[arm]["seconds"],
                             "ms": spread([1000 * second for second in measured[arm]["seconds"]]),
                             "peak_bytes": measured[arm]["peak_bytes"],
                             "flops_per_image": image_flops(config.model, round((1 - ARMS[arm][1]) * side**2))})
    return rows


def _step_config(side, width, batch, amp, decoder, ratio):
    from utils.config import from_dict

    return from_dict({"model": {"model_type": "DiT-S/1", "in_size": side, "num_classes": 10, "depth": 4, "width": width, "num_heads": 4,
                                "use_decoder": decoder, "decoder_depth": 1, "decoder_width": width // 2, "decoder_num_heads": 4},
                      "train": {"batchsize": batch, "amp": amp, "mask_ratio": ratio}})


def count_paper():
    """Rows {size, resolution, arm, training FLOPs per image} of the paper's sizes; of the largest one also bytes of memory."""
    from benchmarks.common import model_flops
    from utils.config import ModelConfig

    rows = []
    for resolution, in_size in PAPER_LATENTS.items():
        for size in PAPER_SIZES:
            for arm, (decoder, ratio) in ARMS.items():
                model = ModelConfig(model_type=f"DiT-{size}", in_size=in_size, use_decoder=decoder)
                row = {"size": size, "resolution": resolution, "arm": arm, "training_flops": model_flops(model, ratio, training=True)}
                if size == MEMORY_SIZE:
                    one, parameters = kept_bytes(model, ratio, 1)
                    per_image = kept_bytes(model, ratio, 2)[0] - one
                    # what does not grow with the batch are the weights' copies in bf16
                    row |= {"kept_bytes_per_image": per_image, "state_bytes": STATE_BYTES * parameters + one - per_image}
                rows.append(row)
    return rows


def kept_bytes(model_config, mask_ratio, batch):
    """(bytes of a batch that autograd keeps for the backward pass under bf16 autocast, trainable parameters of the network)."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from models.masking import TokenMask, count_kept
    from sampling.sample import build_model

    kept = {}
    with FakeTensorMode():  # shapes without contents
        net = build_model(model_config).model
        weights = {p.untyped_storage()._cdata for p in net.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other takes its place
            return tensor

        x = torch.empty(batch, net.in_channels, net.in_size, net.in_size)
        labels = torch.zeros(batch, dtype=torch.int64)
        num_keep = count_kept(net.num_tokens, mask_ratio)
        order = torch.empty(batch, net.num_tokens, dtype=torch.int64)
        mask = TokenMask(order, num_keep) if num_keep < net.num_tokens else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            net(x, torch.ones(batch), labels, mask)
        parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        return sum(size for size, _ in kept.values()), parameters


def main(argv=None):
    args = parse_arguments(argv)
    setting = load_setting(args.setting, args.set)
    from benchmarks.common import start, write_json

    device = start(args)
    out = args.out / setting.name
    if not (out / "paper.json").is_file():
        write_json(out / "paper.json", device, rows=count_paper())
    if not (out / "arms.json").is_file():
        write_json(out / "arms.json", device, rounds=args.rounds, rows=measure_arms(setting, args, device))
    if not (out / "steps.json").is_file():
        write_json(out / "steps.json", device, costs=setting.costs, rounds=args.rounds, rows=measure_steps(setting, args, device))


if __name__ == "__main__":
    run(main)
