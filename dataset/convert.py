"""Convert stored latents of any known format to the project's own, which loads fastest.

    python3 -m dataset.convert assets/imagenet_256_latent_lmdb data/imagenet256

Mirrored copies come along where there are any. Interrupted, the same command goes on where it was.
"""

import argparse
from pathlib import Path

from utils.cli import run


def main():
    parser = argparse.ArgumentParser(prog="python3 -m dataset.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="stored latents of any format (see dataset/formats.py)")
    parser.add_argument("dest", metavar="DST", help="folder to write: a new one, or one to go on with")
    parser.add_argument("--store", choices=("keep", "fp16", "fp32"), default="keep",
                        help="type of the stored moments; fp16 halves size and reading (default: %(default)s)")
    parser.add_argument("--num_classes", type=int, help="where the source does not say (default: its largest label + 1)")
    parser.add_argument("--scale", type=float, help="latents = scale * (z - shift), where the source does not say and its VAE is unusual")
    parser.add_argument("--shift", type=float)
    parser.add_argument("--vae", default="", help="name of the VAE, a note for later")
    parser.add_argument("--shard_size", type=int, default=4096, help="samples per file (default: %(default)s)")
    args = parser.parse_args()

    from dataset.formats import find_latents
    from dataset.store import LatentWriter, Plan
    from utils.logging import Progress

    source = find_latents(args.source).expect_classes(args.num_classes)
    source.use_scale(args.scale, args.shift)
    source.mirrored = source.holds_mirrored
    labels = source.read_labels(range(source.num_images))  # tells labels that --num_classes does not allow
    plan = Plan(num_images=source.num_images, sample_shape=source.sample_shape, mirrored=source.mirrored,
                dtype={"keep": source.dtype.name, "fp16": "float16", "fp32": "float32"}[args.store],
                num_classes=int(labels.max()) + 1 if source.num_classes is None else source.num_classes, class_names=source.class_names,
                scale=source.scale, shift=source.shift, vae=args.vae or source.vae, vae_digest=source.vae_digest,
                shard_size=args.shard_size, made_by={"program": "dataset.convert", "source": Path(source.name).name})
    writer = LatentWriter(args.dest, plan)
    shards = {shard: plan.shards[shard] for shard in writer.pending()}
    with Progress(sum(map(len, shards.values())), "converting", "images") as progress:
        for shard, images in shards.items():
            moments, labels = source.read(images)
            mirrored = source.read([image + source.num_images for image in images])[0] if source.mirrored else None
            writer.write(shard, moments, labels, mirrored)
            progress.update(len(images))
    writer.finish()
    print(f"{args.dest}: complete, {plan}")


if __name__ == "__main__":
    run(main)
