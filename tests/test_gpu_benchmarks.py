"""scripts/gpu_benchmarks.sh, which needs a GPU to run: its commands are ones that the benchmarks understand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

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


def test_what_is_drawn_is_measured():
    drawn = re.findall(r'"\$out"/(train_[\w{},]+)\.json', SCRIPT)
    names = [prefix + part for prefix, _, parts in (text.partition("{") for text in drawn) for part in parts.rstrip("}").split(",")]
    assert len(names) == 6 and set(names) <= COMMANDS.keys()
