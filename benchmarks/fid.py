"""fid/ beside pytorch-fid: images per second, Frechet distances per second at d = 2048, peak memory.

    python -m benchmarks.fid --json benchmarks/results/fid.json

Both sides see the same uint8 images and the same random weights (speed does not depend on their values). The sides take
turns within one process, and a large float32 matrix product takes its turn with them: it tells how much arithmetic the
machine had to give. FLOPs are those of the convolutions, counted by torch. Memory is
measured in a process of its own for each side. pytorch-fid comes with requirements-test.txt.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, add_common_arguments, alternate, count_flops, gemm_arm, print_table, scaled, speedup, spread, write_json

SIDES = ("fid", "pytorch-fid")
TASKS = ("features", "distance")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, rounds=7)
    parser.add_argument("--batch", type=int, default=50, help="images per batch (default 50, as pytorch-fid's)")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    parser.add_argument("--memory_of", choices=[f"{side}:{task}" for side in SIDES for task in TASKS],
                        help=argparse.SUPPRESS)  # a child of this script, with --weights
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    return parser.parse_args()


def extractor_of(side, weights):
    """A function from uint8 images (B, H, W, 3) to pooled features, as the side is used."""
    import torch
    if side == "fid":
        from fid.embeddings import Inception
        return Inception(weights, device="cpu")
    import pytorch_fid.inception as peer
    peer.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, weights_only=True)  # no download
    net = peer.InceptionV3([3]).eval()

    def features(images):
        with torch.no_grad():
            return net(images.permute(0, 3, 1, 2).float().div_(255))[0][:, :, 0, 0]
    return features


def distance_of(side):
    if side == "fid":
        from fid.metrics import frechet_distance
        return frechet_distance
    from pytorch_fid.fid_score import calculate_frechet_distance
    return calculate_frechet_distance


def gaussians(num):
    """mu1, sigma1, mu2, sigma2 of two sets of `num` features, d = 2048, with a falling spectrum as FID sees them."""
    import numpy as np
    rng = np.random.default_rng(0)
    deviations = np.linspace(0.05, 1, 2048) ** 2
    parts = []
    for shift in (0.0, 0.1):
        features = rng.standard_normal((num, 2048)) * deviations + shift
        parts += [features.mean(0), np.cov(features, rowvar=False)]
    return parts


def random_material(args):
    """Random images and Inception weights, those of the tests."""
    sys.path.append(str(ROOT / "tests"))
    from fid_helpers import random_images, random_inception
    return random_images(args.batch, args.size, args.size), random_inception()


def peak_memory(side, task, args):
    """MiB that this process needs at most for two batches of images, or for one distance."""
    if task == "features":
        images, _ = random_material(args)
        features = extractor_of(side, args.weights)
        for _ in range(2):
            features(images)
    else:
        distance_of(side)(*gaussians(num=2500))
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent process before exec
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_memory_of_child(side, task, args, weights):
    command = [sys.executable, "-m", "benchmarks.fid", "--memory_of", f"{side}:{task}", "--weights", weights,
               "--batch", str(args.batch), "--size", str(args.size), "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)


def measure(args, weights, images):
    """{task: {side: function}} timed in turns; {task: measured as benchmarks.common.alternate returns it}."""
    import torch
    device = torch.device("cpu")
    parts = gaussians(num=6000)
    measured, amounts = {}, {"features": args.batch, "distance": 1}
    for task, make, call in (("features", lambda side: extractor_of(side, weights), lambda f: f(images)),
                             ("distance", distance_of, lambda f: f(*parts))):
        functions = {side: make(side) for side in SIDES}
        arms = {side: lambda f=f, call=call: call(f) for side, f in functions.items()}
        product, flops = gemm_arm(device, "no")
        measured[task] = alternate(arms | {"matrix product": product}, args, device)
        amounts["matrix product"] = flops / 1e9
    return measured, amounts


def main():
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)  # before numpy starts its threads
    import torch
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(*args.memory_of.split(":"), args))
        return
    images, state = random_material(args)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.pth")
        torch.save(state, weights)
        measured, amounts = measure(args, weights, images)
        plain = extractor_of("pytorch-fid", weights)
        flops = count_flops(lambda: plain(images[:1]))
        memory = {task: {side: peak_memory_of_child(side, task, args, weights) for side in SIDES} for task in TASKS}
    report(args, measured, amounts, flops, memory, load)


def report(args, measured, amounts, flops, memory, load):
    import torch
    rows = []
    for task, unit in zip(TASKS, ("images/s", "distances/s")):
        rates = {name: spread([amounts[task if name in SIDES else name] / s for s in entry["seconds"]])
                 for name, entry in measured[task].items()}
        rows.append({"task": f"{task}, {unit}", **rates, "times faster": speedup(measured[task], "pytorch-fid", "fid")})
    images_per_s, peak = rows[0], rows[0]["matrix product"]["highest"]
    rows.append({"task": "features, GFLOP/s", **{side: scaled(images_per_s[side], flops / 1e9) for side in SIDES}})
    rows.append({"task": "features, of the matrix product", **{side: scaled(images_per_s[side], flops / 1e9 / peak) for side in SIDES}})
    for task in TASKS:
        rows.append({"task": f"{task}, peak MiB", **memory[task]})
    print_table(rows, ("task", *SIDES, "times faster", "matrix product"))
    print(f"matrix product in GFLOP/s; {args.size} px, batches of {args.batch}, {args.threads} thread(s), load {load[0]:.1f} at the start")
    write_json(args.json, torch.device("cpu"), rows=rows, load_before=load, load_after=os.getloadavg(), cores=os.cpu_count())


if __name__ == "__main__":
    main()
