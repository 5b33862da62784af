"""From the command line to the loop: one job per folder, everything checked before the network is made, nothing left by what is refused."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_runs import ROOT, command_line, metrics, write_latents

from training import start
from training.checkpoint import write_checkpoint
from training.start import claim, differences
from utils.cli import EXIT_BAD, UserError

HOLDER = """
import sys, time
from pathlib import Path
from training.start import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


# ------------------------------------------------------------------------------------------------ one job per folder

@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_job_is_refused_with_the_owners_name(holder, tmp_path):
    with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on {socket.gethostname()}; stop that job first"):
        with claim(tmp_path / "run"):
            pass
    assert (tmp_path / "run" / "run.lock").exists()


def test_lock_of_a_killed_process_is_free(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / "run.lock").exists()
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not (tmp_path / "run" / "run.lock").exists()


def test_lock_that_its_holder_deletes_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening and locking the file, the other job ends: the lock must be on the file that the next job opens."""
    flock, calls = start.fcntl.flock, []

    def end_of_the_other_job(file, how):
        if not calls:
            os.unlink(tmp_path / "run.lock")
        calls.append(1)
        flock(file, how)

    monkeypatch.setattr(start.fcntl, "flock", end_of_the_other_job)
    with claim(tmp_path):
        assert len(calls) == 2 and (tmp_path / "run.lock").exists()
        monkeypatch.undo()
        with pytest.raises(UserError, match="in use"), claim(tmp_path):
            pass


def test_new_folder_goes_again_if_nothing_was_written_and_an_old_one_stays(tmp_path):
    for old in (False, True):
        folder = tmp_path / "run"
        if old:
            folder.mkdir()
        with pytest.raises(RuntimeError), claim(folder):
            raise RuntimeError("refused")
        assert folder.exists() == old
    with claim(tmp_path / "new"):
        (tmp_path / "new" / "config.yaml").write_text("")
    assert os.listdir(tmp_path / "new") == ["config.yaml"]


# ------------------------------------------------------------------------------------------------ checked before any work

def refused(runs, data, folder, *flags, **settings):
    """The one line that a training command ends with; the network must not have been made, nor a folder."""
    codes, said = runs.start([*command_line(data, folder, **settings), *flags], folder / "out.txt")
    assert codes == [2] and "Traceback" not in said and "parameters" not in said, said
    assert not (folder / "run").exists()
    return said.splitlines()[-1]


@pytest.mark.parametrize("settings, wanted", [
    ({"sample__sampler": "euler9"}, "euler9"),
    ({"sample__sigma_min": 90}, "sigma_m"),
    ({"train__loss": "huber"}, "train.loss='huber' is unknown; wanted one of edm"),
    ({"log__wandb": "true"}, "log.wandb=true needs the package wandb"),
    ({"log__sample_every": 4, "vae__path": "nowhere"}, "nowhere"),
    ({"eval__every": 4, "eval__ref_path": "nowhere.npz", "vae__path": "nowhere"}, "nowhere"),
    ({"model__in_size": 16}, "model.in_size=16"),
    ({"log__exp_name": "x" * 300}, "cannot be written (File name too long)"),
])
def test_what_cannot_work_is_told_before_any_work(runs, tiny_latents, tmp_path, settings, wanted):
    if "log__wandb" in settings and __import__("importlib").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert wanted in refused(runs, tiny_latents, tmp_path, **settings)


def test_results_dir_that_is_a_file_is_one_line(runs, tiny_latents, tmp_path):
    (tmp_path / "file").write_text("")
    assert "log.results_dir" in refused(runs, tiny_latents, tmp_path, "--results_dir", str(tmp_path / "file"))


def test_missing_checkpoint_is_told_and_the_corrected_command_runs(runs, tiny_latents, tmp_path):
    assert "no such file" in refused(runs, tiny_latents, tmp_path, "--ckpt_path", str(tmp_path / "nowhere.pt"), "--finetune")
    assert runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=2), tmp_path / "out.txt")[0] == [0]


def test_reference_of_evaluations_is_opened_before_the_network_is_made(runs, tiny_latents, tiny_vae, tmp_path):
    settings = {"eval__every": 4, "eval__ref_path": "nowhere.npz", "eval__embedding": "pixels"}
    said = refused(runs, tiny_latents, tmp_path, vae__path=tiny_vae, **settings)
    assert "nowhere.npz" in said


@pytest.mark.parametrize("resolution, message", [
    (32, "set model.in_channels=4 and model.in_size=8"), (30, "data.resolution=30 must be divisible by 4, the pixels in a latent value")])
def test_images_whose_latents_the_model_does_not_take_are_told_before_it_is_made(monkeypatch, tiny_vae, tmp_path, resolution, message):
    """tiny_vae makes 4 x 8 x 8 latents of 32 pixels."""
    import train
    from PIL import Image

    (tmp_path / "images" / "cat").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / "cat" / f"{i}.png")
    arguments = command_line(tmp_path / "images", tmp_path, data__resolution=resolution, vae__path=tiny_vae, model__in_size=16,
                             model__num_classes=1)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr("training.start.build_model", lambda **_: pytest.fail("the network was made"))
    with pytest.raises(UserError, match=message):
        train.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("deterministic", [True, False])
def test_nccl_is_told_which_sums_to_leave_out_before_processes_are_connected(monkeypatch, tmp_path, deterministic):
    """Reductions inside the switches (NVLS within a node, NVLSTree over several) differ from call to call. torch must know of determinism by then, too."""
    import torch
    import train_latent

    def init(timeout_s):
        assert os.environ.get("NCCL_ALGO") == ("^NVLS,NVLSTree" if deterministic else None)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        raise InterruptedError

    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setattr("utils.distributed.init", init)
    monkeypatch.setattr(sys, "argv", ["train_latent.py", *command_line(tmp_path, tmp_path, train__deterministic=deterministic)])
    try:
        with pytest.raises(InterruptedError):
            train_latent.main()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("NCCL_ALGO", None)


@pytest.mark.parametrize("at_once", [1, 2, 3, 32])
def test_latents_do_not_depend_on_how_many_images_are_encoded_at_once(monkeypatch, tiny_vae, at_once):
    """Same random numbers; float32 convolutions of other batch sizes agree to rounding."""
    import torch
    import train
    from models.autoencoder import Autoencoder
    from utils.config import from_dict

    sizes, encode_moments = [], Autoencoder.encode_moments
    monkeypatch.setattr(Autoencoder, "encode_moments", lambda self, images: [sizes.append(len(images)), encode_moments(self, images)][1])
    images = torch.arange(5 * 3 * 32 * 32).reshape(5, 3, 32, 32).mul(7919).remainder(256).to(torch.uint8)

    def latents(batchsize):
        config = from_dict({"vae": {"path": str(tiny_vae), "batchsize": batchsize}, "data": {"resolution": 32}, "model": {"in_size": 8}})
        return train.make_encode(config, None, torch.device("cpu"))[0](images, torch.Generator().manual_seed(1))

    parts = latents(at_once)
    assert max(sizes) == min(at_once, 5) and sum(sizes) == 5
    torch.testing.assert_close(parts, latents(5), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ going on in a folder

@pytest.fixture
def finished(runs, tiny_latents, tmp_path):
    """A run of 4 steps in tmp_path/run."""
    assert runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=4), tmp_path / "out.txt")[0] == [0]
    return tmp_path / "run"


def test_another_data_set_does_not_go_on_with_the_first_model(runs, finished, tiny_latents, tmp_path):
    other = write_latents(tmp_path / "other")
    codes, said = runs.start(command_line(other, tmp_path, train__max_num_steps=6), tmp_path / "out.txt")
    assert codes == [2] and f"holds a run on data.root={tiny_latents}, not {other}; choose another log.exp_name for other data" in said
    codes, said = runs.start([*command_line(other, tmp_path, train__max_num_steps=6), "--accept_data"], tmp_path / "out.txt")
    assert codes == [0] and metrics(finished)[-1]["step"] == 6


def test_the_same_data_by_another_path_goes_on(runs, finished, tiny_latents, tmp_path):
    detour = tiny_latents / ".." / tiny_latents.name
    codes, said = runs.start(command_line(detour, tmp_path, train__max_num_steps=6), tmp_path / "out.txt")
    assert codes == [0], said


def test_end_before_the_step_reached_is_said(runs, finished, tiny_latents, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=3), tmp_path / "out.txt")
    assert codes == [2]
    assert "run has reached step 4, past the end that train.max_num_steps=3 sets, step 3; nothing was done. Set it above 4" in said
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def change_latents(folder, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["latents"]["scale"] = 0.5
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_latents_of_another_scale_are_refused_in_the_same_folder_and_for_fine_tuning(runs, finished, tiny_latents, tmp_path):
    newest = finished / "checkpoints" / "0000004.pt"
    other = change_latents(tmp_path, newest)
    tune = [*command_line(tiny_latents, tmp_path, log__exp_name="tuned", train__max_num_steps=1), "--finetune", "--ckpt_path", str(other)]
    codes, said = runs.start(tune, tmp_path / "out.txt")
    assert codes == [2] and "was trained on latents of another kind (scale 0.5, now 0.18215)" in said and "--accept_data" in said
    assert not (tmp_path / "tuned").exists()
    assert runs.start([*tune, "--accept_data"], tmp_path / "out.txt")[0] == [0]
    write_checkpoint(newest, torch.load(other, weights_only=True))
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=6), tmp_path / "out.txt")
    assert codes == [2] and "run holds a run on latents of another kind (scale 0.5, now 0.18215); choose another log.exp_name" in said


def test_descriptions_of_latents_are_compared_as_far_as_they_are_known():
    one = {"scale": 0.18215, "shift": 0.0, "vae": "0a1b"}
    assert differences(one, dict(one)) == differences(None, one) == differences({}, one) == differences(one | {"vae": ""}, one) == ""
    assert differences(one, one | {"vae": "ffff"}) == "vae 0a1b, now ffff"
    assert differences(one | {"shift": [0.0, 1.0]}, one) == "shift [0.0, 1.0], now 0.0"


# ------------------------------------------------------------------------------------------------ what is said

def test_header_gives_the_real_sizes(runs, tiny_latents, tmp_path):
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=1, model__depth=3, model__decoder_width=24,
                                          model__decoder_num_heads=3), tmp_path / "out.txt")
    assert codes == [0]
    assert "run: DiT-S/2, encoder 3 x 16, decoder 1 x 24, 0.0M parameters, 5 classes, latents 4 x 8 x 8, 8 to 16 of 16 patches kept" in said


def test_a_run_of_nothing_but_failed_steps_does_not_end_with_done(runs, tiny_latents, tmp_path):
    codes, said = runs.start(command_line(tiny_latents, tmp_path, train__lr=1e30, train__warmup_images=0), tmp_path / "out.txt")
    assert codes == [EXIT_BAD] and "done:" not in said
    assert "of the run's 12 steps had NaN or Inf losses or gradients and changed nothing: the weights are of little use" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] is None and (tmp_path / "run" / "loss.png").is_file()
