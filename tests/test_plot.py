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


def test_cases_are_groups_and_arms_their_bars(tmp_path):
    first = write(tmp_path / "a.json", row("ours", 1.0), row("ours", 2.0, batch=8))
    device, found = plot.read([first, write(tmp_path / "b.json", row("dit", 3.0), row("ours", 4.0))])
    assert device == "CPU"
    assert found["img/s"] == {"S/2, 50% masked\nno, batch 4": {"ours": 4.0, "dit": 3.0}, "S/2, 50% masked\nno, batch 8": {"ours": 2.0}}


@pytest.mark.parametrize("memory, wide", [(None, False), (3.5, True)])
def test_memory_is_drawn_where_it_was_measured(tmp_path, monkeypatch, memory, wide):
    file = write(tmp_path / "train.json", row("ours", 1.0, memory), row("dit", 2.0, memory), row("ours", 1.0, memory, batch=8))
    monkeypatch.setattr("sys.argv", ["plot", str(file)])
    plot.main()
    with Image.open(tmp_path / "train.png") as picture:
        assert (picture.width > 2 * picture.height) == wide


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
