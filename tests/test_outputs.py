"""What sampling leaves in a folder: whole files, one rule for all formats, settings that may not be mixed."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sampling import outputs
from sampling.outputs import Output, claim_folder, settings_of
from sampling.sample import Batch
from utils.cli import UserError
from utils.schema import Config, SampleConfig, VAEConfig


def batch_of(seeds, bad=()):
    """A Batch in which every value of seed s is s."""
    values = np.array(seeds).reshape(-1, 1, 1, 1)
    images = (values + np.zeros((1, 4, 5, 3))).astype(np.uint8)
    latents = torch.from_numpy(values + np.zeros((1, 2, 3, 3), np.float32))
    return Batch(0, seeds, None, latents.float(), images, list(bad))


def tens(seeds):
    """The class of a seed, for these tests: its tens."""
    return [seed // 10 for seed in seeds]


def no_classes(seeds):
    return None


def sampled(folder, format, *batches, classes_of=tens, class_names=None):
    output = Output(folder, format)
    for batch in batches:
        output.write(batch)
    output.finish(classes_of, class_names)
    return Output(folder, format)


# ------------------------------------------------------------------------------------------------ samples

def test_one_png_per_seed_and_a_table_of_classes(tmp_path):
    output = sampled(tmp_path, "png", batch_of([12, 3]), batch_of([1234567]), class_names=["zero", "ett, två"] + ["å"] * 123456)
    assert output.seeds() == {3, 12, 1234567}
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000003.png", "000012.png", "1234567.png"]
    assert (np.asarray(Image.open(tmp_path / "images" / "000012.png")) == 12).all()
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8") as stream:
        assert list(csv.reader(stream)) == [["file", "seed", "class", "name"], ["images/000003.png", "3", "0", "zero"],
                                            ["images/000012.png", "12", "1", "ett, två"], ["images/1234567.png", "1234567", "123456", "å"]]


def test_labels_cover_what_was_there_before_and_need_classes(tmp_path):
    sampled(tmp_path, "png", batch_of([5]))
    sampled(tmp_path, "png", batch_of([2]))
    assert (tmp_path / "labels.csv").read_text().splitlines()[1:] == ["images/000002.png,2,0,class 0", "images/000005.png,5,0,class 0"]
    sampled(tmp_path / "none", "png", classes_of=no_classes)
    assert not (tmp_path / "none" / "labels.csv").exists()


@pytest.mark.parametrize("format, file, name, shape", [("npz", "samples.npz", "arr_0", (4, 5, 3)), ("latents", "latents.npz", "latents", (2, 3, 3))])
def test_npz_is_in_order_of_seeds_however_they_came(tmp_path, format, file, name, shape):
    output = sampled(tmp_path, format, batch_of([30, 7]), batch_of([19]))
    assert output.seeds() == {7, 19, 30}
    sampled(tmp_path, format, batch_of([20, 2, 40]))
    assert [path.name for path in tmp_path.iterdir()] == [file]
    content = np.load(tmp_path / file)
    seeds = [2, 7, 19, 20, 30, 40]
    assert content["seeds"].tolist() == seeds and content["labels"].tolist() == tens(seeds)
    assert content[name].shape == (6, *shape) and content[name].dtype == (np.uint8 if format == "npz" else np.float32)
    assert (content[name] == np.array(seeds).reshape(-1, 1, 1, 1)).all()


def test_npz_without_classes_has_no_labels(tmp_path):
    sampled(tmp_path, "npz", batch_of([1]), classes_of=no_classes)
    assert set(np.load(tmp_path / "samples.npz").files) == {"arr_0", "seeds"}


def test_interrupted_npz_goes_on_with_what_was_sampled(tmp_path):
    Output(tmp_path, "npz").write(batch_of([3, 1]))  # killed before the end
    output = Output(tmp_path, "npz")
    assert output.seeds() == {1, 3}
    sampled(tmp_path, "npz", batch_of([2]))
    assert np.load(tmp_path / "samples.npz")["seeds"].tolist() == [1, 2, 3]


def test_seeds_sampled_again_are_in_the_npz_once(tmp_path):
    """As with --ref_path, whose numbers need all images; or after a crash between packing and tidying."""
    sampled(tmp_path, "npz", batch_of([1, 2]))
    sampled(tmp_path, "npz", batch_of([2, 3]))
    assert np.load(tmp_path / "samples.npz")["seeds"].tolist() == [1, 2, 3]
    sampled(tmp_path, "npz", batch_of([2]))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize("format", ["png", "npz", "latents"])
def test_images_with_nan_are_not_written_and_will_be_sampled_again(tmp_path, format):
    assert sampled(tmp_path, format, batch_of([1, 2, 3], bad=[2])).seeds() == {1, 3}


def test_nothing_is_written_for_numbers_alone(tmp_path):
    assert sampled(tmp_path, "none", batch_of([1])).seeds() == set() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["png", "npz"])
def test_full_disk_leaves_no_halves_and_the_old_file(tmp_path, monkeypatch, format):
    sampled(tmp_path, format, batch_of([1]))
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(stream, value):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "save_png", full)
    monkeypatch.setattr(outputs.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        Output(tmp_path, format).write(batch_of([2]))
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    Output(tmp_path, "npz").write(batch_of([2]))
    monkeypatch.setattr(outputs.np, "save", full)  # while packing
    if format == "npz":
        with pytest.raises(OSError, match="No space"):
            Output(tmp_path, "npz").finish(tens, None)
        assert (tmp_path / "samples.npz").read_bytes() == before["samples.npz"] and not list(tmp_path.glob("*.tmp"))
        assert Output(tmp_path, "npz").seeds() == {1, 2}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_a_damaged_npz_is_named_in_one_line(tmp_path, content):
    (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(UserError, match="samples.npz is damaged, or another program's") as refusal:
        Output(tmp_path, "npz").seeds()
    assert "pickle" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ settings

def settings(tmp_path, checkpoint=b"weights", class_idx=(), vae="a" * 16, **sample):
    path = tmp_path / "0000004.pt"
    path.write_bytes(checkpoint)
    decode = None
    if vae:
        def decode(latents):
            raise AssertionError("not called")
        decode.digest = vae
    return settings_of(Config(sample=SampleConfig(**sample), vae=VAEConfig()), path, "ema", list(class_idx), decode)


def test_settings_are_noted_as_json_and_the_same_ones_pass(tmp_path):
    for _ in range(2):
        claim_folder(tmp_path / "out", settings(tmp_path))
    noted = json.loads((tmp_path / "out" / "settings.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert noted["sample.S_max"] == "inf" and noted["sample.num_steps"] == 40 and len(noted["checkpoint.sha256"]) == 64
    claim_folder(tmp_path / "out", settings(tmp_path, batchsize=3, compile=True))  # no pixel depends on them


@pytest.mark.parametrize("changed, message", [
    ({"checkpoint": b"others"}, r"checkpoint.sha256 [0-9a-f]{64} there, [0-9a-f]{64} now"),
    ({"cfg_scale": 3.0}, "sample.cfg_scale 1.0 there, 3.0 now"),
    ({"cfg_scale": 3.0, "class_idx": [2]}, r"class_idx \[\] there, \[2\] now; sample.cfg_scale 1.0 there, 3.0 now"),
    ({"cfg_interval": (0.1, 2.0)}, r"sample.cfg_interval None there, \[0.1, 2.0\] now"),
    ({"vae": "b" * 16}, "vae.digest a{16} there, b{16} now"),
])
def test_samples_of_other_settings_are_refused_with_what_differs(tmp_path, changed, message):
    claim_folder(tmp_path / "out", settings(tmp_path))
    before = (tmp_path / "out" / "settings.json").read_bytes()
    with pytest.raises(UserError, match=f"out holds samples of other settings: {message}. Give another --outdir, or delete"):
        claim_folder(tmp_path / "out", settings(tmp_path, **changed))
    assert (tmp_path / "out" / "settings.json").read_bytes() == before


def test_latents_and_images_share_a_folder_until_the_autoencoder_changes(tmp_path):
    claim_folder(tmp_path / "out", settings(tmp_path, vae=None))
    claim_folder(tmp_path / "out", settings(tmp_path))
    claim_folder(tmp_path / "out", settings(tmp_path, vae=None))
    with pytest.raises(UserError, match="vae.digest"):
        claim_folder(tmp_path / "out", settings(tmp_path, vae="b" * 16))


def test_folders_that_are_not_ours_are_refused(tmp_path):
    now = settings(tmp_path)
    with pytest.raises(UserError, match="holds other files; give another --outdir"):
        claim_folder(tmp_path, now)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text('{"ckpt_path": "0000004.pt", "which": "ema", "vae": "assets/x", "sample": {}}')
    with pytest.raises(UserError, match="old holds samples of other settings: checkpoint.sha256 None there"):  # of an older version
        claim_folder(tmp_path / "old", now)
    for text in ("{", "[]"):
        (tmp_path / "old" / "settings.json").write_text(text)
        with pytest.raises(UserError, match="settings.json is not readable"):
            claim_folder(tmp_path / "old", now)
    with pytest.raises(UserError, match="0000004.pt is a file; give a folder"):
        claim_folder(tmp_path / "0000004.pt", now)
    with pytest.raises(UserError, match="--outdir .* cannot be written .*too long"):
        claim_folder(tmp_path / ("a" * 300), now)
