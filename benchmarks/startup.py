"""How long a user waits: --help, the first training step, the first image. Each in a process of its own.

    python -m benchmarks.startup --json benchmarks/results/startup.json
    python -m benchmarks.startup --compile --rounds 3

Processes take turns, round after round. Seconds are by the wall clock, from the launch to that moment; those of the first round stand
apart, because files are not yet in the system's cache then, nor kernels in the compiler's. Training is three steps on 64 random samples
with the settings of --config. Sampling is the image of seed 0, decoded by assets/demo-vae.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import make_parser, report, spread, start, write_random_latents
from utils.cli import PROJECT_ROOT, run
from utils.config import load_config

NUM_SAMPLES, NUM_STEPS = 64, 3
ENDED = "process ended"


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=7, settings=True)
    parser.add_argument("--config", default="configs/demo/fashion-mnist.yaml", help="of the training run (default: the demo's)")
    parser.add_argument("--compile", action="store_true", help="with compiled blocks")
    return parser.parse_args(argv)


def make_arms(args, folder):
    """{name: (arguments of Python, {moment: start of the line that is printed then})}. Sampling takes the training's checkpoint."""
    train = ["--config", args.config, *args.set, f"data.root={folder / 'latents'}", "data.xflip=false", f"log.results_dir={folder}",
             "log.exp_name=run", "log.log_every=1", "log.sample_every=0", f"train.max_num_steps={NUM_STEPS}",
             f"train.compile={args.compile}"]
    sample = ["--ckpt_path", str(folder / "run/checkpoints" / f"{NUM_STEPS:07d}.pt"), "--seeds", "0", "--vae", "assets/demo-vae",
              "--outdir", str(folder / "samples"), f"sample.compile={args.compile}"]
    return {"train_latent.py --help": (["train_latent.py", "--help"], {}), "generate.py --help": (["generate.py", "--help"], {}),
            "train_latent.py": (["train_latent.py", *train], {"first step": "step 1/", "last step": f"step {NUM_STEPS}/"}),
            "generate.py": (["generate.py", *sample], {"first image": "1 images"})}


def launch(arguments, moments, environment):
    """Run Python with these arguments: {moment: seconds since the launch}. Raises RuntimeError with what it printed if it fails."""
    reached, printed, begun = {}, [], time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=PROJECT_ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            printed.append(line)
            reached |= {moment: time.perf_counter() - begun for moment, text in moments.items() if line.startswith(text)}
    reached[ENDED] = time.perf_counter() - begun
    if process.returncode or reached.keys() != {*moments, ENDED}:
        raise RuntimeError(f"{' '.join(arguments)} ended with code {process.returncode}:\n{''.join(printed[-20:])}")
    return reached


def main():
    args = parse_arguments()
    device, model = start(args), load_config(PROJECT_ROOT / args.config, args.set).model
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (2 * model.in_channels, model.in_size, model.in_size)
        write_random_latents(folder / "latents", NUM_SAMPLES, shape, "float32", model.num_classes)
        environment = {"OMP_NUM_THREADS": str(args.threads), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiler")}
        for _ in range(1 + args.rounds):
            for result in ("run", "samples"):
                shutil.rmtree(folder / result, ignore_errors=True)
            for name, (arguments, moments) in make_arms(args, folder).items():
                for moment, value in launch(arguments, moments, environment).items():
                    seconds.setdefault((name, moment), []).append(value)
    rows = [{"command": name, "moment": moment, "first s": values[0], "s": spread(values[1:])}
            for (name, moment), values in seconds.items()]
    report(args, device, rows, ("command", "moment", "first s", "s"), compiled=args.compile)


if __name__ == "__main__":
    run(main)
