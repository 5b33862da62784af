"""fid/ beside pytorch-fid: images per second, Frechet distances per second at d = 2048, memory.

    python -m benchmarks.fid --json benchmarks/results/fid.json

Both sides get the same uint8 images and the same random weights, on whose values the speed does not depend. They take turns within one
process, and so does a large float32 matrix product, which tells how much arithmetic the machine had to give. MiB is the most that a
batch of images takes at once. pytorch-fid comes with requirements-test.txt.
"""

import os
import sys
import tempfile

from benchmarks.common import alternate, gemm_arm, make_parser, report, speedup, spread, start
from utils.cli import PROJECT_ROOT, run

SIDES = ("fid", "pytorch-fid")


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=50, help="images per batch (default 50, as pytorch-fid's)")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    return parser.parse_args(argv)


def make_features(weights, images):
    """{side: function that computes pooled features of uint8 images (B, H, W, 3), as the side is used}."""
    import pytorch_fid.inception as peer
    import torch

    from fid.embeddings import Inception

    peer.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, weights_only=True)  # instead of a download
    ours, theirs = Inception(weights, device="cpu"), peer.InceptionV3([3]).eval()

    @torch.no_grad()
    def features():
        return theirs(images.permute(0, 3, 1, 2).float().div_(255))[0][:, :, 0, 0]

    return {"fid": lambda: ours(images), "pytorch-fid": features}


def make_distances(num=6000):
    """{side: function that computes the distance of two sets of `num` features with a falling spectrum, as FID sees them}."""
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance

    from fid.metrics import frechet_distance

    rng = np.random.default_rng(0)
    parts = []
    for shift in (0.0, 0.1):
        features = rng.standard_normal((num, 2048)) * np.linspace(0.05, 1, 2048) ** 2 + shift
        parts += [features.mean(0), np.cov(features, rowvar=False)]
    return {"fid": lambda: frechet_distance(*parts), "pytorch-fid": lambda: calculate_frechet_distance(*parts)}


def main():
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)  # before numpy starts its threads
    start(args)
    import torch

    sys.path.append(str(PROJECT_ROOT / "tests"))
    from fid_helpers import random_images, random_inception

    device, rows = torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.pth")
        torch.save(random_inception(), weights)
        features = make_features(weights, random_images(args.batch, args.size, args.size))
    product, product_flops = gemm_arm(device, "no")
    for task, amount, arms in (("features, images/s", args.batch, features), ("distances/s", 1, make_distances())):
        measured = alternate(arms | {"product": product}, args, device, memory=True)
        rows.append({"task": task, "times faster": speedup(measured, "pytorch-fid", "fid"),
                     "matrix product, GFLOP/s": spread([product_flops / 1e9 / seconds for seconds in measured["product"]["seconds"]])}
                    | {side: spread([amount / seconds for seconds in measured[side]["seconds"]]) for side in SIDES}
                    | {f"MiB, {side}": measured[side]["peak_bytes"] and measured[side]["peak_bytes"] / 2**20 for side in SIDES})
    report(args, device, rows, ("task", *SIDES, "times faster", "matrix product, GFLOP/s", *(f"MiB, {side}" for side in SIDES)),
           batch=args.batch, size=args.size)


if __name__ == "__main__":
    run(main)
