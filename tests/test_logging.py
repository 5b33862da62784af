import io
import json
import os
import sys

import pytest
import tqdm

from utils import logging
from utils.cli import UserError
from utils.config import load_config
from utils.logging import Progress, RunLog, check_sinks


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with Progress(500, "sampling", "img", every_s=0) as progress:
        for _ in range(5):
            progress.update(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sampling: 100/500 img, ") and " img/s, " in lines[0] and lines[0].endswith(" left")
    assert lines[-1].startswith("sampling: 500/500 img, ")


def test_progress_on_a_terminal_is_one_bar_above_which_text_is_said(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, "encoding") as progress:
        progress.update(1)
        progress.update(1)
        assert progress.n == 2
        logging.say("a line")
    assert "encoding" in terminal.getvalue() and "2/3" in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n"


def test_progress_counts_bytes_and_rates_leave_out_what_was_there_before(capsys, monkeypatch):
    clock = [1e9]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    with Progress(4 * 2**20, "f", "B", initial=2**20) as progress:
        clock[0] += 16.0
        progress.update(2**20, "a note")
    assert capsys.readouterr().out.splitlines()[0] == "f: 2.00M/4.00MB, 65.5kB/s, 00:32 left, a note"


def test_progress_says_a_line_at_the_end_and_none_at_the_start(capsys):
    with Progress(2, "short", "img") as progress:
        progress.update()
        assert capsys.readouterr().out == ""
        progress.update()
    assert capsys.readouterr().out.startswith("short: 2/2 img, ")
    with Progress(2, "silent", every_s=None) as progress:
        progress.update()
    assert capsys.readouterr().out == ""


def test_only_rank_0_speaks_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.distributed, "rank", lambda: 1)
    log = RunLog(tmp_path / "nowhere", tensorboard=True, wandb=True)
    log.say("hello")
    log.metrics(1, {"loss": 1.0})
    with Progress(3, "encoding", every_s=0) as progress:
        progress.update()
    assert log.position == 0 and capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    log.close()


def test_metrics_that_are_not_finite_are_null(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4, "loss_mae": None, "bad_steps": 1})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == \
        '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.0001, "loss_mae": null, "bad_steps": 1}\n'


def test_tensorboard_forgets_the_steps_after_a_resume_and_no_other(tmp_path, monkeypatch):
    purged = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda folder, purge_step: purged.append(purge_step) or open(os.devnull))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 9}\n')
    RunLog(tmp_path, position=12, tensorboard=True).close()
    assert purged == [8]


def test_position_is_what_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(logging.os, "fsync", lambda file: synced.append((tmp_path / "metrics.jsonl").stat().st_size))
    log = RunLog(tmp_path)
    log.metrics(1, {"loss": 0.5})
    assert log.position == synced[-1] == len((tmp_path / "metrics.jsonl").read_bytes()) > 0
    log.close()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_sink_that_is_not_installed_is_told_before_any_work(monkeypatch, name):
    monkeypatch.setattr(logging.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"log.{name}=true needs the package {name}: pip install {name}, or set log.{name}=false"):
        check_sinks(load_config(overrides=[f"log.{name}=true"]).log)
    check_sinks(load_config(overrides=["log.tensorboard=false", "log.wandb=false"]).log)


def test_metrics_logged_after_the_position_of_a_resume_are_cut_off(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(1, {"loss": 0.5})
    position = log.position
    log.metrics(2, {"loss": 0.4})
    log.close()
    log = RunLog(tmp_path, position)
    log.metrics(2, {"loss": 0.3})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.3}]


def test_a_metrics_file_shorter_than_the_checkpoint_says_is_told_and_kept(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    RunLog(tmp_path, position=100).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "had 100 bytes at the checkpoint, but only 12 are left" in capsys.readouterr().out
