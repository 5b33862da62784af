"""scripts/gpu_benchmarks.sh, which needs a GPU to run: its commands are ones that the benchmarks understand."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "scripts/gpu_benchmarks.sh").read_text()
COMMANDS = {line.split()[1]: shlex.split(line)[2:] for line in SCRIPT.splitlines() if re.match(r"measure \w+ ", line)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_understood(name):
    module_name, *arguments = COMMANDS[name]
    module = importlib.import_module(f"benchmarks.{module_name}")
    args = module.parse_arguments([*arguments, "--json", "out.json"])
    assert args.json == Path("out.json")
    if module_name in ("train", "sample"):
        for case, arm in itertools.product(module.cases_of(args), args.arms):
            config = module.case_config(args, case, arm)
            if module_name == "train":
                assert config.train.compile is (arm == "compiled" or "train.compile=true" in arguments)


def test_what_is_drawn_is_measured():
    drawn = re.findall(r'"\$out"/(train_[\w{},]+)\.json', SCRIPT)
    names = [prefix + part for prefix, _, parts in (text.partition("{") for text in drawn) for part in parts.rstrip("}").split(",")]
    assert len(names) == 6 and set(names) <= COMMANDS.keys()


def test_all_benchmarks_are_among_the_commands():
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert runnable - {"plot", "estimate"} == {module for module, *_ in COMMANDS.values()}
