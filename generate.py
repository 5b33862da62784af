"""Sample images from a checkpoint: PNGs, one .npz, or latents; with --ref_path also their FID and the other numbers of `python -m fid`.

    python3 generate.py --config configs/test/maskdit-latent-base.yaml --ckpt_path results/2075000.pt --class_idx 388 --cfg_scale 2.5
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from utils.cli import UserError, run
from utils.config import from_dict, gone_keys, load_config, to_dict

# Flags that set one key of the config's sample section each.
SAMPLE_FLAGS = {
    "cfg_scale": "guidance; 1 is off", "num_steps": "sampler steps", "batchsize": "images at once, per process",
    "S_churn": "stochasticity", "S_min": "churn from this sigma", "S_max": "churn up to this sigma", "S_noise": "scale of churn noise",
    "sigma_min": "last noise level", "sigma_max": "first noise level", "rho": "spacing of the EDM noise levels",
    "solver": "euler | heun", "discretization": "vp | ve | iddpm | edm", "schedule": "vp | ve | linear", "scaling": "vp | none",
    "amp": "precision of the network: no | bf16 | fp16",
}
FORMATS = ("png", "npz", "latents", "none")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Any key of the config can be given as key=value, for example sample.cfg_interval=[0.28,2.9].")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint, ours or a published one")
    parser.add_argument("--config", help="YAML file; not needed for our checkpoints, which carry their config")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="averaged weights (default) or the raw ones")
    parser.add_argument("--seeds", default="0-15", help="one image per seed, as in 0-49 or 3,7,10-19 (default 0-15)")
    parser.add_argument("--class_idx", nargs="+", help="class index or name, one or several (seed s gets number s mod count); "
                        "none: every seed draws its own class")
    parser.add_argument("--outdir", help="default: samples/CHECKPOINT_NAME")
    parser.add_argument("--format", choices=FORMATS, default="png", help="png files (default), one samples.npz (arr_0 uint8 NHWC), "
                        "latents.npz, or none (only the numbers of --ref_path)")
    parser.add_argument("--no_grid", action="store_true", help="do not draw grid.png of the first images")
    parser.add_argument("--vae", help="the same as vae.path=...: the autoencoder that decodes")
    parser.add_argument("--ref_path", help="reference statistics or images: compute all numbers that it can serve while sampling, into metrics.json "
                        "(eval.metrics=... chooses some, eval.embedding=... another embedding)")
    parser.add_argument("--num_process_per_node", type=int, help="start this many processes (one per GPU)")
    for name, text in SAMPLE_FLAGS.items():
        parser.add_argument(f"--{name}", help=f"the same as sample.{name}=...: {text}")
    return parser.parse_known_args(argv)


def parse_seeds(text):
    """'0-3,8' -> [0, 1, 2, 3, 8]. Raises ValueError for anything else, and for a seed named twice."""
    seeds = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UserError(f"--seeds {text}: wanted numbers and ranges such as 0-49 or 3,7,10-19")
        seeds += range(int(first), int(last if dash else first) + 1)
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text}: a seed is named twice; each seed makes one image")
    return seeds


def flag_overrides(args):
    """The command line's flags as key=value overrides."""
    overrides = [f"sample.{name}={getattr(args, name)}" for name in SAMPLE_FLAGS if getattr(args, name) is not None]
    if args.vae:
        overrides.append(f"vae.path={args.vae}")
    if args.ref_path:
        overrides.append(f"eval.ref_path={args.ref_path}")
    return overrides


def main():
    args, overrides = parse_arguments()
    overrides += flag_overrides(args)
    seeds = parse_seeds(args.seeds)
    load_config(args.config, overrides)  # misspelt keys fail here, before torch is imported
    if args.format == "none" and not args.ref_path:
        raise UserError("--format none writes nothing; it needs --ref_path, whose numbers are then the result")
    from utils import distributed

    if args.num_process_per_node and not distributed.launched():
        return distributed.launch(__file__, sys.argv[1:], args.num_process_per_node)
    distributed.init()
    code = sample(args, overrides, seeds)
    distributed.shutdown()
    return code


