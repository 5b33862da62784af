"""Convert stored latents of any known format to the project's own, which loads fastest.

    python3 -m dataset.convert assets/imagenet_256_latent_lmdb data/imagenet256

Mirrored copies come along where there are any. Interrupted, the same command goes on where it was.
"""

import argparse
from pathlib import Path

from utils.cli import run

CHUNK = 4096  # labels looked through at once


def parse_arguments():
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
    return parser.parse_args()


def make_plan(source, args):
    """The `Plan` of converting the `LatentSet` source."""
    from dataset.store import Plan

    dtype = {"keep": source.dtype.name, "fp16": "float16", "fp32": "float32"}[args.store]
    chunks = (range(i, min(i + CHUNK, source.num_images)) for i in range(0, source.num_images, CHUNK))
    largest = max(int(source.read_labels(chunk).max()) for chunk in chunks)  # also finds labels that --num_classes does not allow
    num_classes = largest + 1 if source.num_classes is None else source.num_classes
    made_by = {"program": "dataset.convert", "source": Path(source.name).name}
    return Plan(source.num_images, source.sample_shape, dtype, source.mirrored, num_classes, tuple(source.class_names),
                source.scale, source.shift, args.vae or source.vae, args.shard_size, made_by, source.vae_digest)


def main():
    args = parse_arguments()
    from dataset.formats import find_latents
    from dataset.store import LatentWriter
    from utils.logging import Progress

    source = find_latents(args.source).expect_classes(args.num_classes)
    source.use_scale(args.scale, args.shift)
    source.mirrored = source.holds_mirrored
    plan = make_plan(source, args)
    writer = LatentWriter(args.dest, plan)
    pending = writer.pending()
    with Progress(plan.num_images, "converting", "images",
                  initial=plan.num_images - sum(len(plan.shard_range(shard)) for shard in pending)) as progress:
        for shard in pending:
            images = plan.shard_range(shard)
            moments, labels = source.read(images)
            mirrored = source.read([image + source.num_images for image in images])[0] if source.mirrored else None
            writer.write(shard, moments, labels, mirrored)
            progress.update(len(images))
    manifest = writer.finish()
    print(f"{args.dest}: complete, {manifest['num_images']:,} images{' and their mirrored copies' if plan.mirrored else ''}, "
          f"{plan.num_classes} classes, moments {plan.sample_shape} {plan.dtype}, scale {plan.scale}, shift {plan.shift}")


if __name__ == "__main__":
    run(main)
