"""Killed at 30 random moments, checkpoint writes among them, a run still ends bit for bit like the uninterrupted one."""

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from training_runs import ROOT, assert_same_run, command_line

KILLS = 30
# How often a point is passed between two checkpoints, about; a count is drawn up to twice that.
POINTS = {"stream": 250, "step": 3, "metrics": 2, "sync": 2, "rename": 2, "manifest": 1, "delete": 1, "unlink": 2, "copy": 1, "grid": 1}
LENGTH = {"train__max_num_steps": 24, "log__ckpt_every": 3, "log__sample_every": 6}


@pytest.mark.parametrize("processes", [1, 2])
def test_30_kills_leave_no_trace(runs, tiny_latents, tmp_path, processes):
    """Each kill is SIGKILL to every process of the run, at a random moment or at a random passing of a named point."""
    calm = command_line(tiny_latents, tmp_path / "calm", **LENGTH)
    started = time.monotonic()
    assert runs.start(calm, tmp_path / "calm.txt", processes)[0] == [0] * processes
    calm_s = time.monotonic() - started
    dice = random.Random(processes)
    kills, killed_at, attempt = 0, set(), 0
    while kills < KILLS:
        attempt += 1
        arguments = command_line(tiny_latents, tmp_path / f"killed-{attempt}", **LENGTH)
        codes = None
        while codes != [0] * processes:
            moment = dice.choice(["any", *POINTS])
            when = {"send": signal.SIGKILL, "after_s": dice.uniform(0.1, calm_s)} if moment == "any" else \
                   {"crash": (moment, dice.randint(1, 2 * POINTS[moment]))}
            codes, said = runs.start(arguments, tmp_path / "killed.txt", processes, **(when if kills < KILLS else {}))
            assert codes in ([0] * processes, [-signal.SIGKILL] * processes), said
            if codes != [0] * processes:
                kills += 1
                killed_at.add(moment)
        assert_same_run(tmp_path / f"killed-{attempt}" / "run", tmp_path / "calm" / "run")
    assert len(killed_at) >= 5, "the points are hardly reached any more; see POINTS"


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("processes", [1, 2])
def test_30_kills_of_the_real_script(tiny_latents, tmp_path, processes):
    """The same with fresh interpreters, started as a user does; the launcher dies with its workers."""
    start = [] if processes == 1 else ["--num_process_per_node", str(processes)]
    command = [sys.executable, "train_latent.py", *start]
    length = {**LENGTH, "train__max_num_steps": 150, "log__ckpt_every": 10, "log__sample_every": 50}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def begin(name):
        arguments = command_line(tiny_latents, tmp_path / name, **length)
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    assert begin("calm").wait() == 0
    calm_s = time.monotonic() - started
    dice, kills, attempt, code = random.Random(processes), 0, 1, None
    while kills < KILLS or code != 0:
        run = begin(f"killed-{attempt}")
        try:
            code = run.wait(dice.uniform(0.5, 1.0) * calm_s if kills < KILLS else None)
            assert code == 0
            assert_same_run(tmp_path / f"killed-{attempt}" / "run", tmp_path / "calm" / "run")
            attempt += 1
        except subprocess.TimeoutExpired:
            _kill_tree(run.pid)
            code = run.wait()
            kills += 1


def _kill_tree(pid):
    """SIGKILL to a process and all below it, parents first so that nobody restarts or tidies up."""
    children = [int(child) for task in os.listdir(f"/proc/{pid}/task")
                for child in open(f"/proc/{pid}/task/{task}/children").read().split()]
    os.kill(pid, signal.SIGKILL)
    for child in children:
        if os.path.exists(f"/proc/{child}/task"):
            _kill_tree(child)


def _lmdb(folder, moments):
    import lmdb
    with lmdb.open(str(folder), map_size=1 << 26) as store, store.begin(write=True) as transaction:
        for i, sample in enumerate(moments):
            transaction.put(f"z-{i}".encode(), sample.tobytes())
            transaction.put(f"y-{i}".encode(), b"1")
        transaction.put(b"length", str(len(moments)).encode())
    return folder / "data.mdb"


def _tar(folder, moments):
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i, sample in enumerate(moments):
            for kind, content in (("latent", pickle.dumps(sample)), ("cls", b"1")):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "shard.tar"


def _safetensors(folder, moments):
    from safetensors.numpy import save_file
    save_file({"labels": np.ones(len(moments), np.int64), "latents": moments}, folder / "shard.safetensors")
    return folder / "shard.safetensors"


@pytest.mark.parametrize("make", [_lmdb, _tar, _safetensors])
@pytest.mark.parametrize("loss", ["cut", "gone"])
def test_mapped_file_that_goes_bad_is_an_error_and_no_bus_error(tmp_path, make, loss):
    from dataset.formats import open_latents
    moments = np.random.default_rng(0).standard_normal((400, 8, 8, 8), np.float32)  # 0.8 MB: pages that nobody has touched yet
    file = make(tmp_path, moments)
    data = open_latents(tmp_path)
    np.testing.assert_array_equal(data.read([0])[0], moments[:1])
    if loss == "cut":
        os.truncate(file, 8192)
    else:
        file.rename(tmp_path / "away")
    with pytest.raises((ValueError, OSError)) as refusal:
        data.read([399])
    said = {"cut": "is cut short: 8192 bytes", "gone": "cannot be read: No such file"}[loss]
    assert f"{file} {said}" in str(refusal.value)