def sample(args, overrides, seeds):
    from utils import distributed
    from sampling.load import prepare_network
    from sampling.sample import generate, image_decoder
    from utils.logging import Progress, say
    from utils.precision import setup_backends, use_compile

    device = distributed.device()
    net, config, class_names = load_net(args, overrides, device)
    setup_backends(tf32=False, deterministic=True, compiled=use_compile(config.sample.compile, device))
    class_idx = resolve_classes(args.class_idx, net.num_classes, class_names)
    decode = image_decoder(config.vae, net.in_channels, device) if args.format != "latents" or args.ref_path else None
    evaluator = make_evaluator(config, len(seeds)) if args.ref_path else None
    outdir = Path(args.outdir or f"samples/{Path(args.ckpt_path).stem}")
    settings = claim_folder(outdir, args, config, class_idx)
    prepare_network(net, config.sample, device)

    started = time.monotonic()
    with OUTPUTS[args.format](outdir, seeds) as output:
        with Progress(len(seeds), "sampling", "img") as progress:
            at_once = min(len(seeds), config.sample.batchsize * distributed.world_size())

            def after_step(steps):
                progress.update(min(len(seeds) - progress.done, steps * at_once / config.sample.num_steps))

            done = output.has if evaluator is None else None
            for batch in generate(net, decode, seeds, config.sample, device, class_idx, after_step, done):
                output.write(batch)
                if evaluator is not None:
                    evaluator.add(batch.images, batch.index)
                if batch.index == 0 and not args.no_grid:
                    draw_first_grid(outdir / "grid.png", batch, bool(class_idx), class_names)
        distributed.barrier()
    rate = len(seeds) / (time.monotonic() - started)
    say(f"{len(seeds)} images, {rate:.3g} per second on {distributed.world_size()} process(es): {outdir}")
    if evaluator is not None:
        report_numbers(evaluator.result(), {**settings, "seeds": args.seeds}, outdir)
    return 0


# ------------------------------------------------------------------------------------------------ before sampling

def load_net(args, overrides, device):
    """The network with a checkpoint's weights, the Config it is sampled with, and its class names (or None)."""
    from sampling.load import infer_model_config, load_checkpoint, load_weights_into, weights_of
    from utils.class_names import load_imagenet_class_names
    from sampling.sample import build_model
    from utils.logging import say

    checkpoint = load_checkpoint(args.ckpt_path)
    weights = weights_of(checkpoint, args.which, args.ckpt_path)
    base = None
    if "config" in checkpoint:
        base = from_dict(checkpoint["config"], forgive=True)
        for key in gone_keys(checkpoint["config"]):
            say(f"{args.ckpt_path}: {key} is a key of an older version and has no effect any more")
    elif not args.config:
        base = dataclasses.replace(load_config(), model=infer_model_config(weights, args.ckpt_path))
    config = load_config(args.config, overrides, base)
    net = build_model(config.model).to(device).eval().requires_grad_(False)
    load_weights_into(net, weights, args.ckpt_path)
    class_names = checkpoint.get("class_names")
    if class_names is None and net.num_classes == 1000:
        class_names = load_imagenet_class_names()
    return net, config, class_names


def resolve_classes(class_idx, num_classes, class_names):
    """--class_idx, numbers or names, as a list of indices; [] when each seed draws its class."""
    from utils.class_names import resolve_class

    if not class_idx:
        return []
    if not num_classes:
        raise UserError(f"--class_idx {' '.join(class_idx)}: this model has no classes; leave --class_idx out")
    names = class_names or [str(index) for index in range(num_classes)]
    return [resolve_class(text, names) for text in class_idx]


def make_evaluator(config, num_images):
    from fid.evaluate import Evaluator

    return Evaluator.from_config(dataclasses.replace(config.eval, num_images=num_images))


def claim_folder(outdir, args, config, class_idx):
    """Make the output folder and note what is in it, which is returned; a folder with samples of other settings is refused."""
    from utils import distributed

    settings = {"ckpt_path": str(args.ckpt_path), "which": args.which, "class_idx": class_idx, "vae": config.vae.path,
                "sample": {key: value for key, value in to_dict(config)["sample"].items() if key != "batchsize"}}
    note = outdir / "settings.json"
    text = json.dumps(settings, indent=1).replace("Infinity", '"inf"')
    try:
        if not distributed.is_main():
            return json.loads(text)
        if note.is_file() and note.read_text() != text:
            raise UserError(f"{outdir} holds samples of other settings (see {note}); choose another --outdir")
        if outdir.is_dir() and any(outdir.iterdir()) and not note.is_file():
            raise UserError(f"{outdir} holds other files; choose another --outdir")
        outdir.mkdir(parents=True, exist_ok=True)
        for leftover in outdir.glob("part-*.npy"):  # of an interrupted run, perhaps with another batch size
            leftover.unlink()
        note.write_text(text)
        return json.loads(text)
    finally:
        distributed.barrier()


