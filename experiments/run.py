"""Train and score the arms of an experiment, each on the same FLOPs; one JSON per arm and seed.

    python3 -m experiments.run --setting cpu --jobs 2               # seeds side by side, one core each
    python3 -m experiments.run --setting cpu --arms dit unmasked masked-50 tuned-const --seeds 0
    python3 -m experiments.figures --setting cpu                    # then: figures and docs/results.md

Ctrl-C, and the same command later, go on where it was. What is done (its JSON is there) is not done again. Checkpoints and
latents go to --work, the small results to --out.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

from experiments.settings import arm_config, flops_of_steps, flops_per_image, load_setting, plan
from utils.cli import EXIT_STOPPED, PROJECT_ROOT, StopNotice, UserError, run
from utils.files import make_folder

FASHION_MNIST = (PROJECT_ROOT / "assets" / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))  # the second: Debian's package
TRAIN_FILE = "train-images-idx3-ubyte.gz"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, help="name of a YAML file in experiments/: cpu | gpu")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values of the setting, as samples=100")
    parser.add_argument("--arms", nargs="+", help="only these (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these (default: those of the setting and of each arm)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's training files (default: assets, else Debian's)")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("results/experiments"), help="folder of checkpoints (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each in a process of its own (default 1)")
    return parser.parse_args(argv)


# ---- checks before any work

def find_training_images(folder):
    """Path of Fashion-MNIST's 60,000 training images."""
    for place in [folder] if folder else FASHION_MNIST:
        if (place / TRAIN_FILE).is_file():
            return place / TRAIN_FILE
    raise UserError(f"{TRAIN_FILE} is not in {' or '.join(map(str, [folder] if folder else FASHION_MNIST))}; "
                    f"`python3 download_assets.py --name fashion-mnist` fetches it")


