"""Images per second and memory of fid/'s Inception features, beside pytorch-fid's.

    python -m benchmarks.fid --json benchmarks/results/fid.json

Both sides get the same uint8 images and the same random weights, on whose values the speed does not depend. They take turns within one
process, and so does a large float32 matrix product, which tells how much arithmetic the machine had to give. MiB is the most that a
batch of images takes at once. pytorch-fid comes with requirements-test.txt.
"""

import tempfile
from pathlib import Path

from benchmarks.common import alternate, gemm_arm, make_parser, random_inception, report, speedup, spread, start
from utils.cli import run

SIDES = ("fid", "pytorch-fid")


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=50, help="images per batch (default 50, as pytorch-fid's)")
    parser.add_argument("--side", type=int, default=256, help="side of the images in pixels (default 256)")
    return parser.parse_args(argv)


def make_arms(weights, images, device):
    """{side: function that computes pooled features of uint8 images (B, H, W, 3) on the CPU, as the side is used}."""
    import pytorch_fid.inception as peer
    import torch

    from fid.embeddings import Inception

    peer.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, weights_only=True)  # instead of a download
    ours, theirs = Inception(weights, device), peer.InceptionV3([3]).eval().to(device)

    @torch.no_grad()
    def features():
        return theirs(images.to(device).permute(0, 3, 1, 2).float().div_(255))[0][:, :, 0, 0]

    return {"fid": lambda: ours(images), "pytorch-fid": features}


def main():
    args = parse_arguments()
    device = start(args, tf32=False)  # as fid/ computes
    import torch

    with tempfile.TemporaryDirectory() as folder:
        images = torch.randint(256, (args.batch, args.side, args.side, 3), dtype=torch.uint8)
        arms = make_arms(random_inception(Path(folder) / "weights.pth"), images, device)
    product, product_flops = gemm_arm(device, "no")
    measured = alternate(arms | {"product": product}, args, device, memory=True)
    rows = [{"side": side, "images/s": spread([args.batch / seconds for seconds in measured[side]["seconds"]]),
             "x pytorch-fid": speedup(measured, "pytorch-fid", side),
             "MiB": measured[side]["peak_bytes"] and measured[side]["peak_bytes"] / 2**20} for side in SIDES]
    gflops = spread([product_flops / 1e9 / seconds for seconds in measured["product"]["seconds"]])
    report(args, device, rows, ("side", "images/s", "x pytorch-fid", "MiB"), product_gflops=gflops, batch=args.batch, size=args.side)


if __name__ == "__main__":
    run(main)
