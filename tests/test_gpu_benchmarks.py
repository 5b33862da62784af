"""scripts/gpu_benchmarks.sh, which needs a GPU to run: its commands are ones that the benchmarks understand."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import plot, train
from utils.config import to_dict

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "scripts/gpu_benchmarks.sh").read_text()
COMMANDS = {line.split()[1]: shlex.split(line)[2:] for line in SCRIPT.splitlines() if re.match(r"measure \w+ ", line)}


def parse(monkeypatch, module, arguments):
    monkeypatch.setattr("sys.argv", [f"benchmarks/{module.__name__}.py", *arguments])
    return (getattr(module, "parse_arguments", None) or module.parse_args)()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_understood(monkeypatch, name):
    module_name, *arguments = COMMANDS[name]
    module = importlib.import_module(f"benchmarks.{module_name}")
    args = parse(monkeypatch, module, [*arguments, "--json", "out.json"])
    assert args.json == Path("out.json")
    if module_name == "train":
        for arm in args.arms:
            for size, ratio, amp, batch in zip(args.sizes, args.mask_ratio, args.amp, args.batchsize):
                config = module.case_config(args, size, ratio, amp, batch, arm)
                assert config.train.compile is (arm == "compiled" or "train.compile=true" in arguments)
    if module_name == "sample":
        for arm in args.arms:
            module.case_config(args, args.sizes[0], args.amp[0], args.num_steps[0], args.cfg_scale[0], args.batchsize[0], arm)


def drawn_together():
    """[[names of the files of one picture]]"""
    drawn = re.findall(r'"\$out"/(train_[\w{},]+)\.json', SCRIPT)
    return [[prefix + part for part in parts.rstrip("}").split(",")] for prefix, _, parts in (text.partition("{") for text in drawn)]


def test_what_is_drawn_is_measured():
    names = sum(drawn_together(), [])
    assert len(names) == 6 and set(names) <= COMMANDS.keys()


@pytest.mark.parametrize("names", drawn_together() + [["train_s2"]])
def test_what_is_drawn_together_fits_one_picture(monkeypatch, names):
    rows = []
    for name in names:
        args = parse(monkeypatch, train, COMMANDS[name][1:])
        for size, ratio, amp, batch, arm in itertools.product(args.sizes, args.mask_ratio, args.amp, args.batchsize, args.arms):
            config = train.case_config(args, size, ratio, amp, batch, arm)
            rows.append({"model": size, "masked": config.train.mask_ratio, "amp": amp, "batch": batch, "arm": arm, "config": to_dict(config)})
    assert {row["arm"] for group in plot.groups_of(rows).values() for row in group.values()} == {row["arm"] for row in rows}