def choose(args, setting):
    """[(arm, seed), ...] that the command asks for. Raises UserError for arms and seeds that there are not."""
    for arm in args.arms or ():
        if arm not in setting.arms:
            raise UserError(f"--arms {arm}: wanted some of {', '.join(setting.arms)}")
    for seed in args.seeds or ():
        if seed < 0:
            raise UserError(f"--seeds {seed}: wanted numbers of 0 or more")
    for name in ("jobs", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 1 or more")
    seeds, arms = dict.fromkeys(args.seeds or setting.seeds), dict.fromkeys(args.arms or setting.arms)  # each of them once
    chosen = [(arm, seed) for seed in seeds for arm in arms if args.seeds or seed in setting.arms[arm].get("seeds", setting.seeds)]
    if not chosen:
        raise UserError(f"--arms {' '.join(arms)}: none of them has one of the setting's seeds {setting.seeds}; name some with --seeds")
    return chosen


def check_results(chosen, setting, out, work):
    """Raise UserError if results in the folder `out` are of another setting, or a tuning arm has nothing to start from."""
    for path in [out / "real.json", *(out / f"{arm}-seed{seed}.json" for arm, seed in chosen)]:
        if path.is_file():
            check_same(path, setting)
    for number, (arm, seed) in enumerate(chosen):
        if setting.start(arm) and not (out / f"{arm}-seed{seed}.json").is_file():
            trunk, start_step = setting.start(arm)[0], plan(setting, arm)["start_step"]
            path = work / f"{trunk}-seed{seed}" / "checkpoints" / f"{start_step:07d}.pt"
            if (trunk, seed) not in chosen[:number] and not path.is_file():
                raise UserError(f"--arms {arm}, seed {seed}: it starts from {path}, which is not there; "
                                f"run {trunk} first, or name it before {arm}")


def check_same(path, setting):
    """Raise UserError if the JSON at `path` is of a setting with other values (other arms and seeds do not matter)."""
    try:
        then = json.loads(path.read_text())["setting"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of an experiment ({error!r}); move it away") from error
    now = dataclasses.asdict(setting)
    differing = [key for key in now if key not in ("arms", "seeds", "costs", "grid_columns") and then.get(key) != now[key]]
    if differing:
        raise UserError(f"{path} is of a setting with another {differing[0]} ({then.get(differing[0])} instead of {now[differing[0]]}); "
                        f"move it away, or give another --out and --work")


# ---- one run

class Stopwatch:
    """Seconds of training so far: CPU time on one thread, else the clock on the wall. Evaluations are left out."""

    def __init__(self, clock, seconds=0.0):
        self.clock, self.seconds, self.since = clock, seconds, clock()

    def pause(self):
        self.seconds += self.clock() - self.since

    def go_on(self):
        self.since = self.clock()


def train_arm(setting, arm, seed, data, scores, work, device, clock, notice):
    """Train one arm with `training.loop.fit`, in its own folder below `work`; returns (exit code, snapshots, draw).

    draw: Sampler.draw of the final EMA weights.
    """
    import torch

    from sampling.load import load_checkpoint
    from training.checkpoint import find_latest
    from experiments.scoring import Sampler
    from models import build_model
    from training.loop import TrainState, fit
    from training.start import start_from
    from utils.config import model_arguments

    planned = plan(setting, arm)
    every = planned["steps"] // planned["num_snapshots"]
    folder = work / f"{arm}-seed{seed}"
    config = arm_config(setting, arm, seed, eval={"every": every, "ref_path": "held-out"},
                        log={"log_every": every, "ckpt_every": every, "keep_last": 0})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_num_steps=planned["steps"]))
    torch.compiler.reset()  # the arms before have graphs of their own, and their number is limited
    torch.manual_seed(seed)
    state = TrainState(build_model(**model_arguments(config)).to(device), config, device)
    snapshots = []
    latest = find_latest(folder / "checkpoints")
    if latest is not None:
        state.resume(load_checkpoint(latest))
    elif setting.start(arm):
        trunk, _ = setting.start(arm)
        path = work / f"{trunk}-seed{seed}" / "checkpoints" / f"{planned['start_step']:07d}.pt"
        start_from(state, load_checkpoint(path), path, strict=True)
    if (folder / "metrics.jsonl").is_file():
        snapshots = [line for line in read_snapshots(folder) if line["step"] <= state.step]
    stopwatch = Stopwatch(clock, snapshots[-1]["train_s"] if snapshots else 0.0)
    sampler = Sampler(config, data, device)

    def evaluate(net, step):
        stopwatch.pause()
        done = step - state.start_step
        values = {"train_s": stopwatch.seconds, "flops": planned["start_flops"] + flops_of_steps(config, done, planned["steps"]),
                  **scores.score(sampler.draw(net, setting.samples))}
        stopwatch.go_on()
        return values

    if not snapshots or snapshots[-1]["step"] < state.end_step:
        folder.mkdir(parents=True, exist_ok=True)
        stopwatch.go_on()
        code = fit(state, folder, data.dataset, data.encode, notice, evaluate=evaluate)
        if code:
            return code, [], None
    return 0, read_snapshots(folder), functools.partial(sampler.draw, state.ema.net)


def read_snapshots(folder):
    """One dict for each step that was evaluated: the evaluation's numbers and those of training, which are a line before."""
    by_step = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        by_step.setdefault(line["step"], {}).update(line)
    return [values for values in by_step.values() if "train_s" in values]


def record(setting, arm, seed, snapshots, draw, scores, path, device):
    """Score the final samples, unguided and guided, keep some pictures, and write the run's JSON. draw: of train_arm."""
    from benchmarks.common import write_json
    from utils.config import to_dict

    config = arm_config(setting, arm, seed)
    if setting.final_samples == setting.samples:
        final = {key: snapshots[-1][key] for key in ("fd", "accuracy")}
    else:
        final = scores.score(draw(setting.final_samples))
    guided = scores.score(draw(setting.samples, setting.guided))
    if seed == setting.seeds[0]:
        save_samples(setting, config.model.num_classes, draw, path.with_suffix(".png"))
    planned = plan(setting, arm)
    write_json(path, device, arm=arm, seed=seed, title=setting.title(arm), setting=dataclasses.asdict(setting), **planned,
               start=setting.start(arm), config={key: to_dict(config)[key] for key in ("model", "train", "sample")},
               flops_per_image=[flops_per_image(config, progress) for progress in (0.0, 1.0)],
               snapshots=snapshots, final=final, guided=guided)


