"""Download published weights, latents, reference statistics and data.

    python3 download_assets.py --list
    python3 download_assets.py --name maskdit-finetune0 imagenet256 --dest assets
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import cli
from utils.files import make_folder


@dataclass(frozen=True)
class Asset:
    """Something to ask for by name. Archives (.zip) are extracted where they are, then deleted."""
    name: str
    about: str
    places: dict[str, dict[str, str]]  # {address: {file: its sha256, or first digits of it, or ""}}, tried in this order
    folder: str = ""            # below --dest


def same_files(names, *addresses):
    """Places that offer the same files."""
    return dict.fromkeys(addresses, dict.fromkeys(names, ""))


BUCKET = "https://maskdit-bucket.s3.us-west-2.amazonaws.com/"
MIRROR = "https://slurm-ord.s3.amazonaws.com/"
HUB = "https://huggingface.co/hzzheng/MaskDiT/resolve/main/"
CKPTS_256 = (BUCKET, MIRROR + "ckpts/256/", HUB)
CKPTS_512 = (MIRROR + "ckpts/512/", HUB)
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"

LATENT_LMDB = {BUCKET: {"imagenet_256_latent_lmdb.zip": ""},
               MIRROR + "datasets/imagenet_256_latent_lmdb/": {"train/data.mdb": "", "train/lock.mdb": ""}}
LATENT_SHARDS = [f"latent_imagenet_512_train-{shard:04d}.tar" for shard in range(128)]
FASHION_GITHUB = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FASHION_BUCKET = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}

ASSETS = (
    Asset("vae", "Stable Diffusion VAE as published with MaskDiT (latent-diffusion naming)",
          same_files(["autoencoder_kl.pth"], BUCKET, MIRROR + "ckpts/")),
    Asset("maskdit-finetune0", "DiT-XL/2 256px tuned for guidance (FID 2.28 at cfg 1.5)",
          same_files(["imagenet256-ckpt-best_with_guidance.pt"], *CKPTS_256)),
    Asset("maskdit-finetune1", "DiT-XL/2 256px tuned for sampling without guidance (FID 5.69)",
          same_files(["imagenet256-ckpt-best_without_guidance.pt"], *CKPTS_256)),
    Asset("maskdit-trained", "DiT-XL/2 256px after masked pre-training, before tuning", same_files(["2000000.pt"], *CKPTS_256)),
    Asset("maskdit512-guidance", "DiT-XL/2 512px tuned for guidance (FID 2.50 at cfg 1.5)", same_files(["1080000.pt"], *CKPTS_512)),
    Asset("maskdit512-conditional", "DiT-XL/2 512px tuned for sampling without guidance (FID 10.79)",
          same_files(["1050000.pt"], *CKPTS_512)),
    Asset("imagenet-latent-data", "ImageNet 256px latents with mirrored images (LMDB)", LATENT_LMDB, folder="imagenet_256_latent_lmdb"),
    Asset("imagenet512-latent-wds", "ImageNet 512px latents (WebDataset shards)",
          same_files(LATENT_SHARDS, MIRROR + "datasets/imagenet-wds/"), folder="imagenet_512_latent_wds"),
    *(Asset(f"imagenet{size}", f"ADM reference batch for FID at {size}px", same_files([f"VIRTUAL_imagenet{name}.npz"], f"{ADM}{size}/"))
      for size, name in ((64, "64_labeled"), (128, "128_labeled"), (256, "256_labeled"), (512, "512"))),
    Asset("inception", "Inception weights for FID", {INCEPTION: {"pt_inception-2015-12-05-6726825d.pth": "6726825d"}}),
    Asset("fashion-mnist", "70,000 images of garments, 28x28, 10 classes (MIT licence)",
          {FASHION_GITHUB: FASHION_FILES, FASHION_BUCKET: FASHION_FILES}, folder="fashion-mnist"),
)


def download_asset(asset, dest):
    """Fetch what is missing of `asset` from the first place that delivers it; returns [] or, if none did, the answer of each.

    A place whose files are all here comes first.
    """
    from utils.download import PlaceFailed, fetch, is_here
    from utils.logging import say

    folder, answers = dest / asset.folder, []
    for place, files in sorted(asset.places.items(), key=lambda place: not all(is_here(folder / name) for name in place[1])):
        try:
            for name, checksum in files.items():
                url = place + name
                fetch(url, folder / name, checksum)
        except PlaceFailed as answer:
            answers.append(f"{url}: {answer}")
            say(f"  {answers[-1]}")
        else:
            say(f"{asset.name}: ready in {folder}")
            return []
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--name", nargs="+", metavar="NAME", choices=["all", *(asset.name for asset in ASSETS)],
                      help="what to download (see --list), or all")
    task.add_argument("--list", action="store_true", help="show every name and where its files go, then end")
    parser.add_argument("--dest", default="assets", type=Path, metavar="DIR", help="folder to put it in (default: assets)")
    arguments = parser.parse_args()
    if arguments.list:
        for asset in ASSETS:
            files = list(next(iter(asset.places.values())))
            print(f"{asset.name:<24}{asset.about}\n{'':<24}{files[0]} ({len(files)} files) -> {arguments.dest / asset.folder}")
        return 0
    make_folder(arguments.dest, "--dest")
    chosen = [asset for asset in ASSETS if asset.name in arguments.name or "all" in arguments.name]
    failed = {asset.name: answers for asset in chosen if (answers := download_asset(asset, arguments.dest))}
    for name, answers in failed.items():
        print(f"error: no place delivered {name}:", *answers, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
