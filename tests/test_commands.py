"""The commands of the README as a user types them, on tiny data: each a process of its own."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.depth=1", "model.width=32", "model.num_heads=2", "model.decoder_depth=1", "model.decoder_width=16",
        "model.decoder_num_heads=2", "model.in_size=8", "model.num_classes=10"]
SHORT = ["train.batchsize=2", "train.max_num_steps=4", "log.log_every=2", "log.ckpt_every=2"]


def run_script(script, *arguments, check=True):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A published-format LMDB of 12 samples and their mirrored copies, below train/."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (root / "train").mkdir()
    with lmdb.open(str(root / "train"), map_size=1 << 26) as store, store.begin(write=True) as transaction:
        for i in range(24):
            transaction.put(f"z-{i}".encode(), random.standard_normal((8, 8, 8)).astype(np.float32).tobytes())
            transaction.put(f"y-{i}".encode(), str(i % 10).encode())
        transaction.put(b"length", b"12")
    return root


@pytest.fixture(scope="module")
def trained(latents, tiny_vae, tmp_path_factory):
    """The experiment folder of a pre-training run on two processes."""
    results = tmp_path_factory.mktemp("results")
    done = run_script("train_latent.py", "--config", "configs/train/maskdit-latent-imagenet.yaml", "--num_process_per_node", 2,
                      f"data.root={latents}", f"log.results_dir={results}", *TINY, *SHORT, "log.sample_every=4", "log.num_grid_images=9",
                      "sample.num_steps=2", f"vae.path={tiny_vae}")
    assert "step 4/4" in done.stdout and "left" in done.stdout
    return results / "maskdit-latent-imagenet"


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """The same weights as a published file has them: wrapper prefixes, an argparse.Namespace, no step number."""
    ours = torch.load(trained / "checkpoints" / "0000004.pt", weights_only=True)
    path = tmp_path_factory.mktemp("published") / "best_with_guidance.pt"
    torch.save({"model": {f"module.{name}": value for name, value in ours["model"].items()},
                "ema": {f"_orig_mod.{name}": value for name, value in ours["ema"].items()},
                "opt": ours["opt"], "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def test_pretraining_leaves_a_whole_run_folder(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(np.isfinite(line["loss"]) and line["images"] == line["step"] * 4 for line in lines)
    assert {"config.yaml", "log.txt", "loss.png"} <= {path.name for path in trained.iterdir()}
    assert (trained / "samples" / "0000004.png").is_file()
    assert not (trained / "run.lock").exists()


@pytest.mark.parametrize("kind, ratio", [("const", [0.0, 0.0]), ("cos", [0.4, 0.1])])
def test_unmasking_tuning_counts_on_from_the_checkpoint(kind, ratio, published, latents, tmp_path):
    run_script("train_latent.py", "--config", f"configs/finetune/maskdit-latent-imagenet-{kind}.yaml", "--ckpt_path", published,
               "--use_ckpt_path", "False", "--use_strict_load", "False", "--no_amp", f"data.root={latents}",
               f"log.results_dir={tmp_path}", *TINY, *SHORT, "log.sample_every=0")
    folder = tmp_path / f"maskdit-latent-imagenet-{kind}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 8]  # four steps of pre-training, told by AdamW's state
    # The ratio of the last step of each line: 0.5 cos^4(pi t / 2) at t = 1/4 and 3/4 is 0.364 and 0.011: 6 and 1 of 16 patches are removed.
    wanted = [0.0, 0.0] if kind == "const" else [6 / 16, 1 / 16]
    assert [line["mask_ratio"] for line in lines] == wanted
    assert "amp: 'no'" in (folder / "config.yaml").read_text()


def test_the_same_command_again_is_quick_and_harmless(trained, latents, tiny_vae):
    before = {path.name: path.read_bytes() for path in (trained / "checkpoints").iterdir()}
    done = run_script("train_latent.py", "--config", "configs/train/maskdit-latent-imagenet.yaml", f"data.root={latents}",
                      f"log.results_dir={trained.parent}", *TINY, *SHORT, f"vae.path={tiny_vae}")
    assert "resuming from" in done.stdout and "step 4" in done.stdout
    assert {path.name: path.read_bytes() for path in (trained / "checkpoints").iterdir()} == before


def test_generate_from_a_published_file(published, tiny_vae, tmp_path):
    run_script("generate.py", "--config", "configs/test/maskdit-latent-base.yaml", "--ckpt_path", published, "--class_idx", 3,
               "--cfg_scale", 2.5, "--seeds", "0-2", "--num_steps", 2, "--outdir", tmp_path / "out", f"vae.path={tiny_vae}", *TINY)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "images", "labels.csv", "settings.json"]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    with Image.open(tmp_path / "out" / "images" / "000000.png") as image:
        assert image.size == (32, 32)  # 8 x 8 latents through a VAE of f = 4


def test_generate_npz_from_our_file_without_a_config(trained, tiny_vae, tmp_path):
    checkpoint = trained / "checkpoints" / "0000004.pt"
    arguments = ("generate.py", "--ckpt_path", checkpoint, "--num_steps", 2, "--format", "npz", "--vae", tiny_vae, "--cfg_scale", 1)
    run_script(*arguments, "--seeds", "0-4", "--batchsize", 2, "--num_process_per_node", 2, "--outdir", tmp_path / "two")
    run_script(*arguments, "--seeds", "0-4", "--outdir", tmp_path / "one")
    two, one = np.load(tmp_path / "two" / "samples.npz"), np.load(tmp_path / "one" / "samples.npz")
    assert one["arr_0"].shape == (5, 32, 32, 3) and one["arr_0"].dtype == np.uint8
    assert np.array_equal(one["labels"], two["labels"]) and np.array_equal(one["seeds"], np.arange(5))
    # Other batch sizes round float32 sums differently: now and then a pixel moves by one grey level.
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


@pytest.mark.parametrize("arguments, message", [
    (["--ckpt_path", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--ckpt_path", "x.pt", "--seeds", "5-2"], "--seeds 5-2"),
    (["--ckpt_path", "x.pt", "sample.cfgscale=2"], "sample.cfg_scale"),
    (["--ckpt_path", "x.pt", "--format", "none"], "--ref_path"),
    (["--ckpt_path", "x.pt", "--config", "configs/test/maskdit-latent-bas.yaml"], "cannot be read as YAML: No such file or directory"),
    (["--ckpt_path", "x.pt", "--num_process_per_node", "-2"], "--num_process_per_node -2"),
])
def test_generate_refuses_bad_input_in_one_line(arguments, message):
    done = run_script("generate.py", *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments, message", [
    (["data.root=nowhere"], "nowhere"),
    (["train.lrr=1"], "did you mean 'train.lr'"),
    (["data.root=x", "train.batchsize=3", "train.grad_accum=2"], "train.batchsize=3"),
    ([], "assets/imagenet_256_latent_lmdb"),
    (["--ckpt_pth", "x.pt"], "is not understood; see --help"),
    (["sample.num_steps=["], "sample.num_steps=[ cannot be read as YAML"),
    ([f"train.seed={2**64}"], "must be at least 0 and below 18446744073709551616"),
    (["--num_process_per_node", "-2"], "--num_process_per_node -2: wanted 1 to 4096"),
])
def test_training_refuses_bad_input_in_one_line(arguments, message, tmp_path):
    done = run_script("train_latent.py", "--config", "configs/train/maskdit-latent-imagenet.yaml", f"log.results_dir={tmp_path}",
                      *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing was made


def test_generate_keeps_samples_of_other_settings(trained, tmp_path):
    arguments = ("generate.py", "--ckpt_path", trained / "checkpoints" / "0000004.pt", "--seeds", "0-1", "--format", "latents",
                 "--num_steps", 2, "--outdir", tmp_path / "out")
    run_script(*arguments)
    before = (tmp_path / "out" / "latents.npz").read_bytes()
    done = run_script(*arguments, "--cfg_scale", 3, check=False)
    assert done.returncode == 2 and "other settings" in done.stderr
    assert (tmp_path / "out" / "latents.npz").read_bytes() == before


def test_train_on_images_of_a_folder(tiny_vae, tmp_path):
    """train.py: class sub-folders, encoded on the fly."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    run_script("train.py", "--config", "configs/train/maskdit-imagenet.yaml", f"data.root={tmp_path / 'images'}", "data.resolution=32",
               f"vae.path={tiny_vae}", f"log.results_dir={tmp_path}", *TINY, "model.num_classes=2", *SHORT, "log.sample_every=0")
    checkpoint = torch.load(tmp_path / "maskdit-imagenet" / "checkpoints" / "0000004.pt", weights_only=True)
    assert checkpoint["step"] == 4 and checkpoint["class_names"] == ["cat", "dog"]


def test_any_user_of_the_image_can_write_below_assets(tmp_path):
    """The Dockerfile's own command, on folders that only their owner could write to."""
    command, = re.findall(r"^RUN (find assets .*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    folders = [tmp_path / "assets", tmp_path / "assets" / "demo-vae"]
    for folder in folders:
        folder.mkdir(mode=0o755)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o777, 0o777]
