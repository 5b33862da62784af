"""A run that is stopped in any way and started again by the same command ends as if it had never been stopped."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_run, command_line, metrics

from training.checkpoint import find_latest, write_checkpoint

EXIT_STOPPED = 75


@pytest.fixture(scope="module")
def finished(runs, tiny_latents, tmp_path_factory):
    """The uninterrupted run, with sample grids; started once more at its end, which must change nothing."""
    results = tmp_path_factory.mktemp("uninterrupted")
    arguments = command_line(tiny_latents, results, log__sample_every=4)
    assert runs.start(arguments, results / "out.txt")[0] == [0]
    before = (results / "run" / "metrics.jsonl").read_bytes()
    codes, said = runs.start(arguments, results / "out.txt")
    assert codes == [0] and "step 12, 48 images seen" in said
    assert (results / "run" / "metrics.jsonl").read_bytes() == before
    return results / "run"


def run_to_the_end(runs, arguments, log):
    codes, said = runs.start(arguments, log)
    assert codes == [0], said


def test_uninterrupted_run_logs_each_step_once(finished):
    assert [line["step"] for line in metrics(finished)] == [2, 4, 6, 8, 10, 12]
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["0000004.png", "0000008.png", "0000012.png"]
    assert not (finished / "run.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_the_same_command_goes_on(runs, tiny_latents, finished, tmp_path, number):
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    codes, said = runs.start(arguments, tmp_path / "out.txt", send=number, when=(tmp_path / "run" / "metrics.jsonl", 3))
    assert codes == [EXIT_STOPPED] and "stopped at step" in said
    assert not (tmp_path / "run" / "run.lock").exists()
    run_to_the_end(runs, arguments, tmp_path / "out.txt")
    assert_same_run_but_for_the_stop(tmp_path / "run", finished)


def assert_same_run_but_for_the_stop(folder, wanted):
    """keep_last counts the checkpoint of the stop too, so only the last one is sure to be in both."""
    steps = {path.stem for path in (wanted / "checkpoints").iterdir()}
    for path in list((folder / "checkpoints").iterdir()) + list((wanted / "checkpoints").iterdir()):
        if path.stem not in steps:
            path.unlink()
    extra = steps - {path.stem for path in (folder / "checkpoints").iterdir()}
    hidden = {path: path.read_bytes() for path in (wanted / "checkpoints").iterdir() if path.stem in extra}
    for path in hidden:
        path.unlink()
    try:
        assert_same_run(folder, wanted)
    finally:
        for path, content in hidden.items():
            path.write_bytes(content)


def test_signal_before_the_first_step_stops_in_good_order(runs, tiny_latents, finished, tmp_path):
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    codes, said = runs.start(arguments, tmp_path / "out.txt", send=signal.SIGTERM, after_s=0.05)
    assert codes[0] in (EXIT_STOPPED, -signal.SIGTERM)  # the second: even before Python had installed the handler
    run_to_the_end(runs, arguments, tmp_path / "out.txt")
    assert_same_run(tmp_path / "run", finished)


# A checkpoint flushes four times: manifest, folder, .pt, folder. Those of step 4 come first, then those of step 8.
@pytest.mark.parametrize("crash, code, newest", [
    (("notice in write", 100), EXIT_STOPPED, None), (("notice in sync", 5), EXIT_STOPPED, None), (("notice in sync", 7), EXIT_STOPPED, None),
    (("two notices in write", 100), 128 + signal.SIGTERM, None), (("two notices in sync", 5), 128 + signal.SIGTERM, "0000004"),
    (("stream", 100), -signal.SIGKILL, None), (("sync", 5), -signal.SIGKILL, "0000004"),
    (("sync", 7), -signal.SIGKILL, "0000004"),  # the manifest is there before the file
])
def test_signal_while_a_checkpoint_is_written(runs, tiny_latents, finished, tmp_path, crash, code, newest):
    """SIGTERM lets the write end and saves the stop after it; a second one, or SIGKILL, leaves half a file that nobody takes up."""
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    codes, said = runs.start(arguments, tmp_path / "out.txt", crash=crash)
    assert codes == [code], said
    halves = list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    found = find_latest(tmp_path / "run" / "checkpoints")
    if code == EXIT_STOPPED:
        assert f"stopped at step {int(found.stem)} as asked" in said and not halves
    else:
        assert (found and found.stem) == newest and halves
    run_to_the_end(runs, arguments, tmp_path / "out.txt")
    assert_same_run_but_for_the_stop(tmp_path / "run", finished)


@pytest.mark.parametrize("crash, codes", [(("notice in write", 100), [EXIT_STOPPED] * 2), (("stream", 100), [-signal.SIGKILL] * 2)])
def test_signal_while_one_of_two_processes_writes_a_checkpoint(runs, tiny_latents, tmp_path, crash, codes):
    calm, stopped = (command_line(tiny_latents, tmp_path / name) for name in ("calm", "stopped"))
    assert runs.start(calm, tmp_path / "out.txt", 2)[0] == [0, 0]
    assert runs.start(stopped, tmp_path / "out.txt", 2, crash=crash)[0] == codes
    assert runs.start(stopped, tmp_path / "out.txt", 2)[0] == [0, 0]
    assert_same_run_but_for_the_stop(tmp_path / "stopped" / "run", tmp_path / "calm" / "run")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_kill_9_at_random_steps(runs, tiny_latents, tmp_path, processes):
    """With three, the order in which gradients are summed matters: it must not depend on when the run was started."""
    arguments = [command_line(tiny_latents, tmp_path / name, log__sample_every=6) for name in ("calm", "killed")]
    assert runs.start(arguments[0], tmp_path / "calm.txt", processes)[0] == [0] * processes
    dice = random.Random(processes)
    for _ in range(3):
        runs.start(arguments[1], tmp_path / "killed.txt", processes, crash=("step", dice.randint(2, 7)))
    assert runs.start(arguments[1], tmp_path / "killed.txt", processes)[0] == [0] * processes
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


@pytest.mark.parametrize("processes, batch", [(2, 2), (1, 8), (2, 4)])
def test_other_world_size_or_batch_goes_on_at_the_same_image(runs, tiny_latents, tmp_path, processes, batch):
    first = command_line(tiny_latents, tmp_path, train__max_num_steps=6, log__log_every=3)
    assert runs.start(first, tmp_path / "out.txt")[0] == [0]
    then = command_line(tiny_latents, tmp_path, train__max_num_steps=9, train__batchsize=batch, log__log_every=3)
    codes, said = runs.start(then, tmp_path / "out.txt", processes)
    assert codes == [0] * processes
    assert "6, 24 images seen" in said and f"going on with {processes} processes of {batch} images instead of 1 of 4" in said
    assert f"the data goes on at image 24, steps are now {processes * batch} images instead of 4" in said
    assert [(line["step"], line["images"]) for line in metrics(tmp_path / "run")] == [(3, 12), (6, 24), (9, 24 + 3 * processes * batch)]


def test_changed_settings_are_told_and_another_model_is_refused(runs, tiny_latents, tmp_path):
    assert runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt")[0] == [0]
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__lr=2e-3), tmp_path / "out.txt")
    assert codes == [0] and "settings changed since the checkpoint: train.lr 0.001 -> 0.002" in said
    codes, said = runs.start(command_line(tiny_latents, tmp_path, model__width=32), tmp_path / "out.txt")
    assert codes == [2] and "holds a run of another model: model.width 16 -> 32" in said
    assert not (tmp_path / "run" / "run.lock").exists()


def test_run_of_an_older_version_goes_on_and_keys_that_are_gone_are_told(runs, tiny_latents, tmp_path):
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    run_to_the_end(runs, [*arguments, "train.max_num_steps=4"], tmp_path / "out.txt")
    newest = find_latest(tmp_path / "run" / "checkpoints")
    checkpoint = torch.load(newest, weights_only=True)
    checkpoint["config"]["train"] |= {"switch_off": [], "token_multiple": 1}
    write_checkpoint(newest, checkpoint)
    codes, said = runs.start(arguments, tmp_path / "out.txt")
    assert codes == [0] and "without effect today: train.switch_off, train.token_multiple" in said
    assert "settings changed since the checkpoint: train.max_num_steps 4 -> 12\n" in said


def test_shorter_log_is_told_and_does_not_stop_the_run(runs, tiny_latents, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    assert runs.start(command_line(tiny_latents, tmp_path), tmp_path / "out.txt")[0] == [0]
    log.write_bytes(log.read_bytes()[:-20])
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=14), tmp_path / "out.txt")
    assert codes == [0] and "WARNING" in said and "the lines between are lost" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 6, 8, 10, 14]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(runs, tiny_latents, finished, tmp_path):
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    assert runs.start(arguments, tmp_path / "out.txt")[0] == [0]
    newest = tmp_path / "run" / "checkpoints" / "0000012.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    codes, said = runs.start(arguments, tmp_path / "out.txt")
    assert codes == [0] and f"checkpoint {newest} is passed over: its checksum differs" in said and "step 8, 32 images" in said
    assert_same_run(tmp_path / "run", finished)
    for path in newest.parent.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    codes, said = runs.start(arguments, tmp_path / "out.txt")
    assert codes == [2] and "are damaged (0000012.pt, 0000008.pt); restore one" in said


def train_and_count_hashes(folder, *arguments):
    """Train in this process and note in folder/RANK.txt which files it has hashed."""
    import sampling.load
    import train_latent

    hashed, original = [], sampling.load.file_sha256
    sampling.load.file_sha256 = lambda path: hashed.append(path.name) or original(path)
    sys.argv = ["train_latent.py", *arguments]
    assert not train_latent.main()
    Path(folder, f"{os.environ['RANK']}.txt").write_text(" ".join(hashed))


def test_one_process_verifies_the_checkpoint_for_all_and_all_pass_over_a_damaged_one(runs, tiny_latents, tmp_path):
    arguments = command_line(tiny_latents, tmp_path)
    assert runs.start(arguments, tmp_path / "out.txt")[0] == [0]
    newest = tmp_path / "run" / "checkpoints" / "0000012.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    said = runs.call("test_resume:train_and_count_hashes", [tmp_path, *arguments], tmp_path / "out.txt", processes=2)
    assert said.count("is passed over: its checksum differs") == 1 and "resuming from" in said and "step 8, 32 images" in said
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["0000012.pt 0000008.pt", ""]
    tuned = command_line(tiny_latents, tmp_path, log__exp_name="tuned", train__max_num_steps=1)
    tuned += ["--finetune", "--ckpt_path", str(newest)]
    runs.call("test_resume:train_and_count_hashes", [tmp_path, *tuned], tmp_path / "out.txt", processes=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["0000012.pt", ""]
    newest.write_bytes(newest.read_bytes()[:-1])
    codes, said = runs.start([*tuned, "log.exp_name=again"], tmp_path / "out.txt", 2)
    assert set(codes) <= {1, 2} and said.count(f"checkpoint {newest} is damaged: ") == 1 and "Traceback" not in said


def test_bad_data_ends_the_run_after_the_weights_are_safe(runs, tmp_path):
    from training_runs import write_latents

    data = write_latents(tmp_path / "set")
    arguments = command_line(data, tmp_path, train__max_num_steps=500, log__log_every=1, log__ckpt_every=1000)
    shard = data / "moments-00001.npy"
    shard_bytes = shard.read_bytes()

    import threading

    def cut_when_running():
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 5:
            pass
        with open(shard, "r+b") as stream:
            stream.truncate(4096)

    cutter = threading.Thread(target=cut_when_running)
    cutter.start()
    codes, said = runs.start(arguments, tmp_path / "out.txt")
    cutter.join()
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    assert codes == [2] and len(lines) == 1
    assert str(shard) in lines[0] and ("cut short" in lines[0] or "sample" in lines[0])
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*.json"))
    assert json.loads(saved[-1].read_text())["step"] == metrics(tmp_path / "run")[-1]["step"]
    shard.write_bytes(shard_bytes)
    codes, said = runs.start(command_line(data, tmp_path, train__max_num_steps=500, log__ckpt_every=1000), tmp_path / "out.txt",
                             send=signal.SIGTERM, when=(tmp_path / "out.txt", 4))
    assert "resuming from" in said


def test_second_signal_ends_at_once_and_nothing_is_lost(runs, tiny_latents, finished, tmp_path):
    """The second one arrives while the sample grid of the first stop's step is drawn for ever."""
    arguments = command_line(tiny_latents, tmp_path, log__sample_every=4)
    codes, _ = runs.start([*arguments, "sample.num_steps=1000000"], tmp_path / "out.txt", send=signal.SIGTERM,
                          when=(tmp_path / "run" / "metrics.jsonl", 2), again_s=0.5)
    assert codes == [128 + signal.SIGTERM]
    run_to_the_end(runs, arguments, tmp_path / "out.txt")
    assert_same_run(tmp_path / "run", finished)


def test_last_step_is_saved_with_its_counters(finished):
    content = torch.load(finished / "checkpoints" / "0000012.pt", weights_only=True)
    assert content["step"] == 12 and content["images_seen"] == 48 and content["stepper"]["bad_steps"] == [0, 0]
