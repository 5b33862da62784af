"""What the number format of the network changes in samples: float32, TF32 and bfloat16 with the same seeds, beside other seeds.

    bash scripts/demo.sh     # makes the network and the reference
    python3 -m experiments.precision --ckpt_path results/demo/fashion-mnist-tune/checkpoints/0002000.pt \
        --ref results/demo/training_images.npz --json experiments/results/precision_cpu.json sample.num_steps=40

TF32 is emulated, so that it can be measured on a CPU: both inputs of every matrix product and convolution of the network are rounded
to 10 bits of mantissa, and products and sums are float32, as in a GPU's tensor cores. The decoder computes in float32 in every arm.
FD is of the demo's classifier. Sampling again with other seeds shows how much of a difference in FD is chance.
"""

import argparse
import json
from pathlib import Path

from utils.cli import parse_with_overrides, run
from utils.files import make_folder, write_whole

ARMS = ("float32", "tf32", "bf16")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint that carries its config")
    parser.add_argument("--ref", required=True, help="reference images or statistics of the classifier's features")
    parser.add_argument("--images", type=int, default=2000, help="samples of each arm (default %(default)s)")
    parser.add_argument("--seed_sets", type=int, default=4, help="sets of seeds sampled in float32 (default %(default)s)")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="file for the numbers")
    return parse_with_overrides(parser, argv)


def round_to_tf32(x):
    """float32 rounded to the nearest number with 10 bits of mantissa; halves away from zero, as GPUs convert."""
    import torch

    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def with_tf32_inputs(function):
    """`function` with the inputs of its matrix products and convolutions rounded. Raises ValueError for a kind of product unknown here."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten  # operators, and the places of the two factors among their arguments
    factors = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2), aten.convolution: (0, 1)}

    class Tf32Inputs(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name, places = operator.overloadpacket.__name__, factors.get(operator.overloadpacket, ())
            if not places and any(word in name for word in ("mm", "mv", "conv", "attention", "linear", "dot")):
                raise ValueError(f"{name} is a product whose inputs are not rounded here")
            return operator(*(round_to_tf32(arg) if place in places else arg for place, arg in enumerate(args)), **(kwargs or {}))

    def rounded(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH), Tf32Inputs():  # attention as plain products, which the mode sees
            return function(*args, **kwargs)

    return rounded


def sample(args, overrides, arm, seeds):
    """(latents (N, C, H, W) float32, images (N, H, W, 3) uint8, settings) of these seeds."""
    import numpy as np
    import torch

    from sampling.load import load_net, prepare_network
    from sampling.outputs import settings_of
    from sampling.sample import generate, image_decoder

    device = torch.device("cpu")
    net, config, _, latents = load_net(args.ckpt_path, "ema", None, [*overrides, f"sample.amp={'bf16' if arm == 'bf16' else 'no'}"], device)
    prepare_network(net, config.sample, device)
    if arm == "tf32":
        net.forward = with_tf32_inputs(net.forward)
    decode = image_decoder(config.vae, net.in_channels, device, latents, f"checkpoint {args.ckpt_path}")
    batches = list(generate(net, decode, seeds, config.sample, device))
    return (torch.cat([batch.latents for batch in batches]), np.concatenate([batch.images for batch in batches]),
            settings_of(config, args.ckpt_path, "ema", [], decode))


def differences(found, wanted):
    """How far an arm's latents and images are from float32's, image by image."""
    latents = (found[0] - wanted[0]).square().flatten(1).mean(1).sqrt()  # (N,)
    grey = abs(found[1].astype(int) - wanted[1])
    return {"latent_rms_mean": latents.mean().item(), "latent_rms_median": latents.median().item(), "latent_rms_max": latents.max().item(),
            "grey_levels_mean": grey.mean().item(), "values_that_differ": (grey > 0).mean().item()}


def main():
    args, overrides = parse_arguments()
    make_folder(args.json.parent, "--json")
    import torch

    from benchmarks.common import environment
    from fid.evaluate import Evaluator

    about = environment(torch.device("cpu"))  # asked at the start: the files may be changed while this runs
    evaluator = Evaluator(args.ref, metrics=("fid",), embedding="classifier")

    def distance(images):
        evaluator.reset()
        evaluator.add(images, 0)
        return evaluator.result()["numbers"]["FD-classifier"]

    first, found = list(range(args.images)), {}
    samples = {arm: sample(args, overrides, arm, first) for arm in ARMS}
    for arm, (latents, images, _) in samples.items():
        found[arm] = {"fd": distance(images)} | ({} if arm == "float32" else differences(samples[arm], samples["float32"]))
    others = [list(range(args.images * number, args.images * (number + 1))) for number in range(1, args.seed_sets)]
    fds = [found["float32"]["fd"]] + [distance(sample(args, overrides, "float32", seeds)[1]) for seeds in others]
    result = about | {
        "what": "a small network on a CPU; TF32 emulated by rounding the inputs of its products", "images": args.images,
        "latent_std": samples["float32"][0].std().item(), "arms": found,
        "other_seeds": {"fd": fds, "std": torch.tensor(fds, dtype=torch.float64).std().item(), "range": max(fds) - min(fds)},
        "settings": samples["float32"][2],
    }
    with write_whole(args.json) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found | {"other_seeds": result["other_seeds"]}, indent=1))


if __name__ == "__main__":
    run(main)
