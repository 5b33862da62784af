"""What a training step costs: measured against token count and width, and counted for the paper's models.

    python3 -m experiments.costs --setting cpu

arms.json: time of a training step of each arm of the setting, the arms in turn (benchmarks/common.py): what seconds are reckoned from.
steps.json: the same of three arms with encoders of every width on every token count.
paper.json: FLOPs (torch's counter) and memory (tensors that torch keeps for the backward pass) of the paper's sizes; the
same on every machine, nothing is computed.
"""

import argparse
import itertools
from pathlib import Path

from benchmarks.common import add_round_arguments
from benchmarks.estimate import GRADIENT_BYTES, STATE_BYTES
from experiments.settings import arm_config, flops_per_image, image_flops, load_setting
from utils.cli import UserError, run
from utils.files import make_folder

ARMS = {"dit": (False, 0.0), "unmasked": (True, 0.0), "masked": (True, 0.5)}  # decoder, mask ratio
PAPER_SIZES, PAPER_LATENTS = ("S/2", "B/2", "L/2", "XL/2"), {"256 px": 32, "512 px": 64}
MEMORY_SIZE = "XL/2"
STEPS = 10  # of an arm, in each of its turns


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_round_arguments(parser, rounds=5)
    parser.add_argument("--setting", required=True, help="name of a YAML file in experiments/, which lists tokens and widths under costs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values of the setting")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of the results (default: %(default)s)")
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
                             "flops_per_image": image_flops(config, round((1 - ARMS[arm][1]) * side**2))})
    return rows


def _step_config(side, width, batch, amp, decoder, ratio):
    from utils.config import from_dict

    return from_dict({"model": {"model_type": "DiT-S/1", "in_size": side, "num_classes": 10, "depth": 4, "width": width, "num_heads": 4,
                                "use_decoder": decoder, "decoder_depth": 1, "decoder_width": width // 2, "decoder_num_heads": 4},
                      "train": {"batchsize": batch, "amp": amp, "mask_ratio": ratio}})


def count_paper():
    """Rows {size, resolution, arm, training FLOPs per image} of the paper's sizes; of the largest one also bytes of memory."""
    from benchmarks.work import count_weights, kept_bytes, model_flops
    from utils.config import from_dict

    rows = []
    for (resolution, in_size), size, (arm, (decoder, ratio)) in itertools.product(PAPER_LATENTS.items(), PAPER_SIZES, ARMS.items()):
        model = {"model_type": f"DiT-{size}", "in_size": in_size, "use_decoder": decoder}
        config = from_dict({"model": model, "train": {"mask_ratio": ratio}})
        row = {"size": size, "resolution": resolution, "arm": arm, "training_flops": model_flops(config, ratio, training=True)}
        if size == MEMORY_SIZE:
            one, two = (kept_bytes(config, ratio, "bf16", batch)[0] for batch in (1, 2))
            # what does not grow with the batch are the weights' copies in bf16
            state = (STATE_BYTES + GRADIENT_BYTES) * count_weights(config) + 2 * one - two
            row |= {"kept_bytes_per_image": two - one, "state_bytes": state}
        rows.append(row)
    return rows


def check_costs(setting):
    """Raise UserError if the setting does not say which steps to measure."""
    from benchmarks.work import count_weights

    for key in ("sides", "widths"):
        numbers = setting.costs.get(key)
        if not isinstance(numbers, list) or not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise UserError(f"costs.{key}={numbers} of the setting {setting.name}: wanted a list of numbers above 0")
    tokens = setting.costs.get("tokens_per_step")
    if not isinstance(tokens, int) or tokens < 1:
        raise UserError(f"costs.tokens_per_step={tokens} of the setting {setting.name}: wanted a number above 0")
    for side, width in itertools.product(setting.costs["sides"], setting.costs["widths"]):
        count_weights(_step_config(side, width, 1, setting.amp, *ARMS["masked"]))  # the network checks its sizes when it is made


def main(argv=None):
    args = parse_arguments(argv)
    setting = load_setting(args.setting, args.set)
    from benchmarks.common import start, write_json

    check_costs(setting)
    device, out = start(args), make_folder(args.out / setting.name, "--out")
    if not (out / "paper.json").is_file():
        write_json(out / "paper.json", device, rows=count_paper())
    if not (out / "arms.json").is_file():
        write_json(out / "arms.json", device, rounds=args.rounds, rows=measure_arms(setting, args, device))
    if not (out / "steps.json").is_file():
        write_json(out / "steps.json", device, costs=setting.costs, rounds=args.rounds, rows=measure_steps(setting, args, device))


if __name__ == "__main__":
    run(main)
