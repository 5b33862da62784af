"""Download published weights, latents, reference statistics and data.

    python3 download_assets.py --list
    python3 download_assets.py --name vae --dest assets
    python3 download_assets.py --name maskdit-finetune0 imagenet256 --dest assets
"""

import argparse
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import cli
from utils.cli import UserError


@dataclass(frozen=True)
class File:
    """One file; it is fetched from the address of its place followed by `name`."""
    name: str
    size: int | None = None     # bytes, where known
    checksum: str = ""          # "sha256:" and the digits, or the first of them, where known
    unzip: bool = False         # extract it here, then delete it


@dataclass(frozen=True)
class Place:
    url: str                    # ends with /
    files: tuple[File, ...]


@dataclass(frozen=True)
class Asset:
    """Something to ask for by name: places that offer it, tried in this order."""
    name: str
    about: str
    places: tuple[Place, ...]
    folder: str = ""            # below --dest


def same_files(files, *urls):
    """Several places that offer the same files."""
    return tuple(Place(url, tuple(files)) for url in urls)


BUCKET = "https://maskdit-bucket.s3.us-west-2.amazonaws.com/"
MIRROR = "https://slurm-ord.s3.amazonaws.com/"
HUB = "https://huggingface.co/"
HUB_MASKDIT = HUB + "hzzheng/MaskDiT/resolve/main/"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"

