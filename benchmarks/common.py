"""What the benchmarks share: arms that take turns, clocks, memory, tables and JSON files."""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from utils.cli import PROJECT_ROOT, UserError
from utils.files import make_folder, told, write_whole

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough that memory does not limit the product


def make_parser(text, rounds=None, settings=False, arms=()):
    """An argument parser with what all benchmarks take.

    rounds: their default number, None for what measures nothing. settings: with keys of the config. arms: those of a comparison of
    networks, which is made for one size, precision and batch.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        add_round_arguments(parser, rounds)
        parser.add_argument("--device", help="as cpu or cuda:1 (default: the GPU if there is one)")
    if settings:
        parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="more settings, as model.in_size=64")
        parser.add_argument("--size", default="S/2", help="of the paper's table, as S/2 B/2 XL/2 (default %(default)s)")
        parser.add_argument("--batchsize", type=int, default=8, help="images at once (default %(default)s)")
    if arms:
        parser.add_argument("--arms", nargs="+", default=arms[:3], choices=arms, help="default: the first three")
        parser.add_argument("--amp", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser


def add_round_arguments(parser, rounds):
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds; in each, every arm runs once (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not counted (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")


def start(args, tf32=True, deterministic=True):
    """Check the arguments of make_parser, make the folder of --json, set the process-wide switches, and return the device to measure on.

    The switches are those of training by default, where blocks are compiled; see utils.precision.setup_backends.
    """
    for name, smallest in (("rounds", 1), ("warmup", 0), ("threads", 1)):
        if getattr(args, name, smallest) < smallest:
            raise UserError(f"--{name} {getattr(args, name)}: wanted {smallest} or more")
    if getattr(args, "json", None) is not None:
        make_folder(args.json.parent, "--json")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, prints a line whenever it starts or stops
    import torch

    from utils import distributed
    from utils.precision import setup_backends

    wanted = getattr(args, "device", None)
    if wanted and not re.fullmatch(r"cpu|cuda(:\d+)?", wanted) or "cuda" in (wanted or "") and not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: wanted cpu or, where there are GPUs, cuda or cuda:NUMBER")
    if hasattr(args, "threads"):
        torch.set_num_threads(args.threads)
    setup_backends(tf32, deterministic, compiled=True)
    return torch.device(wanted) if wanted else distributed.device()


# ---- time and memory

def make_clock(device, threads):
    """A function that waits for the device and returns seconds.

    On one CPU thread it counts the process's CPU time, which other programs disturb less than the wall clock; else it is the wall clock.
    """
    import torch

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if device.type == "cpu" and threads == 1 else time.perf_counter()

    return clock


def alternate(arms, args, device, memory=False, clock=None):
    """Run the arms in turn, round after round: {name: {"seconds": [per round], "first_s", "peak_bytes"}}.

    arms: {name: function without arguments}. clock: None for make_clock's. first_s: seconds of the first call by the wall clock,
    compilation included.
    peak_bytes: the most memory that the arm needed beyond what was there before its first call. It is measured in the warm-up rounds
    if `memory`, and there must be two: what the first call leaves behind, such as AdamW's moments, counts in the second.
    """
    clock = clock or make_clock(device, args.threads)
    measured = {name: {"seconds": [], "first_s": None, "peak_bytes": None} for name in arms}
    kept = dict.fromkeys(arms, 0)  # bytes that an arm's calls have left behind
    for number, (name, run) in itertools.product(range(args.warmup + args.rounds), arms.items()):
        entry, begun, wall_begun = measured[name], clock(), time.perf_counter()
        if memory and number < args.warmup and args.warmup >= 2:
            _, needed, left = watch_memory(run, device)
            entry["peak_bytes"] = max(kept[name] + needed, entry["peak_bytes"] or 0)
            kept[name] += left
        else:
            run()
        seconds = clock() - begun
        if number == 0:
            entry["first_s"] = time.perf_counter() - wall_begun
        if number >= args.warmup:
            entry["seconds"].append(seconds)
    return measured


def watch_memory(run, device):
    """(what run() returns, the most bytes of tensors that it needed at once, the bytes that it left)."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    # on a CPU torch's profiler counts them
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as observed:
        result = run()
    changes = [event for event in observed.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = list(itertools.accumulate((event.nbytes() for event in changes), initial=0))
    return result, max(held), held[-1]


def spread(values, factor=1):
    """{"median", "lowest", "highest"} of some numbers, each times `factor`."""
    return {"median": factor * statistics.median(values), "lowest": factor * min(values), "highest": factor * max(values)}


def speedup(measured, slow, fast):
    """How many times faster `fast` is than `slow`: spread of the ratios of each round."""
    return spread([a / b for a, b in zip(measured[slow]["seconds"], measured[fast]["seconds"])])


def gemm_arm(device, amp):
    """A large matrix product in the format of `amp`, with which the peak is measured. Returns (function, FLOPs of a call)."""
    import torch

    from utils.precision import DTYPES

    size = GEMM_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES.get(amp, torch.float32))
    return lambda: a @ b, 2 * size**3


