"""How fast images become latents: a real extraction of synthetic photographs (500x375 JPEGs), 256 px latents.

    python -m benchmarks.extraction --json benchmarks/results/extraction.json

The VAE has Stable Diffusion's shape and random weights, and computes as extract_latent.py does: in bf16 on a GPU, else in float32.
Decoding is also timed alone, in processor time: the rate of one core, whatever else runs.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.common import make_parser, report, spread, start
from utils.cli import run

RESOLUTION = 256
LEVELS = (128, 256, 512, 512)  # channels of Stable Diffusion's VAE


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--decode", type=int, default=200, help="photographs to decode in a round (default: %(default)s)")
    parser.add_argument("--encode", type=int, default=16, help="of them, how many to encode (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images through the VAE at once (default: %(default)s)")
    return parser.parse_args(argv)


def write_photographs(folder, count):
    """JPEGs of smooth noise, about 100 kB each, as ImageNet's photographs are."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (125, 167, 3), np.uint8))
        noise.resize((500, 375), Image.BICUBIC).save(folder / "class" / f"{i}.jpg", quality=90)


def measure(images, vae, folder, args):
    """[(images decoded and cropped per second of one core, images extracted per second) of each round]."""
    from dataset.extract import extract, make_plan

    rates = []
    for number in range(args.warmup + args.rounds):
        plan = make_plan(images, vae, "random", str(vae.vae.dtype), 0, args.encode, args.batch, "float16", 4096)
        begun = time.process_time()
        images.read(range(len(images)))
        decoding, begun = time.process_time() - begun, time.perf_counter()
        extract(images, vae, folder / str(number), plan)
        rates.append((len(images) / decoding, args.encode / (time.perf_counter() - begun)))
    return rates[args.warmup:]


def main():
    args = parse_arguments()
    device = start(args, tf32=False)  # as extract_latent.py
    import torch
    from diffusers import AutoencoderKL

    from dataset.images import open_images
    from models.autoencoder import Autoencoder

    vae = Autoencoder(AutoencoderKL(block_out_channels=LEVELS, layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
                                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name) / "images", args.decode)
        rates = measure(open_images(Path(name) / "images", RESOLUTION), vae, Path(name), args)
    names = "images decoded and cropped per second of one core", "images extracted per second"
    rows = [{"what": what, "number": spread(found)} for what, found in zip(names, zip(*rates))]
    report(args, device, rows, ("what", "number"), encoded=args.encode, batch=args.batch, resolution=RESOLUTION)


if __name__ == "__main__":
    run(main)
