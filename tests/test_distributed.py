"""Many processes: the same start, their own draws, the gradients of one; and what is said when one of them fails."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_loop import FixedDraws, encode, make_batch, make_state
from training_runs import ROOT, assert_same_run, command_line, metrics

from models import EDMLoss
from utils import distributed
from utils.cli import UserError
from training.loop import train_step
from training.start import claim


# ------------------------------------------------------------------------------------------------ what every process calls

def first_of(moments, generator):
    return moments[:, :4]


def one_step(state, model, moments, labels):
    """Mean gradient over the batch, the rounds and the processes, of one training step with fixed draws."""
    gradients = []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: gradients.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).clone()))
    train_step(state, model, FixedDraws(patch_size=2), moments, labels, first_of, torch.Generator())
    return gradients[0]


def save_gradients(folder, grad_accum):
    distributed.init(60)
    state = make_state(train__grad_accum=grad_accum, train__class_dropout_prob=0.0)
    if distributed.rank() == 1:
        for parameter in state.net.parameters():
            parameter.data += 1.0
    model = distributed.data_parallel(state.net, static_graph=int(grad_accum) == 1)
    moments, labels = (part.chunk(2)[distributed.rank()] for part in make_batch(8))
    start = torch.cat([p.detach().flatten() for p in state.net.parameters()])
    gradient = one_step(state, model, moments, labels)
    end = torch.cat([p.detach().flatten() for p in state.net.parameters()])
    torch.save([start, gradient, end], f"{folder}/{distributed.rank()}.pt")
    distributed.shutdown()


def save_weights(folder, static_graph):
    distributed.init(60)
    state = make_state(train__grad_accum=1, train__class_dropout_prob=0.0)
    moments, labels = (part.chunk(2)[distributed.rank()] for part in make_batch(8))
    model = distributed.data_parallel(state.net, bool(static_graph))
    assert model.static_graph == bool(static_graph) and model.gradient_as_bucket_view
    for _ in range(3):
        train_step(state, model, EDMLoss(patch_size=2), moments, labels, encode, torch.Generator())
    torch.save(torch.cat([p.detach().flatten() for p in state.net.parameters()]), f"{folder}/{distributed.rank()}.pt")
    distributed.shutdown()


def save_draws(folder):
    distributed.init(60)
    state, drawn = make_state(), []

    class Recorded(EDMLoss):
        def draw(self, *args, **kwargs):
            drawn.append(super().draw(*args, **kwargs))
            return drawn[-1]

        def __call__(self, net, latents, class_labels, *args, **kwargs):
            drawn.append((latents, class_labels))
            return super().__call__(net, latents, class_labels, *args, **kwargs)

    model = distributed.data_parallel(state.net)
    for _ in range(2):
        train_step(state, model, Recorded(patch_size=2), *make_batch(40), encode, torch.Generator())
    names = ("latents", "labels", "sigma", "noise", "mask")
    rounds = [(latents, labels, draws.sigma, draws.noise, draws.mask.ids_shuffle)
              for (latents, labels), draws in zip(drawn[::2], drawn[1::2], strict=True)]
    torch.save({name: torch.cat([part[i] for part in rounds]) for i, name in enumerate(names)}, f"{folder}/{distributed.rank()}.pt")
    distributed.shutdown()


def use_collectives():
    distributed.init(60)
    rank = distributed.rank()
    assert distributed.all_gather_object("x" * rank) == ["", "x", "xx"]
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert distributed.any_of_ranks([rank == 2, False, True]) == [True, False, True]
    assert distributed.all_reduce_sum(torch.tensor([rank, 1.0])).tolist() == [3.0, 3.0]
    one, two, three = torch.full((2, 3), 1.0 * rank), torch.full((4,), 10.0 * rank), torch.full((1,), 100.0 * rank)
    distributed.share({one: 1, two: 0, three: 1})
    assert one.unique() == 1 and two.unique() == 0 and three.item() == 100
    for _ in range(rank):  # uneven tails: processes with nothing left to do wait at the next collective
        time.sleep(0.1)
    distributed.barrier()
    distributed.shutdown()
    distributed.share({one: 0})
    assert one.unique() == 1
    assert distributed.world_size() == 1 and distributed.any_of_ranks([False]) == [False]


# ------------------------------------------------------------------------------------------------ numbers

@pytest.mark.parametrize("grad_accum", [1, 2])
def test_gradients_equal_those_of_one_process_on_the_joined_batch(runs, tmp_path, grad_accum):
    """To 1e-6 of the largest gradient: float32 sums in another order."""
    runs.call("test_distributed:save_gradients", [str(tmp_path), grad_accum], tmp_path / "out.txt", processes=2)
    state = make_state(train__grad_accum=1, train__class_dropout_prob=0.0)
    start = torch.cat([p.detach().flatten() for p in state.net.parameters()])
    wanted = one_step(state, state.net, *make_batch(8))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for start_of_rank, gradient, _ in ranks:
        assert torch.equal(start_of_rank, start)
        assert (gradient - wanted).abs().max() < 1e-6 * max(1.0, wanted.abs().max().item())
    assert torch.equal(ranks[0][1], ranks[1][1]) and torch.equal(ranks[0][2], ranks[1][2])


def test_weights_are_the_same_without_a_static_graph(runs, tmp_path):
    results = []
    for static_graph in ("yes", ""):
        runs.call("test_distributed:save_weights", [str(tmp_path), static_graph], tmp_path / "out.txt", processes=2)
        results.append([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])
        assert torch.equal(*results[-1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)  # another bucket layout adds in another order


def test_draws_differ_by_rank_and_come_again(runs, tmp_path):
    draws = []
    for time_ in ("first", "again"):
        (tmp_path / time_).mkdir()
        runs.call("test_distributed:save_draws", [str(tmp_path / time_)], tmp_path / "out.txt", processes=2)
        draws.append([torch.load(tmp_path / time_ / f"{rank}.pt", weights_only=True) for rank in range(2)])
    for name in ("latents", "labels", "sigma", "noise", "mask"):  # the batch given to both ranks is the same
        first, again = draws
        assert torch.equal(first[0][name], again[0][name]) and torch.equal(first[1][name], again[1][name])
        assert not torch.equal(first[0][name], first[1][name]), name
        half = len(first[0][name]) // 2
        assert not torch.equal(first[0][name][:half], first[0][name][half:]), f"{name} of two steps"


def test_collectives_on_three_processes(runs, tmp_path):
    runs.call("test_distributed:use_collectives", [], tmp_path / "out.txt", processes=3)


# ------------------------------------------------------------------------------------------------ failures

def test_failing_rank_is_heard_first_and_ends_all(runs, tiny_latents, tmp_path):
    codes, said = runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt", processes=2, crash=("fail", 3), crash_rank=1)
    assert codes == [1, 1]
    cause, echo = said.index("RuntimeError: a bug on purpose"), said.index("rank 0 ended because rank 1 failed: RuntimeError: a bug on purpose")
    assert cause < echo and said.count("Traceback") == 1
    assert not (tmp_path / "run" / "run.lock").exists()


def test_user_error_on_one_rank_is_one_line_and_its_exit_code(runs, tiny_latents, tmp_path):
    codes, said = runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt", processes=2, crash=("refuse", 3), crash_rank=1)
    assert codes == [1, 2] and "Traceback" not in said
    assert said.index("error on rank 1: bad data on purpose") < said.index("rank 0 ended because rank 1 failed: UserError: bad data on purpose")


def test_killed_rank_is_named(runs, tiny_latents, tmp_path):
    codes, said = runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt", processes=2, crash=("vanish", 4), crash_rank=1)
    assert codes == [1, 77]
    assert "rank 0 ended because rank 1 does not answer; it was last seen at step" in said and "killed" in said and "Traceback" not in said


def test_hung_rank_is_named_within_the_time_out(runs, tiny_latents, tmp_path):
    arguments = command_line(tiny_latents, tmp_path, train__timeout_s=10)
    codes, said = runs.start(arguments, tmp_path / "out.txt", processes=3, crash=("hang", 4), crash_rank=2)
    assert codes == [1, 1, -signal.SIGKILL]
    assert "rank 0 ended because rank 2 does not answer; it was last seen at step" in said
    assert "hung for train.timeout_s" in said and "Traceback" not in said


def test_second_job_on_one_folder_is_refused(runs, tiny_latents, tmp_path):
    with claim(tmp_path / "run"):
        for processes in (1, 2):
            codes, said = runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt", processes)
            assert codes[0] == 2 and all(codes)
            assert f"run is in use by process {os.getpid()}" in said and "Traceback" not in said
        assert (tmp_path / "run" / "run.lock").exists()
    assert runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt")[0] == [0]


# ------------------------------------------------------------------------------------------------ the launchers

def start_script(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def signal_when_running(process, number, log):
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.05)
    process.send_signal(number)
    return process.communicate(timeout=200)[0]


WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from utils import cli

def main():
    task = sys.argv[1]
    if "RANK" not in os.environ:
        from utils import distributed
        return distributed.launch(__file__, sys.argv[1:], 2)
    if task == "stop":
        with cli.StopNotice() as notice:
            os.write(1, b"ready\\n")
            while not notice.requested:
                time.sleep(0.01)
            time.sleep(0.5)  # a checkpoint
            os.write(1, b"saved\\n")
        return cli.EXIT_STOPPED
    if os.environ["RANK"] == "0" and task != "refuse":  # a refusal before the group exists is told by rank 0 alone
        time.sleep(60)
    if task == "refuse":
        raise cli.UserError("bad data")
    if task == "bug":
        raise KeyError("a bug")
    os.kill(os.getpid(), signal.SIGKILL)

cli.run(main)
"""


