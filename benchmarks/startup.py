"""How long a user waits: --help of every script, imports, the first training step, the first image. Each in a fresh process.

    python -m benchmarks.startup --json benchmarks/results/startup.json
    python -m benchmarks.startup --arms train generate --compile --rounds 3

Processes take turns, round after round; the warm-up round leaves the files in the system's cache. `wall s` is what a user waits from
the launch to that moment, `CPU s` the processor time of the process until then, which other programs disturb less. Training is three
steps on 64 random samples with the settings of --config, sampling is the image of seed 0, decoded by assets/demo-vae; `compiled` does
both with compiled blocks, once with an empty compiler cache and once with the cache that this left.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT, add_common_arguments, print_table, spread, start, write_json
from utils.cli import run

ARMS = ("help", "imports", "train", "generate")
IMPORTS = ("torch", "training.loop", "sampling.sample", "fid.evaluate")  # the first is the yardstick of the others
NUM_SAMPLES, NUM_STEPS = 64, 3
ENDED = "process ended"
COLUMNS = ("command", "moment", "wall s", "CPU s")


class Arm(NamedTuple):
    """A command of Python to launch, and what there is to know about it."""

    arguments: list
    moments: dict  # {name: start of the line that is printed then}
    cache: Path | None = None  # the compiler's; None: nothing is compiled
    fresh: tuple = ()  # folders that are removed before each launch


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo/fashion-mnist.yaml", help="of the training run (default: the demo's)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings of the config, as model.depth=2")
    parser.add_argument("--compile", action="store_true", help="train and sample with compiled blocks too")
    add_common_arguments(parser, rounds=7)
    return parser.parse_args(argv)


def commands():
    """Everything that can be run: scripts by path, modules of the packages as `python -m` takes them."""
    scripts = [path.name for path in sorted(ROOT.glob("*.py"))]
    files = [path.relative_to(ROOT) for folder in ("scripts", "utils", "fid", "benchmarks", "experiments") for path in sorted(ROOT.glob(f"{folder}/*.py"))
             if '__name__ == "__main__"' in path.read_text() or path.name == "__main__.py"]
    tools = [str(path) for path in files if path.parts[0] == "scripts"]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in files if path.parts[0] != "scripts"]
    return scripts + tools + modules


def help_arms():
    return {f"{name} --help": Arm([name, "--help"] if name.endswith(".py") else ["-m", name, "--help"], {}) for name in commands()}


def import_arms():
    return {f"import {name}": Arm(["-c", f"import {name}"], {}) for name in IMPORTS}


def training_arms(args, folder):
    """{name: Arm} of training runs that leave their checkpoint under folder/NAME."""
    moments = {"first step": "step 1/", "last step": f"step {NUM_STEPS}/"}
    arms = {}
    for name, cache, fresh in _modes(args, folder):
        results = "eager" if cache is None else "compiled"  # one folder for both compiled runs: checkpoints can be large
        arguments = ["train_latent.py", "--config", str(args.config), *args.set, f"data.root={folder / 'latents'}", "data.xflip=false",
                     f"log.results_dir={folder}", f"log.exp_name={results}", f"train.max_num_steps={NUM_STEPS}", "log.log_every=1",
                     "log.sample_every=0", f"train.compile={cache is not None}"]
        arms[f"train_latent.py, {name}"] = Arm(arguments, moments, cache, (folder / results, *fresh))
    return arms


def sampling_arms(args, folder):
    """{name: Arm} of sampling from the checkpoint of the eager training run."""
    checkpoint = folder / "eager" / "checkpoints" / f"{NUM_STEPS:07d}.pt"
    ways = [("eager, latents only", None, (), ["--format", "latents"]), *((*mode, []) for mode in _modes(args, folder))]
    arms = {}
    for name, cache, fresh, options in ways:
        outdir = folder / f"samples {name}"
        arguments = ["generate.py", "--ckpt_path", str(checkpoint), "--seeds", "0", "--vae", "assets/demo-vae", "--outdir", str(outdir),
                     f"sample.compile={cache is not None}", *options]
        arms[f"generate.py, {name}"] = Arm(arguments, {"first image": "1 images"}, cache, (outdir, *fresh))
    return arms


def _modes(args, folder):
    """(name, compiler cache, folders to remove first) of each way to run."""
    yield "eager", None, ()
    if args.compile:
        cache = folder / "compiler-cache"
        yield "compiled, empty cache", cache, (cache,)
        yield "compiled, full cache", cache, ()


def write_latents(folder, config):
    """Random moments of the shape that the config's model takes."""
    import numpy as np

    from dataset.store import LatentWriter, Plan

    rng, model = np.random.default_rng(0), config.model
    shape = (2 * model.in_channels, model.in_size, model.in_size)
    writer = LatentWriter(folder, Plan(NUM_SAMPLES, shape, "float32", False, model.num_classes, (), 0.18215, 0.0, ""))
    labels = rng.integers(max(1, model.num_classes), size=NUM_SAMPLES)
    writer.write(0, rng.standard_normal((NUM_SAMPLES, *shape), np.float32), labels)
    writer.finish()


def launch(arm, threads):
    """Run the arm's command: {moment: (seconds since the launch, processor seconds of the process)}.

    Raises RuntimeError with what it printed if it fails.
    """
    for folder in arm.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if arm.cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(arm.cache)
    reached, printed = {}, []
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, *arm.arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            printed.append(line)
            reached |= {moment: (time.perf_counter() - begun, _processor_seconds(process.pid))
                        for moment, text in arm.moments.items() if line.startswith(text)}
        _, status, usage = os.wait4(process.pid, 0)  # as Popen.wait, and with the processor time
        process.returncode = os.waitstatus_to_exitcode(status)
    reached[ENDED] = time.perf_counter() - begun, usage.ru_utime + usage.ru_stime
    if process.returncode or reached.keys() != {*arm.moments, ENDED}:
        raise RuntimeError(f"{' '.join(arm.arguments)} ended with code {process.returncode}:\n{''.join(printed[-20:])}")
    return reached


def _processor_seconds(pid):
    """User and system time of a running process so far, by Linux's count (proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(arms, args):
    """Table rows: one per arm and moment."""
    seconds = {}
    for number in range(args.warmup + args.rounds):
        for name, arm in arms.items():
            reached = launch(arm, args.threads)
            if number >= args.warmup:
                for moment, pair in reached.items():
                    seconds.setdefault((name, moment), []).append(pair)
        print(f"  round {number + 1} of {args.warmup + args.rounds}", end="\r", file=sys.stderr, flush=True)
    return [{"command": name, "moment": moment} | {column: spread(values) for column, values in zip(("wall s", "CPU s"), zip(*pairs))}
            for (name, moment), pairs in seconds.items()]


def main():
    from utils.config import load_config

    args = parse_arguments()
    device = start(args)
    config = load_config(args.config, args.set)
    arms = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "help" in args.arms:
            arms |= help_arms()
        if "imports" in args.arms:
            arms |= import_arms()
        if {"train", "generate"} & {*args.arms}:  # sampling needs the checkpoint of the training
            write_latents(folder / "latents", config)
            arms |= training_arms(args, folder)
        if "generate" in args.arms:
            arms |= sampling_arms(args, folder)
        rows = measure(arms, args)
    print_table(rows, COLUMNS)
    write_json(args.json, device, rows=rows)


if __name__ == "__main__":
    run(main)