def save_samples(setting, num_classes, draw, path):
    """A PNG of guided samples, `grid_columns` per class and one class per row, without text: figures put labels to it."""
    import numpy as np

    from utils.images import save_png, tile

    classes = [index for index in range(num_classes) for _ in range(setting.grid_columns)]
    batches = draw(len(classes), setting.guided, classes)
    save_png(path, tile(np.concatenate([images for images, _ in batches]), setting.grid_columns))


# ---- all runs

def run_jobs(chosen, args, argv, logs):
    """Start this command again for every seed, `args.jobs` at a time; returns the first exit code that is not 0.

    chosen: [(arm, seed), ...]. What the processes say goes to logs/seedN.log; a signal is passed on to all of them.
    """
    from utils.logging import Progress, say

    arms = {}
    for arm, seed in chosen:
        arms.setdefault(seed, []).append(arm)
    waiting, running, code = list(arms), {}, 0
    results = [args.out / args.setting / f"{arm}-seed{seed}.json" for arm, seed in chosen]
    logs.mkdir(parents=True, exist_ok=True)
    with StopNotice() as notice, Progress(len(results), "experiment", "runs", every_s=300.0) as progress:
        while running or (waiting and not code):
            while waiting and len(running) < args.jobs and not notice.requested and not code:
                seed = waiting.pop(0)
                log = logs / f"seed{seed}.log"
                say(f"seed {seed}: {', '.join(arms[seed])}; what it says goes to {log}")
                command = [sys.executable, "-m", "experiments.run", *argv, "--jobs", "1", "--seeds", str(seed), "--arms", *arms[seed]]
                with open(log, "a") as file:
                    # a session of its own: a Ctrl-C on the terminal reaches it once, through this process
                    running[seed] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            time.sleep(1.0)
            if notice.requested and not code:
                code = EXIT_STOPPED
                for process in running.values():
                    process.terminate()
            for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                ended = running.pop(seed).returncode
                if ended and not code:
                    code = ended
                    say(f"seed {seed} ended with code {ended}; the end of {logs / f'seed{seed}.log'}:")
                    say("\n".join((logs / f"seed{seed}.log").read_text().splitlines()[-5:]))
            progress.update(sum(path.is_file() for path in results) - progress.n)
    return code


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    setting = load_setting(args.setting, args.set)
    chosen = choose(args, setting)
    out, work = args.out / setting.name, args.work / setting.name
    check_results(chosen, setting, out, work)
    from benchmarks.common import make_clock, start, write_json
    from dataset.images import open_images
    from experiments.scoring import Latents, Pixels, Scores, score_real
    from utils.logging import say

    images, device = open_images(find_training_images(args.data), 32), start(args)
    scores = Scores(device)
    make_folder(out, "--out")
    make_folder(work, "--work")
    clock = make_clock(device, args.threads)
    config = arm_config(setting, *chosen[0])
    data = {"latents": Latents, "pixels": Pixels}[setting.data](images, config, args.work, device)
    if not (out / "real.json").is_file():
        write_json(out / "real.json", device, setting=dataclasses.asdict(setting), rows=score_real(setting, data, images, scores))
    if args.jobs > 1:
        return run_jobs(chosen, args, argv, work)
    with StopNotice() as notice:
        for arm, seed in chosen:
            path = out / f"{arm}-seed{seed}.json"
            if path.is_file():
                say(f"{path} is there already")
                continue
            code, snapshots, draw = train_arm(setting, arm, seed, data, scores, work, device, clock, notice)
            if code:
                return code
            record(setting, arm, seed, snapshots, draw, scores, path, device)
            say(f"{path}: FD {snapshots[-1]['fd']:.3f} after {snapshots[-1]['train_s']:.0f} s of training")
    return 0


if __name__ == "__main__":
    run(main)
