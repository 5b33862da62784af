import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_latent
from latent_helpers import tree
from utils import cli
from models import load_autoencoder
from dataset.formats import open_latents
from dataset.images import open_images
from dataset.store import StoredLatents
from utils.cli import UserError

ROOT = Path(extract_latent.__file__).parent
NUM_IMAGES, SIZE = 10, 8


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A folder with a tiny autoencoder of random weights: 3x8x8 -> 4x4x4."""
    from diffusers import AutoencoderKL
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
                              mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * 2,
                              up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.18215)
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Ten noise images in three classes: sizes and file types vary."""
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        file = tmp_path / "images" / "abc"[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i, 20 - i, 3), np.uint8)).save(file)
    return tmp_path / "images"


@pytest.fixture
def extract(vae, monkeypatch):
    """Run the script in this process."""
    def run(*args):
        argv = ["extract_latent.py", "--vae", vae, "--resolution", SIZE, "--shard_size", 3, "--batch", 2, *args]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        extract_latent.main()
    yield run
    torch.use_deterministic_algorithms(False)


def encode_slowly(vae, pixels):
    """uint8 (3, R, R) -> moments (8, h, w) by diffusers alone, one image at a time."""
    from diffusers import AutoencoderKL
    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    with torch.no_grad():
        return model.encode(torch.tensor(pixels)[None] / 127.5 - 1).latent_dist.parameters[0].numpy()


# float32 sums in another order (batches, memory layout): values of size up to 3, about a hundred roundings of 1e-7
CLOSE = dict(rtol=0, atol=2e-5)


def test_moments_are_the_vaes_of_the_cropped_images(extract, images, vae, tmp_path):
    extract(images, tmp_path / "set", "--store", "fp32", "--xflip")
    source, latents = open_images(images, SIZE), open_latents(tmp_path / "set", xflip=True)
    moments, labels = latents.read(range(2 * NUM_IMAGES))
    pixels, wanted_labels = source.read(range(NUM_IMAGES))
    assert (len(latents), latents.sample_shape, latents.class_names) == (20, (8, 4, 4), ["a", "b", "c"])
    assert (latents.scale, latents.shift, latents.vae, latents.says_scale) == (0.18215, 0.0, "tiny", True)
    assert latents.description == {"scale": 0.18215, "shift": 0.0, "vae": load_autoencoder(vae).digest}
    np.testing.assert_array_equal(labels, np.tile(wanted_labels, 2))
    np.testing.assert_allclose(moments[:NUM_IMAGES], [encode_slowly(vae, image) for image in pixels], **CLOSE)
    np.testing.assert_allclose(moments[NUM_IMAGES:], [encode_slowly(vae, image[:, :, ::-1].copy()) for image in pixels], **CLOSE)


def test_half_precision_storage_rounds_only_once(extract, images, tmp_path):
    extract(images, tmp_path / "fp32", "--store", "fp32")
    extract(images, tmp_path / "fp16")
    wide, narrow = (StoredLatents(tmp_path / name).read(range(NUM_IMAGES))[0] for name in ("fp32", "fp16"))
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, wide.astype(np.float16))


def test_bfloat16_arithmetic_is_close_and_recorded(extract, images, tmp_path):
    extract(images, tmp_path / "exact", "--dtype", "fp32")
    extract(images, tmp_path / "rounded", "--dtype", "bf16")
    exact, rounded = (StoredLatents(tmp_path / name) for name in ("exact", "rounded"))
    assert rounded.manifest["made_by"]["vae_dtype"] == "bfloat16"
    difference = np.abs(exact.read(range(NUM_IMAGES))[0].astype(float) - rounded.read(range(NUM_IMAGES))[0])
    assert 0 < difference.mean() < 0.03  # 8 bits of mantissa: 0.4% of values of about 1 at each of some ten layers


