"""Grids and evaluations during training: made once for each step, and made anew for steps that are done again."""

import json

import numpy as np
import pytest
import torch

from models import build_model
from test_loop import make_state
from training.watch import draw_loss_curve, forget_after, make_evaluate, make_sample_grid
from utils.cli import UserError
from utils.config import model_arguments

CPU = torch.device("cpu")


def test_grid_is_drawn_once_for_a_step(tmp_path, capsys):
    state = make_state(log__sample_every=4, log__num_grid_images=5, vae__path="''")
    sample_grid = make_sample_grid(state.config, tmp_path, None, CPU, {})
    assert "vae.path is empty: sample grids show the first three latent channels" in capsys.readouterr().out
    picture = sample_grid(state.ema.net, 4)
    assert picture.dtype == np.uint8 and [path.name for path in (tmp_path / "samples").iterdir()] == ["0000004.png"]
    assert sample_grid(state.ema.net, 4) is None  # a resumed run that asks again
    assert sample_grid(state.ema.net, 8) is not None


def test_missing_autoencoder_says_how_to_do_without(tmp_path):
    with pytest.raises(UserError, match=r"Sample grids \(log.sample_every=4\) need it; log.sample_every=0 trains without, and vae.path=''"):
        make_sample_grid(make_state(log__sample_every=4, vae__path="nowhere").config, tmp_path, None, CPU, {})


def test_evaluation_of_a_step_is_made_once_and_read_back(tmp_path, tiny_vae):
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    config = make_state(eval__every=4, eval__ref_path=tmp_path / "reference.npz", eval__embedding="pixels", eval__num_images=4,
                        eval__num_steps=2, vae__path=tiny_vae).config
    net = build_model(**model_arguments(config)).eval()
    evaluate = make_evaluate(config, tmp_path, CPU, {})
    numbers = evaluate(net, 4)
    assert json.loads((tmp_path / "evaluations" / "0000004.json").read_text())["numbers"] == numbers and len(numbers) == 1
    assert evaluate(None, 4) == numbers  # nothing is sampled


def test_results_of_later_steps_and_halves_of_files_go_when_a_run_goes_on_from_before(tmp_path):
    for name in ("samples/0000004.png", "samples/0000008.png", "samples/0000012.png.1f.tmp", "samples/mine.png",
                 "evaluations/0000008.json", "evaluations/0000010.json", "samples/0000010.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    forget_after(tmp_path, 8)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert left == ["evaluations/0000008.json", "samples/0000004.png", "samples/0000008.png", "samples/mine.png"]


def test_loss_curve_shows_every_loss_and_gaps(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("utils.images.plot_curves", lambda path, series, **_: drawn.update(series))
    lines = [{"step": 2, "loss": 1.0, "loss_drift": 0.5, "loss_scale": 64.0}, {"step": 4, "loss": None, "loss_drift": None}, {"step": 4, "fid": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_loss_curve(tmp_path)
    assert drawn == {"loss": ([2, 4], [1.0, None]), "drift": ([2, 4], [0.5, None])}
