"""Where the time of encoding images goes: decoding, the VAE, storing.

    python -m benchmarks.extraction --json benchmarks/results/extraction.json

Synthetic 500x375 JPEG photographs, 256 px latents, a VAE of Stable Diffusion's shape with random weights. Rates of decoding and storing
are per second of processor time, so that they are the rate of one core whatever else runs; the profile is a real extraction.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import count_flops, write_json
from utils.cli import run

RESOLUTION = 256
H100_FLOPS = 790e12  # bf16 matrix products, measured on one H100; convolutions reach a part of it
CONVOLUTION_SHARE = 0.5


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="photographs to decode (default: %(default)s)")
    parser.add_argument("--encode", type=int, default=16, help="of them, how many to encode for the profile (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser.parse_args()


def write_photographs(folder, count):
    """JPEGs with the spectrum of photographs: noise at several scales. About 100 kB each, as ImageNet's are."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        layers = [Image.fromarray(rng.integers(0, 256, (375 // step + 2, 500 // step + 2, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
                  for step in (3, 12, 50, 200)]
        photograph = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0)
        (folder / f"{i % 4}").mkdir(exist_ok=True)
        Image.fromarray(photograph.astype(np.uint8)).save(folder / f"{i % 4}" / f"{i}.jpg", quality=95)


def sd_shaped_vae():
    """Stable Diffusion's autoencoder, untrained."""
    from diffusers import AutoencoderKL
    from models.autoencoder import Autoencoder

    return Autoencoder(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                                     down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                     scaling_factor=0.18215))


def encoder_flops():
    """Floating-point operations of encoding one image."""
    import torch

    with torch.device("meta"):
        vae, image = sd_shaped_vae(), torch.empty(1, 3, RESOLUTION, RESOLUTION)
    return count_flops(lambda: vae.encode_moments(image))


def decoding_rate(folder):
    """Images decoded and cropped per second of one core."""
    from dataset.images import open_images

    images = open_images(folder, RESOLUTION)
    begun = time.process_time()
    images.read(range(len(images)))
    return len(images) / (time.process_time() - begun)


def threads_against_processes(folder, workers=2, rounds=7):
    """Median images per second of wall time by threads and by processes, which take turns: how much threads block each other."""
    from multiprocessing import get_context

    from dataset.images import open_images

    images = open_images(folder, RESOLUTION)
    parts = [range(begin, begin + 8) for begin in range(0, len(images) - 7, 8)]
    rates = {"threads": [], "processes": []}
    with ThreadPoolExecutor(workers) as threads, ProcessPoolExecutor(workers, get_context("fork")) as processes:
        for round_number in range(rounds + 1):  # the first one starts the workers
            for name, pool in (("threads", threads), ("processes", processes)):
                begun = time.perf_counter()
                for _ in pool.map(_decode_only, [images] * len(parts), parts):
                    pass
                rates[name].append(8 * len(parts) / (time.perf_counter() - begun))
    return {"workers": workers} | {name: round(statistics.median(found[1:])) for name, found in rates.items()}


def _decode_only(images, indices):
    images.read(indices)


def storing_rate(folder):
    """Samples stored (checksum, write, fsync) per second of one core."""
    import numpy as np

    from dataset.store import LatentWriter, Plan

    plan = Plan(8192, (8, 32, 32), "float16", False, 10, (), 0.18215, 0.0, "")
    moments = np.random.default_rng(0).standard_normal((plan.shard_size, *plan.sample_shape), np.float32).astype(np.float16)
    writer = LatentWriter(folder, plan)
    begun = time.process_time()
    for shard in writer.pending():
        writer.write(shard, moments, np.zeros(len(moments), np.int64))
    return plan.num_images / (time.process_time() - begun)


def profile(folder, dest, count):
    """A real extraction: (device, images/s, share of the wall time by what the main thread was doing)."""
    import torch

    from utils import distributed
    from dataset.extract import extract, make_plan
    from dataset.images import open_images

    cuda = distributed.device().type == "cuda"
    images, vae = open_images(folder, RESOLUTION), sd_shaped_vae()
    plan = make_plan(images, vae, "random", "bfloat16" if cuda else "float32", 0, count, 64 if cuda else 4, "float16", 4096)
    vae = vae.to(distributed.device(), torch.bfloat16 if cuda else torch.float32).to(memory_format=torch.channels_last)
    begun = time.perf_counter()
    _, tally = extract(images, vae, dest, plan)
    total = time.perf_counter() - begun
    shares = {name: round(seconds / total, 4) for name, seconds in tally.seconds.items()}
    return {"device": torch.cuda.get_device_name() if cuda else "CPU", "images": count, "images_per_second": round(count / total, 2),
            "share_of_time": shares}


def main():
    args = parse_arguments()
    from utils import distributed

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "images").mkdir()
        write_photographs(folder / "images", args.images)
        size = sum(file.stat().st_size for file in folder.rglob("*.jpg")) / args.images
        decoding, storing = decoding_rate(folder / "images"), storing_rate(folder / "stored")
        vae_rate = H100_FLOPS * CONVOLUTION_SHARE / encoder_flops()
        report = {
            "photographs": {"count": args.images, "mean_bytes": round(size), "pixels": [500, 375], "resolution": RESOLUTION},
            "per_second_of_one_core": {"images decoded and cropped": round(decoding), "samples stored": round(storing)},
            "decoding_by_wall_clock": threads_against_processes(folder / "images"),
            "profile": profile(folder / "images", folder / "latents", args.encode),
            "one_H100_by_arithmetic": {
                "encoder_GFLOP_per_image": round(encoder_flops() / 1e9), "images_per_second": round(vae_rate),
                "cores that decode for it": round(vae_rate / decoding, 1), "the same with xflip": round(vae_rate / 2 / decoding, 1),
                "share of one core that stores for it": round(vae_rate / storing, 3)},
        }
    print(json.dumps(report, indent=1))
    write_json(args.json, distributed.device(), **report)


if __name__ == "__main__":
    run(main)
