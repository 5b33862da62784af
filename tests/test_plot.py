"""The bars of benchmarks/plot.py."""

import json

import pytest
from PIL import Image

from benchmarks import plot
from utils.cli import UserError


def row(arm, images_per_s, memory=None, batch=4):
    return {"model": "S/2", "masked": 0.5, "amp": "no", "batch": batch, "arm": arm, "img/s": images_per_s, "GB": memory}


def write(path, *rows, device="CPU"):
    path.write_text(json.dumps({"device": device, "rows": rows}))
    return path


def test_each_case_and_arm_has_a_bar_and_the_last_file_counts(tmp_path):
    first = write(tmp_path / "a.json", row("ours", 1.0), row("ours", 2.0, batch=8))
    device, bars = plot.read([first, write(tmp_path / "b.json", row("dit", 3.0), row("ours", 4.0))])
    assert device == "CPU"
    assert {label: numbers["training images/s"] for label, numbers in bars.items()} == {
        "S/2 no, batch 4, 50% masked: ours": 4.0, "S/2 no, batch 8, 50% masked: ours": 2.0, "S/2 no, batch 4, 50% masked: dit": 3.0}


@pytest.mark.parametrize("memory", [None, 3.5])
def test_the_picture_stands_beside_the_file(tmp_path, monkeypatch, memory):
    monkeypatch.setattr("sys.argv", ["plot", str(write(tmp_path / "train.json", row("ours", 1.0, memory), row("dit", 2.0, memory)))])
    plot.main()
    with Image.open(tmp_path / "train.png") as picture:
        assert picture.width > 1000


def test_files_of_two_devices_are_refused(tmp_path):
    files = [write(tmp_path / "a.json", row("ours", 1.0)), write(tmp_path / "b.json", row("dit", 1.0), device="GPU")]
    with pytest.raises(UserError, match="measured on one device, got CPU, GPU"):
        plot.read(files)


@pytest.mark.parametrize("content, message", [
    (None, "other.json: No such file or directory; give a file that"), ("", "other.json is no result of benchmarks/train.py"),
    ("[]", "other.json is no result"), ('{"rows": [], "device": "CPU"}', "wanted steps that were measured"),
    ('{"rows": [{"model": 1}], "device": "CPU"}', "other.json is no result")])
def test_other_files_are_refused_by_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match=message):
        plot.read([tmp_path / "other.json"])