VAE_FOLDER = [File("config.json"), File("diffusion_pytorch_model.safetensors")]
LATENT_LMDB = (
    Place(BUCKET, (File("imagenet_256_latent_lmdb.zip", unzip=True),)),
    Place(MIRROR + "datasets/imagenet_256_latent_lmdb/", (File("train/data.mdb"), File("train/lock.mdb"))),
)
LATENT_SHARDS = [File(f"latent_imagenet_512_train-{shard:04d}.tar") for shard in range(128)]
FASHION_MNIST = [
    File("train-images-idx3-ubyte.gz", 26421880, "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    File("train-labels-idx1-ubyte.gz", 29515, "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    File("t10k-images-idx3-ubyte.gz", 4422102, "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    File("t10k-labels-idx1-ubyte.gz", 5148, "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
]

ASSETS = (
    Asset("vae", "Stable Diffusion VAE as published with MaskDiT (latent-diffusion naming)",
          same_files([File("autoencoder_kl.pth")], BUCKET, MIRROR + "ckpts/")),
    Asset("vae-hub", "Stable Diffusion VAE, EMA decoder (diffusers folder)",
          same_files(VAE_FOLDER, HUB + "stabilityai/sd-vae-ft-ema/resolve/main/"), folder="sd-vae-ft-ema"),
    Asset("vae-hub-mse", "the same with the smoother MSE decoder",
          same_files(VAE_FOLDER, HUB + "stabilityai/sd-vae-ft-mse/resolve/main/"), folder="sd-vae-ft-mse"),
    Asset("maskdit-finetune0", "DiT-XL/2 256px tuned for guidance (FID 2.28 at cfg 1.5)",
          same_files([File("imagenet256-ckpt-best_with_guidance.pt")], BUCKET, MIRROR + "ckpts/256/", HUB_MASKDIT)),
    Asset("maskdit-finetune1", "DiT-XL/2 256px tuned for sampling without guidance (FID 5.69)",
          same_files([File("imagenet256-ckpt-best_without_guidance.pt")], BUCKET, MIRROR + "ckpts/256/", HUB_MASKDIT)),
    Asset("maskdit-trained", "DiT-XL/2 256px after masked pre-training, before tuning",
          same_files([File("2000000.pt")], BUCKET, MIRROR + "ckpts/256/", HUB_MASKDIT)),
    Asset("maskdit512-guidance", "DiT-XL/2 512px tuned for guidance (FID 2.50 at cfg 1.5)",
          same_files([File("1080000.pt")], MIRROR + "ckpts/512/", HUB_MASKDIT)),
    Asset("maskdit512-conditional", "DiT-XL/2 512px tuned for sampling without guidance (FID 10.79)",
          same_files([File("1050000.pt")], MIRROR + "ckpts/512/", HUB_MASKDIT)),
    Asset("imagenet-latent-data", "ImageNet 256px latents with mirrored images (LMDB)", LATENT_LMDB, folder="imagenet_256_latent_lmdb"),
    Asset("imagenet512-latent-wds", "ImageNet 512px latents (WebDataset shards)",
          same_files(LATENT_SHARDS, MIRROR + "datasets/imagenet-wds/"), folder="imagenet_512_latent_wds"),
    Asset("imagenet64", "ADM reference batch for FID at 64px", same_files([File("VIRTUAL_imagenet64_labeled.npz")], ADM + "64/")),
    Asset("imagenet128", "ADM reference batch at 128px", same_files([File("VIRTUAL_imagenet128_labeled.npz")], ADM + "128/")),
    Asset("imagenet256", "ADM reference batch at 256px", same_files([File("VIRTUAL_imagenet256_labeled.npz")], ADM + "256/")),
    Asset("imagenet512", "ADM reference batch at 512px", same_files([File("VIRTUAL_imagenet512.npz")], ADM + "512/")),
    Asset("inception", "Inception weights for FID",
          same_files([File("pt_inception-2015-12-05-6726825d.pth", checksum="sha256:6726825d")], INCEPTION)),
    Asset("fashion-mnist", "70,000 images of garments, 28x28, 10 classes (MIT licence)",
          same_files(FASHION_MNIST, "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                     "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"), folder="fashion-mnist"),
)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", nargs="+", default=[], metavar="NAME", help="what to download (see --list), or all")
    parser.add_argument("--dest", default="assets", type=Path, metavar="DIR", help="folder to put it in (default: assets)")
    parser.add_argument("--list", action="store_true", help="show every name and where its files go, then end")
    arguments = parser.parse_args()
    if not (arguments.list or arguments.name):
        parser.error("give --name or --list")
    return arguments


def find_assets(names):
    """The assets with these names, in this order and each once. Raises ValueError for an unknown one."""
    known = {asset.name: asset for asset in ASSETS}
    for name in names:
        if name != "all" and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UserError(f"--name {name} is unknown; the nearest is {nearest}, and --list shows all")
    return list(known.values()) if "all" in names else [known[name] for name in dict.fromkeys(names)]


def print_list(dest):
    for asset in ASSETS:
        files = asset.places[0].files
        sizes = [file.size for file in files]
        size = f", {sum(sizes) / 1e6:.1f} MB" if None not in sizes else ""
        names = files[0].name if len(files) == 1 else f"{files[0].name} .. {files[-1].name} ({len(files)} files)"
        print(f"{asset.name:<24}{asset.about}\n{'':<24}{names}{size} -> {dest / asset.folder}")


def download_asset(asset, dest):
    """Fetch `asset` from the first place that delivers it. Returns [] or, when none did, the answer of each place.

    A place takes over where the one before it failed: files that are complete are not fetched again.
    """
    from utils.download import PlaceFailed
    from utils.logging import say

    folder, answers = dest / asset.folder, []
    already_here = [place for place in asset.places if all(is_ready(file, folder) for file in place.files)]
    for place in already_here or asset.places:
        try:
            download_from(place, folder)
            say(f"{asset.name}: ready in {folder}")
            return []
        except PlaceFailed as answer:
            answers.append(str(answer))
            say(f"  {answer}")
    return answers


def is_ready(file, folder):
    from utils import download
    path = folder / file.name
    return download.is_unzipped(path, folder) if file.unzip else download.is_complete(path, file.size)


def download_from(place, folder):
    """Fetch every file of `place` into `folder`. Raises PlaceFailed with the address that failed and its answer."""
    from utils import download
    from utils.logging import say

    for number, file in enumerate(place.files, start=1):
        if is_ready(file, folder):
            continue
        url, path = place.url + file.name, folder / file.name
        say(f"{url} ({number} of {len(place.files)}) -> {path}")
        try:
            download.fetch(url, path, file.size, file.checksum)
            if file.unzip:
                download.unzip(path, folder)
        except (download.PlaceFailed, download.BadArchive) as answer:
            raise download.PlaceFailed(f"{url}: {answer}") from answer


def make_folder(dest):
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dest {dest} cannot be made ({error.strerror}); choose another folder") from error


def main():
    arguments = parse_arguments()
    if arguments.list:
        print_list(arguments.dest)
        return 0
    assets = find_assets(arguments.name)
    make_folder(arguments.dest)
    failed = {asset.name: answers for asset in assets if (answers := download_asset(asset, arguments.dest))}
    for name, answers in failed.items():
        print(f"error: no place delivered {name}:", *answers, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