def start_worker(folder, task, hangup=signal.SIG_DFL):
    """hangup: what SIGHUP does when the launcher starts, which it inherits: nohup ignores it, and so may whoever runs the tests."""
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    before = signal.signal(signal.SIGHUP, hangup)
    process = start_script(folder / "worker.py", task)
    signal.signal(signal.SIGHUP, before)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_processes_end_in_their_own_time_after_a_signal_to_the_launcher(tmp_path, number):
    process = start_worker(tmp_path, "stop")
    said = process.stdout.readline() + process.stdout.readline()
    process.send_signal(number)
    said += process.communicate(timeout=100)[0]
    assert process.returncode == 75 and sorted(said.split()) == ["ready", "ready", "saved", "saved"]  # and no line of torchrun's


def test_a_run_under_nohup_survives_its_terminal(tmp_path):
    process = start_worker(tmp_path, "stop", hangup=signal.SIG_IGN)
    assert process.stdout.readline() + process.stdout.readline() == "ready\nready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=100)[0].split() == ["saved", "saved"] and process.returncode == 75


@pytest.mark.parametrize("task, code, wanted", [
    ("refuse", 2, ["error: bad data"]), ("bug", 1, ["Traceback", "KeyError: 'a bug'"]),
    ("kill", 137, ["error: the process of rank 1 was ended by SIGKILL (SIGKILL: perhaps out of memory)"])])
