"""Sample images from a checkpoint: PNGs, one .npz, or latents; with --ref_path also their FID and the other numbers of `python -m fid`.

    python3 generate.py --config configs/test/maskdit-latent-base.yaml --ckpt_path results/2075000.pt --class_idx 388 --cfg_scale 2.5
"""

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

from utils.class_names import resolve_class
from utils.cli import EXIT_BAD, UserError, parse_with_overrides, run
from utils.config import load_config

# Flags that set one key of the config's sample section each.
SAMPLE_FLAGS = {
    "cfg_scale": "guidance; 1 is off", "num_steps": "sampler steps", "batchsize": "images at once, per process",
    "S_churn": "stochasticity", "S_min": "churn from this sigma", "S_max": "churn up to this sigma", "S_noise": "scale of churn noise",
    "sigma_min": "last noise level", "sigma_max": "first noise level", "rho": "spacing of the EDM noise levels",
    "solver": "euler | heun", "discretization": "vp | ve | iddpm | edm", "schedule": "vp | ve | linear", "scaling": "vp | none",
    "amp": "precision of the network: no | bf16 | fp16",
}
MOST_SEEDS = 10_000_000  # of one command


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Any key of the config can be given as key=value, for example sample.cfg_interval=[0.28,2.9]. Other seeds with the same "
               "settings are added to the output folder. Those that are there are sampled again only with --ref_path. Another "
               "checkpoint or other settings need another --outdir. Exit code 3: images had NaN.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint, ours or a published one")
    parser.add_argument("--config", help="YAML file; not needed for our checkpoints, which carry their config")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="averaged weights (default) or the raw ones")
    parser.add_argument("--seeds", default="0-15", help="one image per seed, as in 0-49 or 3,7,10-19 (default 0-15)")
    parser.add_argument("--class_idx", nargs="+", help="class index or name, one or several (seed s gets number s mod count); "
                        "none: every seed draws its own class")
    parser.add_argument("--outdir", help="default: samples/RUN-CHECKPOINT")
    parser.add_argument("--format", choices=("png", "npz", "latents", "none"), default="png",
                        help="images/*.png and labels.csv (default), samples.npz, latents.npz, or none (only the numbers of --ref_path)")
    parser.add_argument("--vae", help="the same as vae.path=...: the autoencoder that decodes")
    parser.add_argument("--ref_path", help="reference statistics or images: compute all numbers that it can serve while sampling, into "
                        "metrics.json (eval.metrics=... chooses some, eval.embedding=... another embedding)")
    parser.add_argument("--num_process_per_node", type=int, help="start this many processes (one per GPU)")
    for name, text in SAMPLE_FLAGS.items():
        parser.add_argument(f"--{name}", help=f"the same as sample.{name}=...: {text}")
    args, overrides = parse_with_overrides(parser, argv)
    given = {f"sample.{name}": getattr(args, name) for name in SAMPLE_FLAGS} | {"vae.path": args.vae, "eval.ref_path": args.ref_path}
    return args, overrides + [f"{key}={value}" for key, value in given.items() if value is not None]


def parse_seeds(text):
    """'0-3,8' -> [0, 1, 2, 3, 8]. Raises UserError for anything else, too many seeds, and a seed named twice."""
    found = [re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in found if part]
    if len(ranges) < len(found) or not all(ranges):
        raise UserError(f"--seeds {text[:80]}: wanted numbers and ranges such as 0-49 or 3,7,10-19")
    count = sum(map(len, ranges))
    if count > MOST_SEEDS:
        raise UserError(f"--seeds {text[:80]}: these are {count:,} images; wanted at most {MOST_SEEDS:,} in one command")
    seeds = [seed for part in ranges for seed in part]
    if len(set(seeds)) != count:
        raise UserError(f"--seeds {text[:80]}: a seed is named twice; each seed makes one image")
    return seeds


def main():
    args, overrides = parse_arguments()
    seeds = parse_seeds(args.seeds)
    load_config(args.config, overrides)  # misspelt keys fail here, before torch is imported
    if args.format == "none" and not args.ref_path:
        raise UserError("--format none writes nothing; it needs --ref_path, whose numbers are then the result")
    from utils import distributed

    code = distributed.launch(sys.argv[0], sys.argv[1:], args.num_process_per_node)
    if code is not None:
        return code
    distributed.init()
    code = sample(args, overrides, seeds)
    distributed.shutdown()
    return code


