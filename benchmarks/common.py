"""What the benchmarks share: arms that take turns, clocks, the peak of matrix products, FLOPs, tables and JSON files."""

import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough that memory does not limit the product
MEMORY_SIZE = {"cpu": 2**26, "cuda": 2**28}  # large enough that caches do not help


def add_common_arguments(parser, rounds):
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds; in each, every arm runs once (default {rounds})")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not counted (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")


def start(args, tf32=True, deterministic=False):
    """The device to measure on, after the process-wide switches are set, for the plain path too: see utils/precision.py."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, tells whenever it starts and stops
    import torch

    from utils import distributed
    from utils.precision import setup_backends

    torch.set_num_threads(args.threads)
    setup_backends(tf32, deterministic, compiled=deterministic)
    return distributed.device()


# ---- time

def make_clock(device, threads):
    """A function that waits for the device and returns seconds.

    On one CPU thread it counts the process's CPU time, which other programs on the machine disturb less than the wall clock;
    with several threads, and on GPUs, it is the wall clock.
    """
    import torch

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if device.type == "cpu" and threads == 1 else time.perf_counter()

    return clock


def alternate(arms, args, device, memory=False):
    """Run the arms in turn, round after round: {name: {"seconds": [per round], "first_s", "peak_bytes"}}.

    arms: {name: function without arguments}. first_s: wall-clock seconds of the very first call, compilation included.
    peak_bytes: most memory that the arm's calls, warm-up included (CUDA graphs take theirs then), needed beyond what was there
    before the first of them. On a CPU it is looked for if `memory`, in the warm-up rounds, of which it takes two: what the first call
    leaves behind, AdamW's moments for one, counts in the second; else None.
    """
    clock = make_clock(device, args.threads)
    rounds = args.warmup + args.rounds
    watched = rounds if device.type == "cuda" else args.warmup if memory and args.warmup >= 2 else 0
    measured = {name: {"seconds": [], "first_s": None, "peak_bytes": None} for name in arms}
    kept = dict.fromkeys(arms, 0)  # bytes that an arm's calls have left behind
    for number in range(rounds):
        for name, run in arms.items():
            entry = measured[name]
            if number < watched:
                (seconds, by_wall_clock), needed, left = watch_memory(lambda run=run: _timed(run, clock), device)
                entry["peak_bytes"] = max(kept[name] + needed, entry["peak_bytes"] or 0)
                kept[name] += left
            else:
                seconds, by_wall_clock = _timed(run, clock)
            if number == 0:
                entry["first_s"] = by_wall_clock
            if number >= args.warmup:
                entry["seconds"].append(seconds)
        print(f"  round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    return measured


def _timed(run, clock):
    """Seconds of one call by the clock, and by the wall clock."""
    begun, wall_begun = clock(), time.perf_counter()
    run()
    return clock() - begun, time.perf_counter() - wall_begun


def watch_memory(run, device):
    """What run() returns, the bytes of tensors on the device that it needed at most, and those that it left.

    On a CPU torch's profiler counts them, which takes time.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as observed:
        result = run()
    changes = [event for event in observed.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = list(itertools.accumulate((event.nbytes() for event in changes), initial=0))
    return result, max(held), held[-1]


def spread(values):
    """{"median", "lowest", "highest"} of some numbers."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def scaled(values, factor):
    """A spread in another unit."""
    return {key: factor * value for key, value in values.items()}


def speedup(measured, slow, fast):
    """How many times faster `fast` is than `slow`: spread of the ratios of each round."""
    return spread([a / b for a, b in zip(measured[slow]["seconds"], measured[fast]["seconds"])])


# ---- work

def gemm_arm(device, amp):
    """A large matrix product in the format of `amp`: what the peak is measured with. Returns (function, FLOPs of a call)."""
    import torch

    from utils.precision import DTYPES

    size = GEMM_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=DTYPES.get(amp, torch.float32))
    b = torch.randn(size, size, device=device, dtype=a.dtype)
    return lambda: a @ b, 2 * size**3


def memory_arm(device, numbers=None):
    """A pass over two single tensors, both read and one written, as an optimizer makes: what memory gives. Returns (function, bytes of a call).

    numbers: of each tensor; None: enough that caches do not help.
    """
    import torch

    numbers = numbers or MEMORY_SIZE[device.type]
    average, source = torch.zeros(numbers, device=device), torch.ones(numbers, device=device)
    return lambda: average.lerp_(source, 0.5), 12 * numbers


def count_flops(run):
    """FLOPs of run(), counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def model_flops(model_config, mask_ratio=0.0, training=False):
    """FLOPs of one image through the network (with `training` forward and backward), counted by torch without computing."""
    import torch

    from models.masking import TokenMask, count_kept
    from sampling.sample import build_model

    with torch.device("meta"):
        net = build_model(model_config)
        x = torch.empty(1, net.in_channels, net.in_size, net.in_size)
        labels = torch.empty(1, dtype=torch.int64) if net.num_classes else None
        order = torch.empty(1, net.num_tokens, dtype=torch.int64)
    num_keep = count_kept(net.num_tokens, mask_ratio)
    mask = TokenMask(order, num_keep) if num_keep < net.num_tokens else None

    def run():
        output = net(x, 1.0, labels, mask)
        if training:
            output.sum().backward()

    return count_flops(run)


# ---- reports

def environment(device):
    """Device, software, commit and command of this process: what a number needs to be compared with another."""
    import torch

    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!*/results/*")  # results do not change what is measured
    return {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
            "commit": commit + (" with changes" if commit and changed else ""), "threads": torch.get_num_threads(),
            "command": f"python -m {_module_name()} {shlex.join(sys.argv[1:])}".strip()}


def device_name(device):
    """The GPU and its memory; or the CPU and what its vector instructions can do."""
    import torch

    from utils.precision import CPU_INFO, native_bf16

    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    bf16 = "with" if native_bf16(device) else "without"
    return f"CPU {names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {bf16} bf16 instructions"


def _module_name():
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*arguments):
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git: the numbers still count
        return ""


def print_table(rows, columns):
    """Print dicts as a table with aligned columns; `columns` are the keys, in order."""
    cells = [list(columns)] + [["" if row.get(key) is None else _text(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _text(value):
    if isinstance(value, dict):  # a spread
        return f"{value['median']:.3g} ({value['lowest']:.3g}-{value['highest']:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path, device, **content):
    """Write a report of a benchmark, with its environment, to `path` (None: nowhere)."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment(device) | content, indent=1) + "\n")
