"""Encode images with a VAE into stored latents, the data of train_latent.py.

    python3 extract_latent.py IMAGES data/latents --vae assets/autoencoder_kl.pth --resolution 256 --xflip

IMAGES: a folder with one sub-folder per class, a folder of images without classes, a zip of either (with or without the
dataset.json of EDM's dataset tool), an npz (arr_0, labels), or an idx images file as of MNIST. Images are turned as their EXIF
says, brought to 8 bits (the upper byte of 16; floats must lie in 0..1), laid on white where they are transparent, and
centre-cropped as in ADM. The set keeps the VAE's scale, shift and digest, so that sampling can tell a wrong VAE.
Several GPUs: torchrun --standalone --nproc_per_node 8 extract_latent.py ...
Interrupted, the same command goes on where it was; the result is the same to the byte.
"""

import argparse
from pathlib import Path

from utils import cli
from utils.cli import UserError


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="IMAGES", help="what to encode")
    parser.add_argument("dest", metavar="DEST", help="folder of the stored latents: a new one, or one to go on with")
    parser.add_argument("--vae", default="assets/autoencoder_kl.pth", metavar="PATH_OR_ID",
                        help="diffusers folder or hub id, or a latent-diffusion .pth (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels of a side after the crop (default: %(default)s)")
    parser.add_argument("--xflip", action="store_true", help="store the encodings of the mirrored images too")
    parser.add_argument("--first", type=int, default=0, help="number of the first image, in the order of names (default: 0)")
    parser.add_argument("--num_images", type=int, help="how many images from there on (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="images through the VAE at once (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="arithmetic of the VAE (default: bf16 on a GPU, else fp32)")
    parser.add_argument("--store", choices=("fp16", "fp32"), default="fp16", help="type of the stored moments (default: fp16)")
    parser.add_argument("--shard_size", type=int, default=4096,
                        help="images per file, and the most that an interruption costs (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, help="threads that decode images (default: the processor cores)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read")
    return parser.parse_args()


def main():
    args = parse_arguments()
    import torch

    from dataset.extract import extract, make_plan
    from dataset.images import open_images
    from models import load_autoencoder
    from utils import distributed
    from utils.logging import say
    from utils.precision import setup_backends

    if args.num_workers is not None and args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers} must be at least 1")
    distributed.init(timeout_s=7 * 86400)  # a process that is done waits for the slowest
    images = open_images(args.images, args.resolution, args.xflip)
    setup_backends(tf32=False, deterministic=True)
    device = distributed.device()
    types = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    vae_dtype = types[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    vae = load_autoencoder(args.vae, device)
    vae_name = Path(args.vae).name if Path(args.vae).exists() else args.vae  # the set names no place of this machine
    plan = make_plan(images, vae, vae_name, vae_dtype, args.first, args.num_images, args.batch, types[args.store], args.shard_size)
    vae = vae.to(dtype=getattr(torch, vae_dtype), memory_format=torch.channels_last)
    say(f"{args.images}: {plan.num_images:,} images, {images.num_classes or 'no'} classes -> {args.dest}, "
        f"moments {plan.sample_shape} {plan.dtype}{', mirrored copies too' if plan.mirrored else ''}")
    manifest, bad = extract(images, vae, args.dest, plan, args.skip_bad, args.num_workers)
    bad = [error for errors in distributed.all_gather_object(bad) for error in errors]
    for _, error in bad:
        say(error)
    if manifest is not None:
        say(f"{args.dest}: complete, {manifest['num_images']:,} images, {len(manifest['skipped'])} left out")
    distributed.shutdown()
    if manifest is None:
        raise UserError(f"{len(bad)} images of {args.images} cannot be read, the first is {bad[0][0]}; replace them or give "
                        f"--skip_bad, then run the same command again: finished shards are kept")


if __name__ == "__main__":
    cli.run(main)
