"""Images per second of sampling: the plain path beside this project's, the same weights, seeds and steps.

    python -m benchmarks.sample --sizes S/2 --amp no bf16 --num_steps 4 --json benchmarks/results/sample_cpu.json

An arm samples one batch of latents as generate.py does. `plain` is benchmarks/reference.py: everything computed at every call;
`ours` is `sampling.sample.sample_latents`; `compiled` with compiled blocks; `interval` is `ours` with guidance only for sigma in
(0.28, 2.9], which changes the images. `difference` is the largest of any latent from the plain path's of the same precision.
Utilisation is FLOPs of the network over time over the best matrix product of the same run. GB is what a batch needs beside the weights.
"""

import argparse
import itertools

from benchmarks.common import add_common_arguments, alternate, gemm_arm, model_flops, print_table, speedup, spread, start, write_json
from utils.cli import run

ARMS = ("plain", "ours", "compiled", "interval")
INTERVAL = (0.28, 2.9)
COLUMNS = ("model", "amp", "steps", "cfg", "batch", "arm", "s/batch", "img/s", "TFLOP/s", "of peak", "x plain", "difference", "GB",
           "first batch s")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S/2"], help="of the paper's table, as in S/2 B/2 XL/2")
    parser.add_argument("--amp", nargs="+", default=["no", "bf16"], choices=("no", "bf16", "fp16"))
    parser.add_argument("--num_steps", nargs="+", type=int, default=[40], help="sampler steps (default 40)")
    parser.add_argument("--cfg_scale", nargs="+", type=float, default=[1.5], help="1 is off (default 1.5)")
    parser.add_argument("--batchsize", nargs="+", type=int, default=[4])
    parser.add_argument("--in_size", type=int, default=32, help="of the latents: 32 for 256 pixels, 64 for 512 (default 32)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings of the config, as model.depth=2")
    add_common_arguments(parser, rounds=3)
    return parser.parse_args(argv)


def case_config(args, size, amp, steps, cfg_scale, batch, arm):
    from utils.config import load_config

    interval = [f"sample.cfg_interval=[{INTERVAL[0]},{INTERVAL[1]}]"] if arm == "interval" else []
    return load_config(overrides=[
        f"model.model_type=DiT-{size}", f"model.in_size={args.in_size}", f"sample.amp={amp}", f"sample.num_steps={steps}",
        f"sample.cfg_scale={cfg_scale}", f"sample.batchsize={batch}", f"sample.compile={arm == 'compiled'}", *interval, *args.set])


def make_net(model_config, device):
    """A network whose output depends on its input: fresh ones end in zeros."""
    import torch

    from sampling.sample import build_model

    torch.manual_seed(0)
    net = build_model(model_config).to(device).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def make_arm(config, arm, device):
    """A function that samples one batch with `arm` and returns its latents."""
    from benchmarks.reference import PlainDenoiser
    from sampling.load import prepare_network
    from sampling.sample import sample_latents

    net, seeds = make_net(config.model, device), list(range(config.sample.batchsize))
    if arm == "plain":
        plain = PlainDenoiser(net).requires_grad_(False)
        return lambda: plain_latents(plain, net, seeds, config.sample, device)
    prepare_network(net, config.sample, device)
    return lambda: sample_latents(net, seeds, config.sample, device)[0]


def plain_latents(plain, net, seeds, sample, device):
    import torch

    from benchmarks.reference import plain_guided
    from models import edm_sampler
    from sampling.sample import draw_inputs
    from utils.precision import autocast

    _, noise, class_labels = draw_inputs(seeds, net, device)
    with torch.no_grad(), autocast(sample.amp, device):
        return edm_sampler(plain_guided(plain, sample.cfg_scale), noise, class_labels, num_steps=sample.num_steps).float()


def network_calls(sample):
    """Passes of one image through the network: Heun looks at all noise levels but the first twice, guidance doubles each."""
    from models.samplers import edm_sigmas

    low, high = sample.cfg_interval or (0.0, float("inf"))
    sigmas = edm_sigmas(sample.num_steps, 0.002, 80.0, sample.rho)
    return sum(2 if sample.cfg_scale != 1 and low < sigma <= high else 1 for sigma in sigmas + sigmas[1:])


def measure_case(args, size, amp, steps, cfg_scale, batch, device):
    """Table rows of one case: all its arms, and the matrix product, in turn."""
    import torch

    torch.compiler.reset()  # the last case's graphs count towards the limit of graphs, beyond which nothing is compiled
    configs = {arm: case_config(args, size, amp, steps, cfg_scale, batch, arm) for arm in args.arms}
    product, product_flops = gemm_arm(device, amp)
    samplers = {arm: make_arm(config, arm, device) for arm, config in configs.items()}
    latents = {}

    def keep(arm):
        latents[arm] = samplers[arm]()

    measured = alternate({arm: lambda arm=arm: keep(arm) for arm in samplers} | {"peak": product}, args, device, memory=True)
    peak = product_flops / min(measured["peak"]["seconds"])
    rows = []
    for arm, config in configs.items():
        entry, seconds = measured[arm], spread(measured[arm]["seconds"])
        rate = batch * network_calls(config.sample) * model_flops(config.model) / seconds["median"]
        against = "plain" in samplers and arm != "plain"
        rows.append({"model": size, "amp": amp, "steps": steps, "cfg": cfg_scale, "batch": batch, "arm": arm, "s/batch": seconds,
                     "img/s": batch / seconds["median"], "TFLOP/s": rate / 1e12, "of peak": rate / peak, "peak TFLOP/s": peak / 1e12,
                     "x plain": speedup(measured, "plain", arm) if against else None,
                     "difference": (latents[arm] - latents["plain"]).abs().max().item() if against else None,
                     "GB": entry["peak_bytes"] and entry["peak_bytes"] / 1e9, "first batch s": entry["first_s"]})
    return rows


def main():
    args = parse_arguments()
    device = start(args, tf32=False)  # as generate.py does, but for its deterministic kernels
    rows = []
    for case in itertools.product(args.sizes, args.amp, args.num_steps, args.cfg_scale, args.batchsize):
        found = measure_case(args, *case, device)
        print_table(found, COLUMNS)
        print(f"peak of a {case[1]} matrix product: {found[0]['peak TFLOP/s']:.3g} TFLOP/s\n", flush=True)
        rows += found
        write_json(args.json, device, in_size=args.in_size, rows=rows)


if __name__ == "__main__":
    run(main)