def test_launcher_returns_the_first_exit_code_and_adds_only_who_was_killed(tmp_path, task, code, wanted):
    process = start_worker(tmp_path, task)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == code and all(text in said for text in wanted)
    assert "elastic" not in said and "ChildFailedError" not in said and (task == "bug" or len(said.splitlines()) == len(wanted))


@pytest.mark.parametrize("number", [0, -2, 5000])
def test_numbers_of_processes_that_cannot_be_are_told_before_anything_starts(monkeypatch, number):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=f"--num_process_per_node {number}: wanted 1 to 4096"):
        distributed.launch("nothing.py", [], number)


@pytest.mark.parametrize("gpus, wanted", [(0, {"gloo": 7}), (1, {"cpu:gloo,cuda:nccl": 14, "gloo for flags": 7})])
def test_gloo_gives_up_after_the_time_out_and_nccl_later(monkeypatch, gpus, wanted):
    """A time-out of NCCL kills the process, so gloo has to raise its error before."""
    found = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 1)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, timeout, **_: found.update({backend: timeout.seconds}))
    monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: found.update({f"{backend} for flags": timeout.seconds}))
    distributed.init(timeout_s=7)
    distributed.shutdown()
    assert found == wanted


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_process_finds_at_once_that_there_are_more_than_gpus(monkeypatch, rank):
    """Before it waits for the others: with RANK alone, meeting them would be an error about MASTER_ADDR."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"3 processes on \S+, which has 2 GPU\(s\); start at most 2 there"):
        distributed.init()


@pytest.mark.parametrize("given, wanted", [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
                                           ({"PYTORCH_ALLOC_CONF": "backend:native"}, None)])
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch, given, wanted):
    monkeypatch.setattr(os, "environ", given)
    distributed.init()
    assert given.get("PYTORCH_CUDA_ALLOC_CONF") == wanted


LONG = {"train__max_num_steps": 400, "log__ckpt_every": 300}


def test_launcher_passes_signals_on_and_the_exit_code_back(runs, tiny_latents, tmp_path):
    stopped = command_line(tiny_latents, tmp_path / "stopped", **LONG)
    folder = tmp_path / "stopped" / "run"
    process = start_script("train_latent.py", "--num_process_per_node", 2, *stopped)
    said = signal_when_running(process, signal.SIGTERM, folder / "metrics.jsonl")
    assert process.returncode == 75, said
    assert "as asked; the same command goes on from there" in said and "torch/distributed" not in said
    assert not (folder / "run.lock").exists()
    assert metrics(folder)[-1]["step"] < 400
    goes_on_as_if_never_stopped(runs, tiny_latents, tmp_path)


@pytest.mark.slow
def test_run_stopped_under_torchrun_goes_on(runs, tiny_latents, tmp_path):
    stopped = command_line(tiny_latents, tmp_path / "stopped", **LONG)
    process = start_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train_latent.py", *stopped)
    said = signal_when_running(process, signal.SIGTERM, tmp_path / "stopped" / "run" / "metrics.jsonl")
    assert process.returncode and "as asked; the same command goes on from there" in said  # torchrun has a code of its own
    goes_on_as_if_never_stopped(runs, tiny_latents, tmp_path)


def goes_on_as_if_never_stopped(runs, data, folder):
    stopped, calm = (command_line(data, folder / name, **LONG) for name in ("stopped", "calm"))
    codes, said = runs.start(stopped, folder / "out.txt", processes=2)
    assert codes == [0, 0] and "resuming from" in said
    assert runs.start(calm, folder / "out.txt", processes=2)[0] == [0, 0]
    for name in ("stopped", "calm"):
        for path in (folder / name / "run" / "checkpoints").iterdir():
            if path.stem != "0000400":
                path.unlink()  # the checkpoint of the stop counts for keep_last too
    assert_same_run(folder / "stopped" / "run", folder / "calm" / "run")


def test_launcher_returns_the_exit_code_of_the_failing_worker(tmp_path):
    arguments = command_line(tmp_path / "nothing", tmp_path)
    process = start_script("train_latent.py", "--num_process_per_node", 2, *arguments)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2 and said.count("no such file or folder") == 1 and len(said.splitlines()) == 1
