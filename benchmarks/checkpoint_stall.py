"""How long a checkpoint holds up training: the copy to host memory, as a share of a step; and how long it takes to be on disk.

    python -m benchmarks.checkpoint_stall --model DiT-S/2 --batchsize 8 --json benchmarks/results/checkpoint_stall.json
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.common import add_common_arguments, print_table, scaled, spread, start, write_json
from utils.cli import run

COLUMNS = ("model", "batch", "GB", "ms/step", "stall ms", "stall / step", "on disk s", "x step while writing")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--in_size", type=int, default=32, help="height and width of the latents (default 32)")
    parser.add_argument("--batchsize", type=int, default=8, help="images per step (default 8)")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: a temporary folder)")
    add_common_arguments(parser, rounds=7)
    return parser.parse_args()


def make_training(args, device):
    """(TrainState, function that does one step and waits for it)."""
    import torch

    from models import EDMLoss, sample_moments
    from utils.config import load_config
    from sampling.sample import build_model
    from training.loop import TrainState, train_step

    config = load_config(None, [f"model.model_type={args.model}", f"model.in_size={args.in_size}", f"train.batchsize={args.batchsize}"])
    state = TrainState(build_model(config.model, config.train).to(device), config, device)
    loss = EDMLoss(patch_size=state.net.patch_size)
    moments = torch.randn(args.batchsize, 8, args.in_size, args.in_size, device=device)
    labels = torch.arange(args.batchsize, device=device)
    generator = torch.Generator(device)

    def step():
        train_step(state, state.net, loss, moments, labels, sample_moments, generator)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return state, step


def timed(function, *arguments):
    """Wall-clock seconds of a call: writing does not count as CPU time."""
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def measure(state, step, folder, args):
    """One table row: steps, saves and steps beside a save that is being written, in turn."""
    from training.checkpoint import CheckpointWriter

    writer = CheckpointWriter(folder, keep_last=1)
    writer.prepare(0, state.nbytes, 1)
    seconds = {name: [] for name in ("step", "stall", "beside", "disk")}
    for number in range(args.warmup + args.rounds):
        one = {"step": timed(step)}
        saved_at = time.perf_counter()
        one["stall"] = timed(lambda: writer.save(number, state.state_dict()))
        one["beside"] = timed(step)
        writer.wait()
        one["disk"] = time.perf_counter() - saved_at
        if number >= args.warmup:
            for name, value in one.items():
                seconds[name].append(value)
    shares = spread([stall / step for stall, step in zip(seconds["stall"], seconds["step"])])
    slowdown = spread([beside / step for beside, step in zip(seconds["beside"], seconds["step"])])
    milliseconds = {name: scaled(spread(seconds[name]), 1000) for name in ("step", "stall")}
    return {"model": args.model, "batch": args.batchsize, "GB": state.nbytes / 1e9, "ms/step": milliseconds["step"],
            "stall ms": milliseconds["stall"], "stall / step": shares, "on disk s": spread(seconds["disk"]),
            "x step while writing": slowdown}


def main():
    args = parse_arguments()
    device = start(args)
    state, step = make_training(args, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(state, step, Path(folder), args)
    print_table([row], COLUMNS)
    write_json(args.json, device, in_size=args.in_size, rows=[row])


if __name__ == "__main__":
    run(main)