# ------------------------------------------------------------------------------------------------ outputs

class PngOutput:
    """One PNG per seed, OUTDIR/images/000123.png; batches that are there already are not sampled again."""

    def __init__(self, outdir, seeds):
        self.outdir = outdir

    def path(self, seed):
        return self.outdir / "images" / f"{seed:06d}.png"

    def has(self, seeds):
        return all(self.path(seed).is_file() for seed in seeds)

    def write(self, batch):
        from utils.images import save_png

        for seed, image in zip(batch.seeds, batch.images):
            unfinished = self.path(seed).with_suffix(".tmp")
            save_png(unfinished, image)
            unfinished.replace(self.path(seed))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class ArrayOutput:
    """One .npz of all samples, in the order of the seeds: every process writes parts, rank 0 joins them at the end."""

    filename, array_name = "samples.npz", "arr_0"

    def __init__(self, outdir, seeds):
        self.outdir, self.seeds, self.labels = outdir, seeds, {}

    def values(self, batch):
        return batch.images

    def has(self, seeds):
        return False

    def write(self, batch):
        import numpy as np

        np.save(self.outdir / f"part-{batch.index:06d}.npy", self.values(batch))
        if batch.class_labels is not None:
            self.labels |= dict(zip(batch.seeds, batch.class_labels.tolist()))

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *exception):
        if exception_type is None:
            self._join()

    def _join(self):
        """Stream the parts into the .npz, so that 50,000 images never are in memory at once."""
        import zipfile

        import numpy as np

        from utils import distributed

        labels = {}
        for gathered in distributed.all_gather_object(self.labels):
            labels |= gathered
        if not distributed.is_main():
            return
        parts = sorted(self.outdir.glob("part-*.npy"))
        first = np.load(parts[0], mmap_mode="r")
        small = {"seeds": np.array(self.seeds)}
        if labels:
            small["labels"] = np.array([labels[seed] for seed in self.seeds])
        unfinished = self.outdir / f"{self.filename}.tmp"
        with zipfile.ZipFile(unfinished, "w") as archive:
            with archive.open(f"{self.array_name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_2_0(stream, {"descr": first.dtype.str, "fortran_order": False,
                                                              "shape": (len(self.seeds), *first.shape[1:])})
                for part in parts:
                    stream.write(np.load(part).tobytes())
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.save(stream, array)
        unfinished.replace(self.outdir / self.filename)
        for part in parts:
            part.unlink()


class LatentOutput(ArrayOutput):
    """The same for latents (N, C, H, W) float32, scaled as the autoencoder's `decode` takes them."""

    filename, array_name = "latents.npz", "latents"

    def values(self, batch):
        return batch.latents.cpu().numpy()


class NoOutput(PngOutput):
    """Nothing on disk: the images only go into the metrics."""

    def has(self, seeds):
        return False

    def write(self, batch):
        pass


OUTPUTS = {"png": PngOutput, "npz": ArrayOutput, "latents": LatentOutput, "none": NoOutput}


def draw_first_grid(path, batch, by_class, class_names):
    """The first batch as one picture: a labelled row per class if classes were asked for (up to 16), else as it comes."""
    from sampling.sample import draw_class_rows, latents_to_uint8
    from utils.images import save_grid

    images = batch.images if batch.images is not None else latents_to_uint8(batch.latents)
    labels = batch.class_labels.tolist() if batch.class_labels is not None else []
    if by_class and len(set(labels)) <= 16:
        draw_class_rows(path, images, labels, class_names)
    else:
        save_grid(path, images[:64])


def report_numbers(result, settings, outdir):
    """Print the numbers and save them, with how they were measured and sampled, as OUTDIR/metrics.json."""
    from fid.evaluate import format_result, save_result
    from utils.logging import say

    say(format_result(result))
    result["settings"]["sampling"] = settings
    save_result(outdir / "metrics.json", result)


if __name__ == "__main__":
    run(main)
