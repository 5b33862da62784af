"""Real training runs for tests, without paying for the imports each time.

`Runs` starts one server process that has imported everything and never computes; it forks a child for each process of a
run, which executes the main of train_latent.py with real signals, real files and real gloo. A child can be told to kill
itself and the others (SIGKILL) at a chosen point, the n-th time that it comes by.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STRAGGLERS_S = 10.0
TIMINGS = {"images_per_s", "peak_memory_gb"}  # what may differ between two runs of the same steps
SETTINGS = {"model.model_type": "DiT-S/2", "model.in_size": 8, "model.num_classes": 5, "model.depth": 1, "model.width": 16,
            "model.num_heads": 2, "model.decoder_depth": 1, "model.decoder_width": 16, "model.decoder_num_heads": 2,
            "train.batchsize": 4, "train.max_num_steps": 12, "train.lr": 1e-3, "train.lr_schedule": "cosine", "train.ema_decay": 0.9,
            "train.mask_ratio_fn": "cosine2", "train.warmup_images": 16, "train.grad_accum": 2, "train.timeout_s": 120,
            "sample.num_steps": 2, "vae.path": "''", "log.log_every": 2, "log.ckpt_every": 4, "log.keep_last": 2, "log.exp_name": "run"}


def write_latents(folder, num_images=23, size=8, num_classes=5):
    """A small set of stored latents in the project's own format, two shards."""
    import numpy as np
    from dataset.store import LatentWriter, Plan

    random = np.random.default_rng(0)
    shape = (8, size, size)
    plan = Plan(num_images=num_images, sample_shape=shape, dtype="float32", mirrored=False, num_classes=num_classes, class_names=(),
                scale=0.18215, shift=0.0, vae="", shard_size=12)
    writer = LatentWriter(folder, plan)
    for shard, images in enumerate(plan.shards):
        count = len(images)
        writer.write(shard, random.standard_normal((count, *shape), np.float32), random.integers(num_classes, size=count))
    writer.finish()
    return folder


def command_line(data, results, **settings):
    """Arguments of train_latent.py for a tiny run; settings as train__lr=1e-3."""
    config = results / "tiny.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("{}")
    values = SETTINGS | {"data.root": data, "log.results_dir": results}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return ["--config", str(config), *(f"{key}={value}" for key, value in values.items())]


def metrics(folder):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(folder, wanted):
    """Same checkpoints bit for bit (weights, EMA, optimizer, counters), same log, same sample grids; sharded or not."""
    import torch

    folder, wanted = Path(folder), Path(wanted)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == \
           [path.name for path in sorted((wanted / "checkpoints").iterdir())]
    for path in sorted((wanted / "checkpoints").glob("*.pt")):
        one, other = (torch.load(place, weights_only=True) for place in (folder / "checkpoints" / path.name, path))
        for content in (one, other):
            for key in ("results_dir", "exp_name"):
                content["config"]["log"].pop(key)
            content["config"]["train"].pop("shard")
            content.pop("log_position")  # lines differ in length with their timings
        assert_equal(one, other, path.name)
    assert metrics(folder) == metrics(wanted)
    for path in sorted((wanted / "samples").glob("*.png")):
        assert (folder / "samples" / path.name).read_bytes() == path.read_bytes(), path.name


def assert_equal(one, other, place):
    import torch

    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{place}/{i}")
    else:
        assert one == other, place


class Runs:
    """Client of the server below."""

    def __init__(self):
        self.server = None

    def call(self, function, arguments, log, processes):
        """Call "module:function" with the arguments in every process; returns everything printed."""
        codes, said = self.start(arguments, log, processes, function=function)
        assert codes == [0] * processes, said
        return said

    def start(self, arguments, log, processes=1, function=None, crash=None, crash_rank=0, send=None, when=None, after_s=None, again_s=None):
        """Train once; returns (exit codes by rank, everything printed).

        crash: (point, n): rank crash_rank kills itself at the n-th passing of the point, and the others die with it.
        send: signal number sent to all processes when `when` = (file, n) has n lines, or after_s seconds after the start,
        and once more again_s seconds later. function: see `call`; None: train.
        Once a process has ended in failure, the others have STRAGGLERS_S until they are killed.
        """
        if self.server is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, text=True,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        order = {"arguments": list(map(str, arguments)), "log": str(log), "processes": processes, "function": function, "crash": crash, "crash_rank": crash_rank,
                 "send": send, "when": when and [str(when[0]), when[1]], "after_s": after_s, "again_s": again_s}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        codes = json.loads(self.server.stdout.readline())
        return codes, Path(log).read_text()

    def close(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(30)


# ------------------------------------------------------------------------------------------------ the server

def serve():
    import matplotlib.pyplot  # noqa: F401  what a run imports on its way
    import torch._dynamo  # noqa: F401
    import torch.distributed.algorithms.join  # noqa: F401

    import train_latent  # noqa: F401
    import sampling.sample  # noqa: F401
    import utils.images  # noqa: F401
    import training.start  # noqa: F401
    import training.watch  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_execute(json.loads(line))) + "\n")
        answers.flush()


