"""`python -m fid`: the published numbers of a set of images.

    python -m fid calc --images PATH --ref REF.npz          FID, sFID, IS, precision, recall of samples
    python -m fid ref --data PATH --dest REF.npz            statistics of a data set, to compare with later
    python -m fid REF.npz SAMPLES.npz                       the ADM evaluator's form of `calc`
    torchrun --nproc_per_node=8 -m fid calc ...             the same numbers on several processes

PATH is a folder of images (with its subfolders), a .zip or an .npz with arr_0.
"""

import argparse
import os
import sys

from utils import cli
from utils.cli import UserError
from utils.files import make_folder


def parse_args(argv):
    """Arguments of a command. Raises UserError for numbers out of range, and for a place where no file can be written at the end."""
    parser = argparse.ArgumentParser(prog="python -m fid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="calc | ref")
    calc = commands.add_parser("calc", help="numbers of a set of images against a reference")
    calc.add_argument("--images", required=True, metavar="PATH", help="the samples: folder, .zip or .npz")
    calc.add_argument("--ref", required=True, metavar="REF", help="ADM batch, EDM npz, file of `ref`, or another image set")
    calc.add_argument("--metrics", metavar="LIST", help="comma-separated: fid,sfid,is,precision,recall,kid "
                      "(default: of the first five, those that REF can serve)")
    calc.add_argument("--json", metavar="OUT", help="write the numbers with every setting behind them")
    calc.add_argument("--interval", action="store_true", help="95 %% interval of FID, and FID for infinitely many samples")
    calc.add_argument("--neighbours", metavar="OUT.png", help="picture of the samples closest to a real image, to see memorisation")
    ref = commands.add_parser("ref", help="statistics of a data set")
    ref.add_argument("--data", required=True, metavar="PATH", help="the data set: folder, .zip or .npz")
    ref.add_argument("--dest", required=True, metavar="REF.npz", help="file to write")
    ref.add_argument("--keep", type=int, default=0, metavar="N",
                     help="also store N random images, which precision and recall need (10000 in ADM's batches)")
    for command in (calc, ref):
        command.add_argument("--num", type=int, metavar="N", help="measure N random images instead of all")
        command.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
        command.add_argument("--batch", type=int, default=64, metavar="B", help="images at a time (default 64)")
        command.add_argument("--embedding", default="inception", metavar="NAME",
                             help="inception (default), pixels, classifier or timm:NAME; only inception's number is called FID")
        command.add_argument("--weights", metavar="FILE", help="weights of the embedding (default: in assets/)")
    if len(argv) >= 2 and argv[0] not in ("calc", "ref") and not argv[0].startswith("-") and not argv[1].startswith("-"):
        argv = ["calc", "--ref", argv[0], "--images", argv[1], *argv[2:]]
    args = parser.parse_args(argv)
    for option, least in (("batch", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} is {getattr(args, option)}, wanted at least {least}")
    if args.command == "ref" and not args.dest.endswith(".npz"):
        raise UserError(f"--dest {args.dest} has to end with .npz, or it cannot be read as a reference")
    if args.command == "ref" and os.path.realpath(args.dest) == os.path.realpath(args.data):
        raise UserError(f"--dest {args.dest} is the data set itself, which would be lost; give another file")
    for option in ("dest", "json", "neighbours"):
        path = getattr(args, option, None)
        if path and os.path.isdir(path):
            raise UserError(f"--{option} {path} is a folder; give the name of a file")
        if path:
            make_folder(os.path.dirname(path) or ".", f"--{option} {path}: its folder")
    return args


def calc(args):
    from fid.evaluate import Evaluator, format_result, save_neighbours, save_result
    from fid.sources import Source, holds
    from utils import distributed
    from utils.logging import say
    source = Source(args.images, args.num, args.seed)
    evaluator = Evaluator(args.ref, args.metrics, args.embedding, args.weights, len(source), args.interval,
                          keep_features=bool(args.neighbours), batch_size=args.batch, seed=args.seed, conversion="as stored")
    evaluator.add_all(source)
    result = evaluator.result()
    result["settings"]["images"] = source.name
    if holds(args.images, "mu"):
        result["warnings"].append(f"{args.images} is a reference itself (it holds mu and sigma) and was measured by its images arr_0; "
                                  "if that is not what you want, swap --images and --ref")
    say(format_result(result))
    if args.json:
        save_result(args.json, result)
    if args.neighbours and distributed.is_main():
        save_neighbours(args.neighbours, source, evaluator)


def ref(args):
    from fid.embeddings import make_embedding
    from fid.evaluate import embedding_settings
    from fid.sources import Source, holds
    from fid.statistics import FeatureStream, save_statistics
    from utils import distributed
    from utils.logging import say
    source = Source(args.data, args.num, args.seed)
    kept = Source(args.data, args.keep, args.seed, option="--keep") if args.keep else ()
    if len(source) < 2:
        raise UserError(f"{args.data}: {len(source)} images, a covariance needs at least 2 (and an FID thousands)")
    if holds(args.data, "mu"):
        say(f"warning: {args.data} is a reference itself: its mu and sigma are of a whole data set, those that are written now are of "
            f"its {len(source)} images arr_0; for published numbers give it to --ref as it is")
    embedding = make_embedding(args.embedding, args.weights)
    stream = FeatureStream(embedding)
    stream.add_source(source, args.batch, "reference", keep=False)
    gaussians = stream.gaussians()
    settings = {**embedding_settings(embedding), "conversion": "as stored", "num_images": len(source)}
    if distributed.is_main():
        save_statistics(args.dest, gaussians, settings, kept and kept.read(range(len(kept))))
    say(f"wrote {args.dest}: statistics of {len(source)} images" + (f", {len(kept)} of them kept for precision and recall" if kept else ""))


def main():
    args = parse_args(sys.argv[1:])
    from utils import distributed
    distributed.init()
    {"calc": calc, "ref": ref}[args.command](args)
    distributed.shutdown()


if __name__ == "__main__":
    cli.run(main)
