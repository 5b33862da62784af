"""experiments/: a tiny run from images to docs, skipping what is done, and numbers that can be traced."""

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.work import model_flops
from experiments import analysis, costs, figures, precision, run
from experiments.settings import arm_config, flops_of_steps, image_flops, load_setting, plan
from utils.cli import EXIT_STOPPED, UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ["budget_steps=8", "samples=20", "snapshots=4", "grid_columns=1", "config.model.depth=1", "config.model.width=16",
        "config.model.num_heads=2", "config.model.decoder_width=16", "config.model.decoder_num_heads=2", "config.train.batchsize=2",
        "config.sample.num_steps=2", "config.sample.batchsize=10", "config.sample.compile=false", "amp=no", "final_samples=30"]


def test_crossing_is_on_the_straight_line_between_snapshots():
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 3.0) == 30.0  # half way down from 4 to 2, half way from 20 to 40
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 9.0) == 10    # there at the first snapshot
    assert analysis.crossing([10, 20, 40], [8.0, 4.0, 2.0], 1.0) is None


def test_share_to_target_compares_runs_of_one_seed():
    def made(seed, fds):
        return {"seed": seed, "snapshots": [{"seconds": 10.0 * (i + 1), "fd": fd} for i, fd in enumerate(fds)]}

    runs = {"a": [made(0, [4.0, 2.0]), made(1, [4.0, 3.5])], "b": [made(0, [6.0, 3.0]), made(1, [6.0, 3.0])]}
    assert analysis.shares_to_target(runs, "a", "b", "seconds") == [15 / 20, None]


def test_step_of_a_tuning_arm_is_reckoned_by_its_flops():
    times = [{"arm": "masked-50", "seconds": [1.0, 2.0, 9.0], "flops": 10}, {"arm": "unmasked", "seconds": [4.0, 4.0, 4.0], "flops": 20}]
    assert analysis.step_seconds(times, "masked-50", 15) == 2.0  # the median of the rounds, whatever the FLOPs
    assert analysis.step_seconds(times, "tuned-const", 20) == 4.0
    assert analysis.step_seconds(times, "tuned-cos", 15) == 3.0  # half way


def test_figures_without_the_costs_name_the_command_that_makes_them(tmp_path):
    shutil.copy(ROOT / "experiments" / "results" / "cpu" / "dit-seed0.json", tmp_path)
    with pytest.raises(ValueError, match=r"arms.json: no such results; python3 -m experiments.costs makes them"):
        analysis.load(tmp_path)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_arm_spends_the_same_flops(name):
    setting = load_setting(name, ["budget_steps=40", *[text for text in TINY if text.startswith("config.model")]])
    budget = flops_of_steps(arm_config(setting, setting.budget_arm, 0), 40, 40)
    for arm in setting.arms:
        planned = plan(setting, arm)
        spent = planned["start_flops"] + flops_of_steps(arm_config(setting, arm, 0), planned["steps"], planned["steps"])
        assert abs(spent / budget - 1) < 0.06, arm  # steps are whole multiples of four snapshots: up to 2 of 40, 5 %


def test_flops_between_counted_points_are_those_that_torch_counts():
    config = arm_config(load_setting("cpu"), "masked-50", 0)
    assert image_flops(config, 48) == pytest.approx(model_flops(config, 0.25, training=True), rel=1e-9)  # a polynomial: exact


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
    command = ["--arms", "unmasked", "masked-50", "tuned-const", "--seeds", "0", *command_of(tmp_path, name)]
    assert run.main(command) == 0
    paths = sorted((tmp_path / "out" / name).glob("*-seed0.json"))
    assert [path.name for path in paths] == ["masked-50-seed0.json", "tuned-const-seed0.json", "unmasked-seed0.json"]
    made = json.loads(paths[0].read_text())
    assert len(made["snapshots"]) == 4 and made["snapshots"][-1]["step"] == made["steps"]
    assert {"device", "torch", "commit", "command", "config", "flops_per_image", "final", "guided"} <= set(made)
    assert all(np.isfinite(s["fd"]) and s["train_s"] > 0 for s in made["snapshots"])

    before = [path.read_bytes() for path in paths]
    assert run.main(command) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(ValueError, match="another samples"):
        run.main([*command, "samples=30"])


