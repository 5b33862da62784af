"""How scripts start and end: settings and options apart; a user's mistake is one line, a bug shows its traceback; signals."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli
from utils.cli import StopNotice, UserError, parse_with_overrides
from utils.config import load_config

ROOT = Path(__file__).resolve().parent.parent


def run_main(body, **environment):
    """Run `def main(): body` under cli.run in a process of its own."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"import os, signal, sys, time\nfrom utils import cli\nfrom utils.cli import *\ndef main():\n{lines}cli.run(main)\n"
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MASKDIT_DEBUG")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------ the end

@pytest.mark.parametrize("body, code", [("pass", 0), ("return None", 0), ("return EXIT_BAD", 3), ("return EXIT_STOPPED", 75)])
def test_what_main_returns_is_the_exit_code(body, code):
    for environment in ({}, {"RANK": "0"}):
        done = run_main(body, **environment)
        assert (done.returncode, done.stderr) == (code, "")


def test_a_mistake_of_the_user_is_one_line_and_code_2():
    done = run_main("raise UserError('data.root is empty:\\ngive a folder')")
    assert (done.returncode, done.stderr) == (2, "error: data.root is empty: give a folder\n")


@pytest.mark.parametrize("bug, said", [
    ("a, b = (1, 2, 3)", "ValueError: too many values to unpack (expected 2)"), ("int('x')", "ValueError: invalid literal"),
    ("open('/nowhere/file')", "FileNotFoundError"), ("assert False, 'never'", "AssertionError: never")])
def test_a_bug_shows_its_traceback(bug, said):
    done = run_main(bug)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and said in done.stderr and "error: " not in done.stderr


def test_a_bug_inside_the_projects_files_shows_its_traceback():
    """A ValueError of Python that passes through our own modules is no mistake of the user."""
    done = run_main("from utils import config\nconfig.to_dict = lambda base: dict([(1, 2, 3)])\nconfig.load_config(base=3)")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "utils/config.py" in done.stderr


