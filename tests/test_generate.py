"""generate.py as it is called: flags, one folder rule, one line for every mistake, and nothing left behind by a refusal."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import models
from training.checkpoint import write_checkpoint
from utils.cli import EXIT_BAD, EXIT_USER_ERROR, UserError
from utils.config import load_config, model_arguments, to_dict

SETTINGS = ["model.model_type=DiT-S/2", "model.in_size=8", "model.num_classes=3", "model.depth=1", "model.width=16", "model.num_heads=2",
            "model.decoder_depth=1", "model.decoder_width=16", "model.decoder_num_heads=2", "sample.num_steps=2", "sample.batchsize=3"]


def command(*arguments):
    """In a process of its own (see training_runs.Runs): generate.py with these arguments."""
    import generate
    from utils.cli import run

    sys.argv = ["generate.py", *arguments]
    run(generate.main)


def write_network(path, seed=0, poison=False, **extra):
    config = load_config(None, SETTINGS)
    torch.manual_seed(seed)
    net = models.build_model(**model_arguments(config))
    for name, parameter in net.named_parameters():
        if "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if poison:  # class 2 gives NaN
        net.model.y_embedder.embedding_table.weight.data[:, 2] = torch.nan
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {"model": net.state_dict(), "ema": net.state_dict(), "step": 4, "config": to_dict(config),
                            "class_names": ["blåbär", "hallon", "lingon"], **extra})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("results") / "berries" / "checkpoints" / "0000004.pt")


@pytest.fixture
def generate(runs, checkpoint, tiny_vae, tmp_path):
    """generate(arguments, ...) -> what was printed; the exit code is asserted."""
    def call(*arguments, code=0, path=checkpoint, vae=tiny_vae, processes=1):
        codes, said = runs.start(["--ckpt_path", path, "--vae", vae, *arguments], tmp_path / "out.txt", processes, function="test_generate:command")
        assert codes == [code] * processes, said
        if code == EXIT_USER_ERROR:
            assert said.startswith("error: ") and len(said.splitlines()) == 1, said
        return said

    return call


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------ flags

def test_seeds_and_ranges():
    from generate import parse_seeds

    assert parse_seeds("0-3,8, 10-10") == [0, 1, 2, 3, 8, 10]
    for text in ("", "a", "3-1", "-2", "1-", "1,,2", "\u00b2", "9" * 5000, "1-" + "9" * 5000):
        with pytest.raises(UserError, match="wanted numbers and ranges such as"):
            parse_seeds(text)
    with pytest.raises(UserError, match="named twice"):
        parse_seeds("0-4,3")
    with pytest.raises(UserError, match="these are 1,000,000,000,000 images; wanted at most 10,000,000 in one command"):
        parse_seeds("0-999999999999")


def test_compile_workers_are_divided_before_the_blocks_are_compiled(monkeypatch, checkpoint):
    """The compiler reads their number when it is imported."""
    import generate

    def compile_blocks(net):
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1" and torch.are_deterministic_algorithms_enabled()
        raise InterruptedError

    for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "CUDA_PATH", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.setattr(models.EDMPrecond, "compile_blocks", compile_blocks)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--ckpt_path", str(checkpoint), "--seeds", "0", "sample.compile=true"])
    try:
        with pytest.raises(InterruptedError):
            generate.main()
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_folder_has_the_runs_name():
    from generate import default_folder

    assert default_folder("results/mine/checkpoints/0050000.pt") == "samples/mine-0050000"
    assert default_folder("assets/imagenet256-ckpt-best_with_guidance.pt") == "samples/imagenet256-ckpt-best_with_guidance"


def test_an_override_after_class_idx_is_an_override(monkeypatch):
    from generate import parse_arguments

    args, overrides = parse_arguments(["--ckpt_path", "x.pt", "--class_idx", "3", "sample.num_steps=5", "--cfg_scale", "2", "--vae", "v"])
    assert args.class_idx == ["3"] and overrides == ["sample.num_steps=5", "sample.cfg_scale=2", "vae.path=v"]


# ------------------------------------------------------------------------------------------------ one rule for all formats

@pytest.mark.parametrize("format, files", [("png", ["grid.png", "images/000000.png", "images/000001.png", "images/000002.png", "images/000003.png",
                                                    "labels.csv", "settings.json"]),
                                           ("npz", ["grid.png", "samples.npz", "settings.json"]),
                                           ("latents", ["latents.npz", "settings.json"])])
def test_other_seeds_are_added_and_other_settings_refused_in_every_format(generate, tmp_path, format, files):
    arguments = ["--format", format, "--outdir", tmp_path / "out"]
    assert "2 images, " in generate("--seeds", "1,2", *arguments)
    assert "2 images, " in (said := generate("--seeds", "0-3", *arguments)) and "; 2 were there already" in said
    assert names(tmp_path / "out") == files
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files}
    assert "0 images, " in (said := generate("--seeds", "1-3", *arguments)) and "; 3 were there already" in said
    said = generate("--seeds", "0-3", *arguments, "--cfg_scale", 2, "--num_steps", 3, code=EXIT_USER_ERROR)
    assert "holds samples of other settings: sample.cfg_scale 1.0 there, 2.0 now; sample.num_steps 2 there, 3 now" in said
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


def test_another_checkpoint_at_the_same_path_is_refused(generate, tmp_path):
    path = write_network(tmp_path / "0000004.pt")
    generate("--seeds", "0-1", "--outdir", tmp_path / "out", path=path)
    write_network(path, seed=1)
    said = generate("--seeds", "0-1", "--outdir", tmp_path / "out", path=path, code=EXIT_USER_ERROR)
    assert "checkpoint.sha256" in said and "Give another --outdir" in said


def test_numbers_are_of_all_seeds_also_of_those_that_were_there(generate, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    generate("--seeds", "0-3", "--outdir", tmp_path / "out")
    generate("--seeds", "0-5", "--outdir", tmp_path / "out", "--ref_path", tmp_path / "real.npz", "eval.embedding=pixels")
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert settings["num_images"] == 6 and settings["sampling"]["seeds"] == "0-5"


def test_two_processes_make_the_same_files(generate, tmp_path):
    for processes in (1, 2):
        generate("--seeds", "0-7", "--format", "latents", "--outdir", tmp_path / str(processes), processes=processes)
    one, two = (np.load(tmp_path / number / "latents.npz") for number in "12")
    assert all(np.array_equal(one[name], two[name]) for name in ("latents", "seeds", "labels")) and len(one["seeds"]) == 8


def test_classes_by_name_are_in_labels_csv_and_settings(generate, tmp_path):
    generate("--seeds", "0-2", "--class_idx", "lingon", "blåbär", "sample.num_steps=3", "--outdir", tmp_path / "out")
    assert (tmp_path / "out" / "labels.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "images/000000.png,0,2,lingon", "images/000001.png,1,0,blåbär", "images/000002.png,2,2,lingon"]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["class_idx"] == [2, 0] and settings["sample.num_steps"] == 3


# ------------------------------------------------------------------------------------------------ mistakes

@pytest.mark.parametrize("arguments, message", [
    (["--solver", "rk4"], "sample.solver='rk4'"),
    (["--sigma_min", "90"], "sigma_min=90.0"),
    (["--cfg_scale", "inf"], "sample.cfg_scale=inf"),
    (["sample.sampler=dpm"], "sample.sampler='dpm' is unknown; wanted one of edm, ablation"),
    (["sample.sampler=edm", "sample.solver=euler"], "not an option of the sampler edm, but of ablation"),
    (["--class_idx", "gurka"], "gurka"),
    (["--vae", "nowhere.pth"], "no autoencoder at nowhere.pth"),
    (["--seeds", "0-999999999999"], "these are 1,000,000,000,000 images"),
    (["--num_process_per_node", "-2"], "--num_process_per_node -2: wanted 1 to"),
    (["sample.num_steps=["], "sample.num_steps=["),
    (["--ref_path", "nowhere.npz"], "nowhere.npz"),
])
def test_a_refused_command_is_one_line_and_leaves_no_folder(generate, tmp_path, arguments, message):
    assert message in generate("--outdir", tmp_path / "out", *arguments, code=EXIT_USER_ERROR)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, message", [("file", "is a file; give a folder"), ("file/below", "cannot be written"),
                                           ("a" * 300, "cannot be written (File name too long)"), ("/proc/out", "cannot be written")])
def test_an_outdir_that_cannot_be_written_is_one_line(generate, tmp_path, name, message):
    (tmp_path / "file").write_text("")
    assert message in generate("--outdir", tmp_path / name, code=EXIT_USER_ERROR)


def test_latents_of_another_autoencoder_are_refused_before_any_work(generate, tmp_path):
    path = write_network(tmp_path / "0000004.pt", latents={"scale": 0.18215, "shift": 0.0, "vae": "0123456789abcdef"})
    said = generate("--outdir", tmp_path / "out", path=path, code=EXIT_USER_ERROR)
    assert "has latents of the autoencoder 0123456789abcdef, but vae.path=" in said and "--vae" in said
    assert not (tmp_path / "out").exists()
    generate("--outdir", tmp_path / "out", "--format", "latents", "--seeds", "0", path=path)  # they need none


def test_latents_of_an_unknown_autoencoder_are_decoded_with_the_numbers_of_the_checkpoint(generate, tmp_path, tiny_vae):
    """A decoder whose own scale is that of the checkpoint makes the same images; it says nothing, the other one says which it takes."""
    path = write_network(tmp_path / "0000004.pt", latents={"scale": 0.5, "shift": 0.0, "vae": ""})
    shutil.copytree(tiny_vae, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    told = generate("--outdir", tmp_path / "one", "--seeds", "0", path=path)
    assert told.count("they are decoded with that scale, not with the 0.18215 of vae.path=") == 1
    assert "they are decoded with" not in generate("--outdir", tmp_path / "two", "--seeds", "0", path=path, vae=tmp_path / "vae")
    one, two = (tmp_path / name / "images" / "000000.png" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_that_does_not_fit_gets_advice_that_works(generate, tmp_path):
    said = generate("--outdir", tmp_path / "out", "model.num_classes=7", code=EXIT_USER_ERROR)
    assert "does not fit the model" in said and "--skip_mismatched" not in said and "--finetune" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_images_with_nan_are_counted_and_named_and_not_measured(generate, tmp_path, processes):
    path = write_network(tmp_path / "0000004.pt", poison=True)
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    said = generate("--seeds", "0-7", "--class_idx", 0, 2, 1, 0, "--outdir", tmp_path / "out", "--ref_path", tmp_path / "real.npz",
                    "eval.embedding=pixels", path=path, processes=processes, code=EXIT_BAD)
    assert "WARNING: 2 of 8 images have NaN or Inf: seeds 1, 5, which are not written and not measured" in said
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert [name for name in names(tmp_path / "out") if name.startswith("images")] == [f"images/00000{seed}.png" for seed in (0, 2, 3, 4, 6, 7)]
