"""How fast images become latents: a real extraction of synthetic photographs (500x375 JPEGs), 256 px latents.

    python -m benchmarks.extraction --json benchmarks/results/extraction.json

The VAE has Stable Diffusion's shape and random weights. Decoding is also timed alone, in processor time: the rate of one core, whatever
else runs.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.common import make_parser, report, spread, start
from utils.cli import run

RESOLUTION = 256


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--decode", type=int, default=200, help="photographs to decode in a round (default: %(default)s)")
    parser.add_argument("--encode", type=int, default=16, help="of them, how many to encode (default: %(default)s)")
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
    """{what: number of each round}."""
    from dataset.extract import extract, make_plan

    found = {}
    for number in range(args.warmup + args.rounds):
        begun = time.process_time()
        images.read(range(len(images)))
        one = {"images decoded and cropped per second of one core": len(images) / (time.process_time() - begun)}
        plan = make_plan(images, vae, "random", str(vae.vae.dtype), 0, args.encode, 8, "float16", 4096)
        begun = time.perf_counter()
        extract(images, vae, folder / str(number), plan)
        one |= {"images extracted per second": args.encode / (time.perf_counter() - begun)}
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: values[args.warmup:] for name, values in found.items()}


def main():
    args = parse_arguments()
    device = start(args)
    import torch
    from diffusers import AutoencoderKL

    from dataset.images import open_images
    from models.autoencoder import Autoencoder

    vae = Autoencoder(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                    scaling_factor=0.18215))
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name) / "images", args.decode)
        found = measure(open_images(Path(name) / "images", RESOLUTION), vae, Path(name), args)
    rows = [{"what": what, "number": spread(values)} for what, values in found.items()]
    report(args, device, rows, ("what", "number"), encoded=args.encode, resolution=RESOLUTION)


if __name__ == "__main__":
    run(main)
