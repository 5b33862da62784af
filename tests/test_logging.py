import io
import json
import sys

import pytest

from utils import logging
from utils.logging import Progress, RunLog, format_bytes, format_seconds


@pytest.mark.parametrize("seconds, text", [(0.2, "0s"), (75, "1m 15s"), (3600, "1h 0m 0s"), (93784, "1d 2h 3m")])
def test_seconds_are_written_in_their_three_largest_units(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5 TiB")])
def test_bytes_are_written_in_binary_units(count, text):
    assert format_bytes(count) == text


def test_progress_without_a_terminal_is_plain_lines_of_whole_units(capsys):
    with Progress(500, "sampling", "img", every_s=0) as progress:
        for _ in range(9 * 7):
            progress.update(500 / (9 * 7))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sampling: 7/500 img, ") and "left" in lines[0]
    assert lines[-1].startswith("sampling: 500/500 img, ")  # though the parts add up to 499.9999999999992


def test_progress_on_a_terminal_is_one_bar_above_which_text_is_said(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, "encoding") as progress:
        progress.update(0.5)
        progress.update(1.5)
        assert progress.bar.n == 2 and Progress.shown is progress.bar
        logging.say("a line")
    assert Progress.shown is None
    assert "encoding" in terminal.getvalue()


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
    assert "had 100 bytes at the checkpoint, 12 are left" in capsys.readouterr().out