def test_tracebacks_can_be_asked_for():
    done = run_main("raise UserError('data.root is empty')", MASKDIT_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "data.root is empty" in done.stderr


def test_ctrl_c_is_told():
    done = run_main("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_before_processes_are_connected_the_first_speaks_for_all():
    said = [run_main("raise UserError('no config')", RANK=str(rank)) for rank in range(2)]
    assert [(done.returncode, done.stderr) for done in said] == [(2, "error: no config\n"), (2, "")]
    second_node = run_main("raise UserError('too few GPUs')", RANK="8", LOCAL_RANK="0")  # perhaps nobody but this node finds it
    assert second_node.stderr == "error: too few GPUs\n"
    bug = run_main("int('x')", RANK="1")
    assert bug.returncode == 1 and bug.stderr.startswith("Traceback")


@pytest.mark.parametrize("raised, heard, code, said", [
    ("UserError('bad data')", "first", 2, "error on rank 1: bad data\n"),
    ("UserError('bad data')", "again", 2, ""),
    ("KeyError('bug')", "first", 1, "Traceback"),
    ("RuntimeError('gloo: closed')", "lost", 1, "rank 1 ended because rank 0 failed: KeyError\n"),
])
def test_of_several_processes_each_says_only_what_the_others_have_not_said(raised, heard, code, said):
    """With real processes: tests/test_distributed.py."""
    several = f"""import types
several = types.ModuleType("utils.distributed")
several.world_size, several.rank = lambda: 2, lambda: 1
several.explain_loss = lambda error: "ended because rank 0 failed: KeyError" if {heard == "lost"} else None
several.note_failure = lambda text: {heard == "first"} and text.startswith(({raised[:5]!r},))
sys.modules["utils.distributed"] = several
raise {raised}"""
    done = run_main(several, RANK="1")
    assert done.returncode == code and done.stderr.startswith(said) and (said or not done.stderr)


# ------------------------------------------------------------------------------------------------ the command line

def make_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--class_idx", nargs="+")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--num_steps")
    parser.add_argument("--exp_name")
    return parser


def test_overrides_are_told_from_options_and_their_values():
    argv = ["--class_idx", "3", "sample.num_steps=5", "--ckpt_path", "runs/lr=1/x.pt", "model.options.a=b=c", "--exp_name", "lr=3",
            "--num_steps=b.c=d"]
    args, overrides = parse_with_overrides(make_parser(), argv)
    assert overrides == ["sample.num_steps=5", "model.options.a=b=c"]
    assert (args.class_idx, args.ckpt_path, args.exp_name, args.num_steps) == (["3"], "runs/lr=1/x.pt", "lr=3", "b.c=d")


@pytest.mark.parametrize("argv", [
    ["--class_idx", "3", "goldfish", "sample.num_steps=5", "--ckpt_path", "x.pt"],
    ["sample.num_steps=5", "--class_idx", "3", "goldfish", "--ckpt_path", "x.pt"],
    ["--ckpt_path", "x.pt", "--class_idx", "3", "goldfish", "sample.num_steps=5"]])
def test_overrides_may_stand_anywhere(argv):
    args, overrides = parse_with_overrides(make_parser(), argv)
    assert (args.class_idx, args.ckpt_path, overrides) == (["3", "goldfish"], "x.pt", ["sample.num_steps=5"])


@pytest.mark.parametrize("argv, said", [
    (["--ckpt_pth", "x.pt"], "argument '--ckpt_pth' is not understood; see --help (settings look like train.lr=1e-4)"),
    (["--numstep=3"], "argument '--numstep=3' is not understood; see --help"),
    (["x.pt"], "argument 'x.pt' is not understood; see --help"),
    (["train.seed=3", "--zzz"], "argument '--zzz' is not understood; see --help"),
])
def test_misspelt_options_are_left_to_the_config_which_refuses_them(argv, said):
    _, overrides = parse_with_overrides(make_parser(), argv)
    with pytest.raises(UserError) as refusal:
        load_config(None, overrides)
    assert said in str(refusal.value)


def test_an_override_without_its_section_is_left_to_the_config():
    _, overrides = parse_with_overrides(make_parser(), ["lr=3"])
    with pytest.raises(UserError, match="unknown key 'lr'; did you mean 'train.lr'?"):
        load_config(None, overrides)


# ------------------------------------------------------------------------------------------------ signals

@pytest.mark.parametrize("number", cli.SIGNALS)
def test_the_first_signal_is_a_notice_and_later_ones_are_ignored_once_it_was_heeded(number):
    before = signal.getsignal(number)
    try:
        with StopNotice() as notice:
            assert not notice.requested
            os.kill(os.getpid(), number)
            assert notice.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for each in cli.SIGNALS:
            signal.signal(each, before if each == number else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_without_a_notice_or_after_an_error_signals_do_what_they_did(error):
    before = [signal.getsignal(number) for number in cli.SIGNALS]
    try:
        with StopNotice():
            if error:
                os.kill(os.getpid(), signal.SIGTERM)
                raise error
    except RuntimeError:
        pass
    assert [signal.getsignal(number) for number in cli.SIGNALS] == before


SIGNAL_TWICE = """with StopNotice() as notice:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({wait})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return 7 if notice.requested else 8"""


def test_a_second_signal_ends_the_process_at_once():
    assert run_main(SIGNAL_TWICE.format(wait=0)).returncode == 128 + signal.SIGTERM


def test_the_echo_of_a_launcher_is_not_a_second_signal():
    assert run_main(SIGNAL_TWICE.format(wait=0), RANK="0").returncode == 7
    assert run_main("cli.SAME_NOTICE_S = 0.2\n" + SIGNAL_TWICE.format(wait=0.4), RANK="0").returncode == 128 + signal.SIGTERM