def command_of(tmp_path, name="cpu", folder="out"):
    """Arguments of a tiny run on images of its own, made once."""
    data = tmp_path / "fashion-mnist"
    if not data.is_dir():
        write_images(data)
    return ["--setting", name, "--data", str(data), "--out", str(tmp_path / folder), "--work", str(tmp_path / f"work-{folder}"),
            "--set", *TINY]


def results_of(folder, name="cpu"):
    """What the runs in a result folder found, without times and circumstances."""
    found = {}
    for path in sorted((folder / name).glob("*-seed*.json")):
        made = json.loads(path.read_text())
        snapshots = [{key: s[key] for key in ("step", "loss", "flops", "fd", "accuracy")} for s in made["snapshots"]]
        found[path.stem] = snapshots, made["final"], made["guided"]
    return found


def test_stopped_experiment_goes_on_to_the_results_of_one_that_was_not(tmp_path, monkeypatch):
    arms = ["--arms", "masked-50", "tuned-const", "--seeds", "0"]
    assert run.main([*command_of(tmp_path, folder="whole"), *arms]) == 0

    class StopAfterFive:
        """A notice that comes before the sixth step, and only once: in the middle of the trunk, then of nothing."""

        asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        @property
        def requested(self):
            StopAfterFive.asked += 1
            return StopAfterFive.asked == 6

    monkeypatch.setattr("experiments.run.StopNotice", StopAfterFive)
    command = [*command_of(tmp_path, folder="stopped"), *arms]
    assert run.main(command) == EXIT_STOPPED
    assert not list((tmp_path / "stopped" / "cpu").glob("*-seed*.json"))
    assert run.main(command) == 0
    assert results_of(tmp_path / "stopped") == results_of(tmp_path / "whole")


def test_jobs_give_the_results_of_one_process_and_pass_a_failure_on(tmp_path, capsys):
    arms = ["--arms", "unmasked", "--seeds", "0", "1"]
    assert run.main([*command_of(tmp_path, folder="one"), *arms]) == 0
    command = [*command_of(tmp_path, folder="two"), *arms, "--jobs", "2"]
    assert run.main(command) == 0
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    assert len(results_of(tmp_path / "two")) == 2
    capsys.readouterr()
    (tmp_path / "out-of-order/cpu").mkdir(parents=True)
    (tmp_path / "out-of-order/cpu/unmasked-seed0").write_text("a file where the run's folder belongs")
    assert run.main([*command, "--out", str(tmp_path / "three"), "--work", str(tmp_path / "out-of-order")]) == 1
    assert "seed 0 ended with code 1" in capsys.readouterr().out


@pytest.mark.parametrize("override, message", [
    ("budget_stepz=3", "Key 'budget_stepz' not in 'Setting'"), ("budget_steps=many", "budget_steps|'many'"),
    ("budget_steps=0", "budget_steps=0; wanted 1 or more"), ("samples=0", "samples=0"), ("snapshots=0", "snapshots=0"),
    ("snapshots=3", "start=.*one of the 3 snapshots"), ("data=pictures", "data='pictures'; wanted one of latents, pixels"),
    ("amp=fp8", "amp='fp8'"), ("seeds=[]", "seeds="), ("seeds=[-1]", "seeds="), ("seeds=[a]", "seeds|'a'"),
    ("budget_arm=none", "budget_arm='none'; wanted one of dit"), ("config.train.lrr=1", "lrr"), ("config.train.lr=-1", "train.lr=-1"),
    ("arms.masked-50.train.lrr=1", "lrr"), ("arms.masked-50=3", "arms.masked-50=3"), ("arms.masked-50.seeds=3", "arms.masked-50.seeds=3"),
    ("arms.tuned-const.start=[none,0.75]", "arms.tuned-const.start"), ("arms.tuned-const.start=[masked-50,half]", "arms.tuned-const.start"),
    ("costs.side=[4]", "costs=")])