def compare(args, device, configs, about, make_arm, flops_of, columns):
    """Measure the arms of {arm: Config} and a matrix product in turn; print and write a row for each arm.

    about: what all rows begin with. make_arm(config, arm, device) -> function without arguments. flops_of(config): FLOPs of one image.
    """
    from utils.config import to_dict

    product, product_flops = gemm_arm(device, args.amp)
    calls, weights_bytes, rows = {}, {}, []
    for arm, config in configs.items():
        calls[arm], _, weights_bytes[arm] = watch_memory(lambda: make_arm(config, arm, device), device)
    measured = alternate(calls | {"peak": product}, args, device, memory=True)
    peak = product_flops / min(measured["peak"]["seconds"])
    for arm, config in configs.items():
        entry, images_per_s = measured[arm], args.batchsize / statistics.median(measured[arm]["seconds"])
        rate = images_per_s * flops_of(config)
        masked = {"masked": config.train.mask_ratio} if "masked" in about else {}  # some arms mask nothing
        rows.append(about | masked | {
            "arm": arm, "ms": spread(entry["seconds"], 1000), "img/s": images_per_s, "TFLOP/s": rate / 1e12, "of peak": rate / peak,
            "x plain": speedup(measured, "plain", arm) if "plain" in calls and arm != "plain" else None,
            "GB": entry["peak_bytes"] and (entry["peak_bytes"] + weights_bytes[arm]) / 1e9, "first s": entry["first_s"],
            "peak TFLOP/s": peak / 1e12, "config": {key: to_dict(config)[key] for key in ("model", "train", "sample")}})
    report(args, device, rows, columns)


# ---- reports

def environment(device):
    """Device, software, commit and command of this process: what one needs to compare a number with another."""
    import torch

    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--dirty= with changes", "--exclude=*"]
        commit = subprocess.run(describe, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git: the numbers still count
        commit = ""
    module = sys.modules["__main__"].__spec__
    program = module.name.removesuffix(".__main__") if module else Path(sys.argv[0]).name
    return {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
            "commit": commit, "threads": torch.get_num_threads(),
            "command": f"python -m {program} {shlex.join(sys.argv[1:])}".strip()}


def device_name(device):
    """The GPU; or the CPU and what its vector instructions can do."""
    import torch

    from utils.precision import CPU_INFO, native_bf16

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    names = re.findall(r"model name\s*: (.+)", CPU_INFO.read_text() if CPU_INFO.is_file() else "") or [platform.machine()]
    return f"CPU {names[0]}, {torch.backends.cpu.get_cpu_capability()}, {'with' if native_bf16(device) else 'without'} bf16 instructions"


def report(args, device, found, columns, **content):
    """Print rows as a table with the keys `columns`, and write args.json: the rows, and the content besides."""
    cells = [list(columns)] + [["" if row.get(key) is None else _text(row[key]) for key in columns] for row in found]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |", flush=True)
    if args.json is not None:
        write_json(args.json, device, rows=found, **content)


def _text(value):
    if isinstance(value, dict):  # a spread
        return f"{value['median']:.3g} ({value['lowest']:.3g}-{value['highest']:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def random_inception(path):
    """A file of random Inception weights that keep the size of activations; returns its path."""
    import torch

    from fid.inception import make_network

    tensors = {name: tensor.shape for name, tensor in make_network().state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({name: torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1
                else torch.full(shape, float(name.endswith(("bn.weight", "bn.running_var")))) for name, shape in tensors.items()}, path)
    return path


def write_random_latents(folder, samples, shape, dtype, num_classes):
    """Store random moments (samples, *shape) and labels as extract_latent.py does; returns them."""
    import numpy as np

    from dataset.store import LatentWriter, Plan

    rng = np.random.default_rng(0)
    moments, labels = rng.standard_normal((samples, *shape), np.float32), rng.integers(max(1, num_classes), size=samples)
    writer = LatentWriter(folder, Plan(samples, shape, dtype, False, num_classes, (), 0.18215, 0.0, ""))
    for shard in writer.pending():
        part = writer.plan.shards[shard]
        writer.write(shard, moments[part.start:part.stop], labels[part.start:part.stop])
    writer.finish()
    return moments, labels


def write_json(path, device, **content):
    """Write a report, with its environment, to `path`."""
    with told(path), write_whole(path) as temporary:
        temporary.write_text(json.dumps(environment(device) | content, indent=1) + "\n")