def _execute(order):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    open(order["log"], "w").close()
    children = []
    for rank in range(order["processes"]):
        children.append(_fork(order, rank, port, children[0] if children else 0))
    codes, started = {}, time.monotonic()
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(done[1])
        alive = [child for rank, child in enumerate(children) if rank not in codes]
        if alive and any(codes.values()) and not order["send"]:
            order["send"], order["after_s"] = signal.SIGKILL, time.monotonic() - started + STRAGGLERS_S
        if order["send"] and _due(order, time.monotonic() - started):
            if order["send"] == signal.SIGKILL:
                os.killpg(children[0], signal.SIGKILL)  # at once, as a power cut: one by one, the next would see the first one gone
            else:
                for child in alive:
                    os.kill(child, order["send"])
            order["after_s"], order["again_s"] = order["again_s"] and time.monotonic() - started + order["again_s"], None
            if order["after_s"] is None:
                order["send"] = None
        time.sleep(0.002)
    return [codes[rank] for rank in range(len(children))]


def _due(order, elapsed):
    if order["after_s"] is not None:
        return elapsed >= order["after_s"]
    file, lines = order["when"]
    return os.path.exists(file) and Path(file).read_bytes().count(b"\n") >= lines


def _fork(order, rank, port, group):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, group)
        output = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if order["processes"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if order["crash"] and rank == order["crash_rank"]:
            _arm(*order["crash"])
        code = _act(order["function"], order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _act(function, arguments):
    import importlib
    import traceback

    import train_latent
    from utils.cli import run

    try:
        if function is None:
            sys.argv = ["train_latent.py", *arguments]
            run(train_latent.main)
        else:
            module, name = function.split(":")
            getattr(importlib.import_module(module), name)(*arguments)
            return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
    return 1


def _arm(point, count):
    """Make this process kill itself, or misbehave, at the count-th passing of `point`."""
    import training.checkpoint as checkpoint
    import sampling.sample as generation
    import utils.logging as logging
    import training.loop as trainer
    import utils.files as files
    from utils.cli import UserError

    def die(*_):
        os.killpg(0, signal.SIGKILL)  # all processes of the run

    def half_a_line(log, step, values):
        log.metrics_file.write(b'{"step": 7, "lo')
        log.metrics_file.flush()
        die()

    def half_the_data(stream, data):
        stream.stream.write(data[:len(data) // 2])
        stream.stream.flush()
        die()

    def notice(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # a slow disk: training has heard of it long before this goes on

    def two_notices(*_):
        notice()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)

    def sleep(*_):
        time.sleep(3600)

    def fail(*_):
        raise RuntimeError("a bug on purpose")

    def refuse(*_):
        raise UserError("bad data on purpose")

    write, flush, writer = (checkpoint._HashingStream, "write"), (files, "flush_to_disk"), checkpoint.CheckpointWriter
    places = {"notice in write": (*write, notice), "two notices in write": (*write, two_notices),
              "notice in sync": (*flush, notice), "two notices in sync": (*flush, two_notices),
              "refuse": (trainer, "train_step", refuse), "vanish": (trainer, "train_step", lambda *_: os._exit(77)),
              "step": (trainer, "train_step", die), "metrics": (logging.RunLog, "metrics", half_a_line),
              "stream": (*write, half_the_data), "sync": (*flush, die), "rename": (files.os, "replace", die),
              "manifest": (checkpoint, "_write_manifest", die), "delete": (writer, "_delete_old", die),
              "unlink": (checkpoint.Path, "unlink", die), "copy": (writer, "_copy_to_host", die),
              "grid": (generation, "draw_grid", die), "hang": (trainer, "train_step", sleep), "fail": (trainer, "train_step", fail)}
    owner, name, act = places[point]
    original, passed = getattr(owner, name), [0]

    def watched(*args, **kwargs):
        if point.endswith("sync") and "checkpoints" not in str(args[0]):  # grids are flushed too, in another thread
            return original(*args, **kwargs)
        passed[0] += 1
        if passed[0] == count:
            act(*args)
        return original(*args, **kwargs)

    setattr(owner, name, watched)


if __name__ == "__main__":
    serve()