def test_every_value_of_a_setting_is_checked(override, message):
    with pytest.raises(UserError, match=message):
        load_setting("cpu", [override])


@pytest.mark.parametrize("arguments, message", [
    (["--arms", "none"], "--arms none: wanted some of dit"), (["--seeds", "-1"], "--seeds -1"), (["--jobs", "0"], "--jobs 0"),
    (["--threads", "0"], "--threads 0"),
    (["--arms", "tuned-const", "--seeds", "0"], "--arms tuned-const, seed 0: it starts from .*masked-50-seed0"),
    (["--data", "nowhere"], "train-images-idx3-ubyte.gz is not in nowhere"), (["--out", "FILE"], "--out FILE/cpu cannot be written"),
    (["--arms", "masked-25", "--set", "seeds=[3]"], "--arms masked-25: none of them has one of the setting's seeds")])
def test_a_wrong_command_is_refused_before_any_work(tmp_path, monkeypatch, arguments, message):
    command = command_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    monkeypatch.setattr("experiments.scoring.Latents", None)  # encoding the data would be work
    with pytest.raises(UserError, match=message):
        run.main([*command, *arguments])
    assert not (tmp_path / "out").exists() and not (tmp_path / "work-out").exists()


def test_results_of_another_setting_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out/cpu").mkdir(parents=True)
    shutil.copy(ROOT / "experiments/results/cpu/dit-seed1.json", tmp_path / "out/cpu")
    monkeypatch.setattr("experiments.scoring.Latents", None)
    with pytest.raises(UserError, match="dit-seed1.json is of a setting with another"):
        run.main([*command_of(tmp_path), "--seeds", "0", "1"])
    (tmp_path / "out/cpu/dit-seed1.json").write_text("{}")
    with pytest.raises(UserError, match="dit-seed1.json is no result of an experiment"):
        run.main([*command_of(tmp_path), "--seeds", "0", "1"])


@pytest.mark.parametrize("overrides", [["costs.sides=[]"], ["costs.widths=3"], ["costs.tokens_per_step=0"], ["costs.widths=[30]"]])
def test_costs_of_a_setting_are_checked_before_any_work(tmp_path, monkeypatch, overrides):
    monkeypatch.setattr(costs, "count_paper", None)
    with pytest.raises(UserError, match="costs|width"):
        costs.main(["--setting", "cpu", "--out", str(tmp_path), "--set", *overrides])
    assert not list(tmp_path.iterdir())


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


# ---- number formats

def test_tf32_keeps_ten_bits_and_rounds_halves_away_from_zero():
    last = 2.0**-10
    values = torch.tensor([1 + last, 1 + last / 2, -1 - last / 2, 1 + last / 2 - 2.0**-23, 3.0, 0.0, torch.inf])
    assert precision.round_to_tf32(values).tolist() == [1 + last, 1 + last, -1 - last, 1.0, 3.0, 0.0, torch.inf]


def test_emulated_tf32_rounds_the_factors_of_products_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (5, 4), (5,)))
    rounded = precision.round_to_tf32
    found = precision.with_tf32_inputs(torch.nn.functional.linear)(x, weight, bias)
    torch.testing.assert_close(found, rounded(x) @ rounded(weight).T + bias, rtol=0, atol=1e-6)
    assert (found - (x @ weight.T + bias)).abs().max() > 1e-4
    found = precision.with_tf32_inputs(torch.nn.functional.scaled_dot_product_attention)(x[None], x[None], x[None])[0]
    scores = (rounded(x * 2**-0.5) @ rounded(x * 2**-0.5).transpose(1, 2)).softmax(-1)  # scaled on both sides, as torch does it
    torch.testing.assert_close(found, rounded(scores) @ rounded(x), rtol=0, atol=1e-6)
    assert torch.equal(precision.with_tf32_inputs(torch.add)(x, x), x + x)
    with pytest.raises(ValueError, match="mv is a product whose inputs are not rounded"):
        precision.with_tf32_inputs(torch.mv)(weight, x[0, 0])
