"""Optimizer state and average divided among processes: the numbers, checkpoints and log of a run that is not sharded, in less memory."""

import copy
from pathlib import Path

import torch
from test_loop import encode, make_batch, make_loss, make_state
from training_runs import assert_equal, assert_same_run, command_line, metrics

from models import build_model
from sampling.load import read_checkpoint
from training.checkpoint import write_checkpoint
from training.loop import train_step
from training.shard import divide
from utils import distributed


def test_each_weight_has_one_owner_and_the_parts_are_balanced():
    with torch.device("meta"):
        net = build_model("DiT-XL/2", in_size=32, in_channels=4, num_classes=1000)
    trained = [p for p in net.parameters() if p.requires_grad]
    for processes in (1, 2, 8):
        owners = divide(net, processes)
        loads = [sum(p.numel() for p in trained if owners[p] == rank) for rank in range(processes)]
        assert len(owners) == len(trained) and sum(loads) == sum(p.numel() for p in trained)
        assert max(loads) < 1.01 * sum(loads) / processes


# ------------------------------------------------------------------------------------------------ numbers

def new_state(shard, content=None):
    """(state, its network for several processes), with a loss scale and, perhaps, what a checkpoint says."""
    torch.manual_seed(0)
    state = make_state(train__shard=shard, train__grad_accum=1, train__grad_clip=0.5, train__weight_decay=0.1)
    state.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    if content is not None:
        state.resume(content)
    return state, distributed.data_parallel(state.net)


def do_steps(state, model, until):
    """Steps of the loop; in the second one, rank 1 alone has NaN."""
    while state.step < until:
        moments, labels = make_batch()
        bad = state.step == 1 and distributed.rank() == 1
        train_step(state, model, make_loss(state), moments * (float("nan") if bad else 1.0), labels, encode, torch.Generator())


def snapshot(state, folder, name):
    """Write a checkpoint on rank 0 and read it on every process."""
    content = state.state_dict()
    path = folder / f"{name}.pt"
    if distributed.is_main():
        write_checkpoint(path, content)
    distributed.barrier()
    return read_checkpoint(path)


def bytes_of(state):
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    return sum(tensor.nbytes for tensor in [*moments, *state.ema.net.parameters()])


def compare_with_ddp(folder):
    distributed.init(60)
    folder, contents, sizes = Path(folder), {}, {}
    for shard in (False, True):
        state, model = new_state(shard)
        do_steps(state, model, 3)
        assert state.stepper.bad_steps.tolist() == [0, 1] and state.stepper.scaler.get_scale() == 512
        half = snapshot(state, folder, f"half {shard}")
        do_steps(state, model, 6)
        sizes[shard] = bytes_of(state)
        contents[f"{shard}"] = snapshot(state, folder, f"{shard}")
        for again in (False, True):  # resumed in both ways
            other, model = new_state(again, half)
            do_steps(other, model, 6)
            contents[f"{shard}, then {again}"] = snapshot(other, folder, f"{shard}, then {again}")
        with state.ema.whole() as net:
            assert_equal(copy.deepcopy(net).state_dict(), contents["False"]["ema"], "whole average")
        weights = torch.cat([p.detach().flatten() for p in state.net.parameters()])
        assert len({tuple(rank) for rank in distributed.all_gather_object(weights.tolist())}) == 1
    wanted = contents.pop("False")
    assert list(wanted["opt"]["state"]) == list(range(len(wanted["opt"]["state"])))
    for name, content in contents.items():
        for key in wanted.keys() - {"config"}:
            assert_equal(content[key], wanted[key], f"{name}: {key}")
            if key in ("model", "ema"):
                assert list(content[key]) == list(wanted[key])
        assert list(content["opt"]["state"]) == list(wanted["opt"]["state"])
    assert sizes[True] < 0.55 * sizes[False], sizes
    distributed.shutdown()


def test_sharded_steps_equal_ddp_bit_for_bit_and_resume_in_both_ways(runs, tmp_path):
    """Skipped steps, clipping, weight decay and a loss scale among them; each process keeps about half."""
    runs.call("test_shard:compare_with_ddp", [str(tmp_path)], tmp_path / "out.txt", processes=2)


# ------------------------------------------------------------------------------------------------ whole runs

def test_killed_sharded_run_ends_like_one_that_is_not_sharded_and_goes_on_with_any_number_of_processes(runs, tiny_latents, tmp_path):
    calm = command_line(tiny_latents, tmp_path / "calm", log__sample_every=6)
    sharded = command_line(tiny_latents, tmp_path / "sharded", log__sample_every=6, train__shard=True)
    assert runs.start(calm, tmp_path / "out.txt", 2)[0] == [0, 0]
    runs.start(sharded, tmp_path / "out.txt", 2, crash=("step", 10))
    codes, said = runs.start(sharded, tmp_path / "out.txt", 2)
    assert codes == [0, 0] and "resuming from" in said and "no effect" not in said
    assert_same_run(tmp_path / "sharded" / "run", tmp_path / "calm" / "run")
    for processes, end in ((3, 14), (1, 16)):
        codes, said = runs.start([*sharded, f"train.max_num_steps={end}"], tmp_path / "out.txt", processes)
        assert codes == [0] * processes, said
        assert ("train.shard=true has no effect: there is one process" in said) == (processes == 1)
        assert metrics(tmp_path / "sharded" / "run")[-1]["step"] == end


def test_weights_of_a_checkpoint_start_a_sharded_run(runs, tiny_latents, tmp_path):
    """With the optimizer's state, and without."""
    first = command_line(tiny_latents, tmp_path, train__max_num_steps=4)
    assert runs.start(first, tmp_path / "out.txt")[0] == [0]
    checkpoint = tmp_path / "run" / "checkpoints" / "0000004.pt"
    ends = []
    for shard in (False, True):
        arguments = command_line(tiny_latents, tmp_path, train__shard=shard, train__max_num_steps=2, log__exp_name=f"then-{shard}")
        codes, said = runs.start([*arguments, "--ckpt_path", str(checkpoint), "--use_ckpt_path", "False"], tmp_path / "out.txt", 2)
        assert codes == [0, 0], said
        ends.append(torch.load(tmp_path / f"then-{shard}" / "checkpoints" / "0000006.pt", weights_only=True))
    for key in ("model", "ema", "opt"):
        assert_equal(ends[0][key], ends[1][key], key)
