"""The bars of benchmarks/plot.py."""

import json

import pytest
from PIL import Image

from benchmarks import plot


def row(arm, milliseconds, memory=None, batch=4):
    spread = dict(zip(("median", "lowest", "highest"), milliseconds))
    return {"model": "S/2", "masked": 0.5, "amp": "no", "batch": batch, "arm": arm, "ms/step": spread, "img/s": 0.0, "GB": memory}


def write(path, rows):
    path.write_text(json.dumps({"device": "CPU", "rows": rows}))
    return path


def test_speed_is_batch_over_time_and_slow_rounds_are_its_lowest():
    assert plot.speed_of(row("ours", (200, 100, 400))) == (20.0, 10.0, 40.0)


def test_cases_are_groups_and_arms_their_bars():
    groups = plot.groups_of([row("ours", (2, 1, 3)), row("dit", (2, 1, 3)), row("ours", (2, 1, 3), batch=8)])
    assert [list(group) for group in groups.values()] == [["ours", "dit"], ["ours"]]


@pytest.mark.parametrize("memory, wide", [(None, False), (3.5, True)])
def test_memory_is_drawn_where_it_was_measured(tmp_path, monkeypatch, memory, wide):
    file = write(tmp_path / "train.json", [row("ours", (2, 1, 3), memory), row("dit", (2, 1, 3), memory)])
    monkeypatch.setattr("sys.argv", ["plot", str(file)])
    plot.main()
    with Image.open(tmp_path / "train.png") as picture:
        assert (picture.width > 2 * picture.height) == wide


def test_every_arm_has_a_bar(tmp_path):
    plot.draw([row(arm, (2, 1, 3)) for arm in plot.ARMS], "CPU", tmp_path / "all.png")
    assert plot.TITLES.keys() == set(plot.ARMS)
    assert plot.title_of("ours", [row("ours", (2, 1, 3))]) == "half masked"
    assert plot.title_of("no_foreach_ema", [row("ours", (2, 1, 3)) | {"masked": 0.75}]) == "75% masked, no foreach ema"


def test_of_the_same_steps_measured_twice_the_last_are_drawn():
    first, last = row("compiled", (2, 1, 3)), row("compiled", (5, 4, 6))
    assert plot.groups_of([first, row("dit", (2, 1, 3)), last])["S/2\nno, batch 4"]["compiled"] is last
    with pytest.raises(ValueError, match="two bars of compiled"):
        plot.groups_of([first | {"config": {"model": {"in_size": 32}}}, last | {"config": {"model": {"in_size": 64}}}])


def test_bars_that_would_hide_each_other_are_an_error():
    with pytest.raises(ValueError, match="two bars of ours for S/2 no, batch 4"):
        plot.groups_of([row("ours", (2, 1, 3)), row("ours", (2, 1, 3)) | {"masked": 0.75}])


def test_files_of_one_device_can_share_a_picture(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{arm}.json", [row(arm, (2, 1, 3))]) for arm in ("ours", "dit")]
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda rows, device, path: drawn.append(([row["arm"] for row in rows], device, path)))
    monkeypatch.setattr("sys.argv", ["plot", *map(str, files), "--output", str(tmp_path / "both.png")])
    plot.main()
    assert drawn == [(["ours", "dit"], "CPU", tmp_path / "both.png")]
    files[0].write_text(files[0].read_text().replace("CPU", "GPU"))
    with pytest.raises(ValueError, match="different devices, which one picture cannot compare: CPU, GPU"):
        plot.main()


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [], "device": "CPU"}', '{"rows": [{"model": 1}], "device": "CPU"}'])
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="other.json is no result of benchmarks/train.py"):
        plot.read_rows(tmp_path / "other.json")