def sample(args, overrides, seeds):
    """Check everything, sample what is not there yet, write it and, if asked for, measure it; returns the exit code."""
    from sampling.load import load_net, prepare_network
    from sampling.outputs import Output, claim_folder, settings_of
    from sampling.sample import batches_of, check_sampler, classes_of, describe_bad, generate, image_decoder, save_by_class
    from utils import distributed
    from utils.files import told
    from utils.logging import Progress, say
    from utils.precision import setup_backends, use_compile
    from utils.schema import notes

    device = distributed.device()
    net, config, class_names, latents = load_net(args.ckpt_path, args.which, args.config, overrides, device)
    setup_backends(tf32=False, deterministic=True, compiled=use_compile(config.sample.compile, device))
    prepare_network(net, config.sample, device)  # after the compiler has been told of its cores
    check_sampler(config.sample)
    for note in notes(config, device, "sample"):
        say(note)
    class_idx = resolve_classes(args.class_idx, net.num_classes, class_names)
    decode = evaluator = None
    if args.format != "latents" or args.ref_path:
        decode = image_decoder(config.vae, net.in_channels, device, latents, f"checkpoint {args.ckpt_path}")
    if args.ref_path:
        from fid.evaluate import Evaluator, format_result, save_result
        evaluator = Evaluator.from_config(dataclasses.replace(config.eval, num_images=len(seeds)))
    outdir = Path(args.outdir or default_folder(args.ckpt_path))
    settings = settings_of(config, args.ckpt_path, args.which, class_idx, decode)
    if distributed.is_main():
        claim_folder(outdir, settings)
    distributed.barrier()
    output = Output(outdir, args.format)
    there = output.seeds() if evaluator is None else set()
    todo = [seed for seed in seeds if seed not in there]
    distributed.barrier()  # all have looked before one writes

    started, steps = time.monotonic(), len(batches_of(todo, config.sample.batchsize)) * config.sample.num_steps
    with told(outdir), Progress(steps, "sampling", "step") as progress:
        bad = []
        for batch in generate(net, decode, todo, config.sample, device, class_idx, progress.update):
            output.write(batch)
            bad += batch.bad_seeds
            if evaluator is not None:
                evaluator.add(batch.images, batch.index)
            if batch.index == 0 and args.format != "latents":
                shown = 8 * (len(class_idx) or 8)
                labels = batch.class_labels[:shown].tolist() if class_idx else ()
                save_by_class(outdir / "grid.png", batch.images[:shown], labels, class_names)
        bad = sum(distributed.all_gather_object(bad), [])
        if distributed.is_main():
            output.finish(lambda seeds: classes_of(seeds, net, class_idx), class_names)
    rate = len(todo) / (time.monotonic() - started)
    already = f"; {len(seeds) - len(todo)} were there already" if len(todo) < len(seeds) else ""
    say(f"{len(todo)} images, {rate:.3g} per second on {distributed.world_size()} process(es){already}: {outdir}")
    if bad:
        say(f"WARNING: {describe_bad(bad, len(todo))}, which are not written and not measured. Try sample.amp=no vae.amp=no")
        return EXIT_BAD
    if evaluator is not None:
        result = evaluator.result()
        result["settings"]["sampling"] = settings | {"seeds": args.seeds}
        say(format_result(result))
        save_result(outdir / "metrics.json", result)
    return 0


def default_folder(ckpt_path):
    """samples/RUN-CHECKPOINT for a checkpoint in a run's folder, else samples/CHECKPOINT."""
    path = Path(ckpt_path).absolute()
    run_name = f"{path.parent.parent.name}-" if path.parent.name == "checkpoints" else ""
    return f"samples/{run_name}{path.stem}"


def resolve_classes(class_idx, num_classes, class_names):
    """--class_idx, numbers or names, as a list of indices; [] when each seed draws its class."""
    if class_idx and not num_classes:
        raise UserError(f"--class_idx {' '.join(class_idx)}: this model has no classes; leave --class_idx out")
    names = class_names or [str(index) for index in range(num_classes)]
    return [resolve_class(text, names) for text in class_idx or ()]


if __name__ == "__main__":
    run(main)
