"""What training does beside forward and backward passes: AdamW and EMA, each beside a loop over tensors, and writing checkpoints.

    python -m benchmarks.update --size S/2 --batchsize 8 --json benchmarks/results/update.json

Training waits for `copy`, which takes weights, EMA and moments to host memory, and for nothing else of a checkpoint. `step beside` is the
step after it, while the checkpoint is written (to TMPDIR); `rest` is what is then left until it is flushed to disk. All by the wall clock,
in turn.
"""

import copy
import tempfile
from pathlib import Path

from benchmarks.common import alternate, make_clock, make_parser, report, speedup, spread, start
from benchmarks.train import make_training
from utils.cli import run
from utils.config import load_config

COMPARED = {"AdamW": "AdamW, plain", "EMA": "EMA, plain", "copy": "step", "step beside": "step", "rest": "step"}


def parse_arguments(argv=None):
    return make_parser(__doc__, rounds=11, settings=True).parse_args(argv)


def make_arms(config, device, folder):
    """{name: function}, in the order in which they run."""
    import torch

    from benchmarks.reference import PlainTraining
    from training.checkpoint import CheckpointWriter
    from training.loop import TrainState

    state, step = make_training(config, "ours", device)
    plain, ours = PlainTraining(state.net, config.train, device), TrainState(copy.deepcopy(state.net), config, device)
    for parameter in (*plain.net.parameters(), *ours.net.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    writer = CheckpointWriter(folder, keep_last=1)
    writer.prepare(0, state.nbytes, 1)
    return {"AdamW, plain": plain.optimizer.step, "AdamW": ours.optimizer.step, "EMA, plain": plain.update_ema, "EMA": ours.ema.update,
            "step": step, "copy": lambda: writer.save(state.step, state.state_dict()), "step beside": step, "rest": writer.wait}


def main():
    args = parse_arguments()
    config = load_config(overrides=[f"model.model_type=DiT-{args.size}", f"train.batchsize={args.batchsize}", *args.set])
    device = start(args, config.train.tf32, config.train.deterministic)
    with tempfile.TemporaryDirectory() as folder:
        arms = make_arms(config, device, Path(folder))
        measured = alternate(arms, args, device, clock=make_clock(device, threads=None))
    rows = [{"what": name, "ms": spread(entry["seconds"], 1000), "compared with": COMPARED.get(name),
             "times faster": speedup(measured, COMPARED[name], name) if name in COMPARED else None} for name, entry in measured.items()]
    report(args, device, rows, ("what", "ms", "compared with", "times faster"), size=args.size, batch=args.batchsize)


if __name__ == "__main__":
    run(main)
