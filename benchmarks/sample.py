"""Images per second of sampling, beside the plain path with the same weights, seeds and steps.

    python -m benchmarks.sample --size S/2 --amp bf16 --num_steps 4 --json benchmarks/results/sample_cpu.json

An arm samples one batch of latents as generate.py does. `plain` is benchmarks/reference.py, `ours` sampling.sample.sample_latents,
`compiled` has compiled blocks, and `interval` is `ours` with guidance only for sigma in (0.28, 2.9], which changes the images.
"of peak" is the network's FLOPs over time over the speed of a large matrix product in the same run. GB counts the weights too.
"""

from benchmarks.common import compare, make_parser, start
from utils.cli import run
from utils.config import load_config, model_arguments

ARMS = ("plain", "ours", "compiled", "interval")
INTERVAL = "[0.28,2.9]"  # Kynkaanniemi et al. 2024
COLUMNS = ("model", "amp", "steps", "cfg", "batch", "arm", "ms", "img/s", "TFLOP/s", "of peak", "x plain", "GB", "first s")


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=3, settings=True, arms=ARMS)
    parser.add_argument("--num_steps", type=int, default=40, help="sampler steps (default %(default)s)")
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="1 is off (default %(default)s)")
    return parser.parse_args(argv)


def arm_config(args, arm):
    return load_config(overrides=[
        f"model.model_type=DiT-{args.size}", f"sample.amp={args.amp}", f"sample.num_steps={args.num_steps}",
        f"sample.cfg_scale={args.cfg_scale}", f"sample.cfg_interval={INTERVAL if arm == 'interval' else 'null'}",
        f"sample.batchsize={args.batchsize}", f"sample.compile={arm == 'compiled'}", *args.set])


def make_arm(config, arm, device):
    """A function that samples one batch with `arm` and returns its latents."""
    import torch

    from benchmarks.reference import plain_guided
    from models import build_model, edm_sampler
    from sampling.load import prepare_network
    from sampling.sample import draw_inputs, sample_latents
    from utils.precision import arithmetic

    torch.manual_seed(0)
    net, sample = build_model(**model_arguments(config)).to(device).eval().requires_grad_(False), config.sample
    seeds = list(range(sample.batchsize))
    if arm != "plain":
        prepare_network(net, sample, device)
        return lambda: sample_latents(net, seeds, sample, device)[0]

    @torch.no_grad()
    def plain_latents():
        _, noise, class_labels = draw_inputs(seeds, net, device)
        with arithmetic(device, sample.amp, sample.tf32):
            return edm_sampler(plain_guided(net, sample.cfg_scale), noise, class_labels, num_steps=sample.num_steps).float()

    return plain_latents


def image_flops(config):
    """FLOPs of one image: Heun visits every noise level but the first twice, and guidance doubles each visit."""
    from benchmarks.work import model_flops
    from models.samplers import edm_sigmas

    sample = config.sample
    low, high = sample.cfg_interval or (0.0, float("inf"))
    last = max(1, sample.num_steps - 1)
    sigmas = edm_sigmas([i / last for i in range(sample.num_steps)], 0.002, 80.0, sample.rho)
    calls = sum(2 if sample.cfg_scale != 1 and low < sigma <= high else 1 for sigma in sigmas + sigmas[1:])
    return calls * model_flops(config)


def main():
    args = parse_arguments()
    configs = {arm: arm_config(args, arm) for arm in args.arms}
    device = start(args, tf32=False)  # as generate.py
    about = {"model": args.size, "amp": args.amp, "steps": args.num_steps, "cfg": args.cfg_scale, "batch": args.batchsize}
    compare(args, device, configs, about, make_arm, image_flops, COLUMNS)


if __name__ == "__main__":
    run(main)