def test_zip_gives_the_same_latents_as_the_folder(extract, images, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in images.rglob("*.*"):
            archive.write(file, file.relative_to(images))
    extract(images, tmp_path / "a")
    extract(tmp_path / "images.zip", tmp_path / "b")
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    del a["manifest.json"], b["manifest.json"]  # names its source
    assert a == b


def test_16_bit_images_give_the_latents_of_their_8_bit_form(extract, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE), np.uint8)
    for folder, array in (("narrow", grey), ("wide", grey.astype(np.uint16) * 257)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(array):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
        extract(tmp_path / folder, tmp_path / f"{folder} set")
    narrow, wide = (StoredLatents(tmp_path / f"{folder} set").read(range(3))[0] for folder in ("narrow", "wide"))
    np.testing.assert_array_equal(narrow, wide)


def test_part_of_a_set_can_be_encoded(extract, vae, tmp_path):
    part = ROOT / "assets" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    extract(part, tmp_path / "set", "--first", 7, "--num_images", 5, "--resolution", 32)
    latents = StoredLatents(tmp_path / "set")
    pixels, labels = open_images(part, 32).read(range(7, 12))
    moments, found = latents.read(range(5))
    assert len(latents) == 5 and latents.num_classes == 10 and latents.class_names[5] == "sandal"
    np.testing.assert_array_equal(found, labels)
    # stored as float16: half a unit in the last place of values below 4
    np.testing.assert_allclose(moments, [encode_slowly(vae, image) for image in pixels], rtol=0, atol=2e-5 + 2 ** -10)


def test_repeating_a_finished_extraction_changes_nothing(extract, images, tmp_path, capsys):
    extract(images, tmp_path / "set")
    before = tree(tmp_path / "set")
    extract(images, tmp_path / "set")
    assert tree(tmp_path / "set") == before and "4 of 4 shards are there already" in capsys.readouterr().out


@pytest.mark.parametrize("args, message", [
    (["--resolution", 9], "--resolution 9 must be a multiple of 2"),
    (["--num_images", 11], "--first 0 --num_images 11: .*images has 10 images, numbered 0 to 9"),
    (["--first", 3, "--num_images", 8], "--first 3 --num_images 8: .*images has 10 images"),
    (["--num_images", 0], "--first 0 --num_images 0: "),
    (["--first", 500], "--first 500: .*images has 10 images, numbered 0 to 9"),
    (["--first", -1], "--first -1: "),
    (["--num_workers", -1], "--num_workers -1 must be at least 1"),
    (["--batch", 0], "--batch 0 must be at least 1"),
    (["--shard_size", 0], "shard_size=0"),
    (["--vae", "nowhere/at/all"], "no autoencoder at nowhere/at/all"),
])
def test_impossible_wishes_are_refused_before_anything_is_written(extract, images, tmp_path, args, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extract(images, tmp_path / "set", *args)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("args, key", [(["--resolution", 16], "sample_shape"), (["--xflip"], "mirrored"), (["--batch", 3], "batch"),
                                       (["--store", "fp32"], "dtype"), (["--dtype", "bf16"], "vae_dtype")])
def test_other_settings_do_not_mix_with_what_is_there(extract, images, tmp_path, args, key):
    extract(images, tmp_path / "set")
    before = tree(tmp_path / "set")
    with pytest.raises(ValueError, match=f"was made with {key}="):
        extract(images, tmp_path / "set", *args)
    assert tree(tmp_path / "set") == before


def test_changed_images_do_not_mix_with_what_is_there(extract, images, tmp_path):
    extract(images, tmp_path / "set")
    (images / "a" / "0.png").rename(images / "b" / "0.png")
    with pytest.raises(ValueError, match="was made with images_sha256="):
        extract(images, tmp_path / "set")


@pytest.mark.parametrize("dest, message", [
    ("images/a/0.png", "the destination .*0.png is a file; give a folder"),
    ("images/a/0.png/set", "set cannot be written .Not a directory"),
    ("x" * 300, "cannot be written .File name too long"),
    ("/proc/set", "/proc/set cannot be written"),
    ("images", "images is not empty .a. and no set of latents"),
])
def test_a_destination_that_cannot_be_is_told(extract, images, tmp_path, dest, message):
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        extract(images, tmp_path / dest)
    assert tree(tmp_path) == before


def test_a_full_disk_is_told(extract, images, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("utils.files.os.replace", full)
    with pytest.raises(UserError, match="plan.json cannot be written .No space left on device"):
        extract(images, tmp_path / "set")


@pytest.fixture
def two_bad(images):
    """Images 1 (in the first shard) and 9 (alone in the last) are damaged."""
    names = open_images(images, SIZE).names
    for name in (names[1], names[9]):
        (images / name).write_bytes((images / name).read_bytes()[:60])
    return names[1], names[9]


def test_bad_images_are_all_named_and_good_shards_kept(extract, images, two_bad, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"2 images of .* cannot be read, the first is {two_bad[0]}; replace them or give --skip_bad"):
            extract(images, tmp_path / "set")
        out = capsys.readouterr().out
        assert all(f"{name} cannot be read: " in out for name in two_bad)
    assert "2 of 4 shards are there already" in out
    with pytest.raises(ValueError, match="interrupted"):
        StoredLatents(tmp_path / "set")


def test_replaced_images_complete_the_set(extract, images, tmp_path):
    extract(images, tmp_path / "straight")
    file = images / "b" / "4.png"
    good = file.read_bytes()
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="b/4.png"):
        extract(images, tmp_path / "set")
    file.write_bytes(good)
    extract(images, tmp_path / "set")
    assert tree(tmp_path / "set") == tree(tmp_path / "straight")


def test_skip_bad_leaves_out_only_the_bad(extract, images, two_bad, tmp_path):
    extract(images, tmp_path / "set", "--skip_bad", "--xflip", "--store", "fp32")
    latents = open_latents(tmp_path / "set", xflip=True)
    good = [0, 2, 3, 4, 5, 6, 7, 8]
    source = open_images(images, SIZE, xflip=True)
    assert latents.manifest["skipped"] == list(two_bad) and len(latents) == 16
    np.testing.assert_array_equal(latents.read_labels(range(8)), source.labels[good])
    extract(images, tmp_path / "again", "--skip_bad", "--xflip", "--store", "fp32")
    assert tree(tmp_path / "again") == tree(tmp_path / "set")


def test_bad_image_ends_the_command_with_one_line_and_code_2(extract, images, two_bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: extract(images, tmp_path / "set"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 2 images of ")


# ---- processes

# Runs the script with a SIGKILL at the rename number argv[1], the moment when a file would come into being.
KILLED = """
import os, runpy, signal, sys
real, calls, last = os.replace, 0, int(sys.argv.pop(1))
def replace(source, target):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(vae, *args):
    return [str(word) for word in (ROOT / "extract_latent.py", *args, "--vae", vae, "--resolution", SIZE, "--shard_size", 3,
                                   "--batch", 2, "--xflip")]


def run(words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)


def test_killed_extraction_goes_on_to_the_same_bytes(extract, images, vae, tmp_path):
    """Renames: the plan, then for each of 4 shards moments, mirrored, labels, record; call 8 is in the second shard."""
    extract(images, tmp_path / "straight", "--xflip")
    killed = run(["-c", KILLED, "8", *command(vae, images, tmp_path / "broken")])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "broken" / ".partial" / "shard-00000.json").exists()
    assert not (tmp_path / "broken" / ".partial" / "shard-00001.json").exists()
    extract(images, tmp_path / "broken", "--xflip")
    assert tree(tmp_path / "broken") == tree(tmp_path / "straight")


def test_two_processes_share_the_work_and_write_the_same_bytes(extract, images, vae, tmp_path):
    extract(images, tmp_path / "alone", "--xflip")
    both = run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command(vae, images, tmp_path / "both")])
    assert both.returncode == 0, both.stderr
    assert tree(tmp_path / "both") == tree(tmp_path / "alone")
    assert both.stdout.count("complete, 10 images") == 1
