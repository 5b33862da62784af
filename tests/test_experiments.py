"""experiments/: a tiny run from images to docs, skipping what is done, and numbers that can be traced."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import model_flops
from experiments import analysis, figures, run
from experiments.settings import arm_config, flops_of_steps, image_flops, load_setting, plan

ROOT = Path(__file__).resolve().parent.parent
TINY = ["budget_steps=8", "samples=20", "snapshots=4", "grid_columns=1", "config.model.depth=1", "config.model.width=16",
        "config.model.num_heads=2", "config.model.decoder_width=16", "config.model.decoder_num_heads=2", "config.train.batchsize=2",
        "config.train.amp=no", "config.sample.num_steps=2", "config.sample.batchsize=10", "config.sample.amp=no"]


def test_crossing_is_on_the_straight_line_between_snapshots():
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 3.0) == 30.0  # half way down from 4 to 2, half way from 20 to 40
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 9.0) == 10    # there at the first snapshot
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 1.0) is None


def test_share_to_target_compares_runs_of_one_seed():
    def made(seed, fds):
        return {"seed": seed, "snapshots": [{"train_s": 10.0 * (i + 1), "fd": fd} for i, fd in enumerate(fds)]}

    runs = {"a": [made(0, [4.0, 2.0]), made(1, [4.0, 3.5])], "b": [made(0, [6.0, 3.0]), made(1, [6.0, 3.0])]}
    assert analysis.shares_to_target(runs, "a", "b", "train_s") == [15 / 20, None]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_arm_spends_the_same_flops(name):
    setting = load_setting(name, ["budget_steps=40", *[text for text in TINY if text.startswith("config.model")]])
    budget = flops_of_steps(arm_config(setting, setting.budget_arm, 0), 40, 40)
    for arm in setting.arms:
        planned = plan(setting, arm)
        spent = planned["start_flops"] + flops_of_steps(arm_config(setting, arm, 0), planned["steps"], planned["steps"])
        assert abs(spent / budget - 1) < 0.06, arm  # steps are whole multiples of four snapshots: up to 2 of 40, 5 %


def test_flops_between_counted_points_are_those_that_torch_counts():
    model = arm_config(load_setting("cpu"), "masked-50", 0).model
    assert image_flops(model, 48) == pytest.approx(model_flops(model, 0.25, training=True), rel=1e-9)  # a polynomial: exact


def write_images(folder, count=24):
    """A few random images and labels under the names of Fashion-MNIST's training files."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, array in (("images-idx3", random.integers(256, size=(count, 28, 28))), ("labels-idx1", np.arange(count) % 10)):
        header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return folder


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_run_writes_traceable_results_and_skips_what_is_done(name, tmp_path, capsys):
    data = write_images(tmp_path / "fashion-mnist")
    command = ["--setting", name, "--arms", "unmasked", "masked-50", "tuned-const", "--seeds", "0", "--data", str(data),
               "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--set", *TINY]
    assert run.main(command) == 0
    paths = sorted((tmp_path / "out" / name).glob("*-seed0.json"))
    assert [path.name for path in paths] == ["masked-50-seed0.json", "tuned-const-seed0.json", "unmasked-seed0.json"]
    made = json.loads(paths[0].read_text())
    assert len(made["snapshots"]) == 4 and made["snapshots"][-1]["step"] == made["steps"]
    assert {"device", "torch", "commit", "command", "config", "flops_per_image", "guided"} <= set(made)
    assert all(np.isfinite(s["fd"]) and s["train_s"] > 0 for s in made["snapshots"])

    before = [path.read_bytes() for path in paths]
    assert run.main(command) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(ValueError, match="another samples"):
        run.main([*command, "samples=30"])


def test_results_page_equals_the_stored_numbers():
    text = (ROOT / "docs" / "results.md").read_text()
    found = analysis.tables(ROOT / "experiments" / "results" / "cpu")
    assert all(f"<!-- {name} -->" in text for name in found)
    assert analysis.fill(text, found) == text


def test_figures_are_drawn_from_the_stored_numbers(tmp_path):
    folder = ROOT / "experiments" / "results" / "cpu"
    for name in ("convergence", "samples"):
        figures.FIGURES[name](folder).savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
