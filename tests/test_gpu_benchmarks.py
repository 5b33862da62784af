"""scripts/gpu_benchmarks.sh, which needs a GPU to run: its commands are ones that the benchmarks understand."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "scripts/gpu_benchmarks.sh").read_text()
COMMANDS = {line.split()[1]: shlex.split(line, comments=True)[2:] for line in SCRIPT.splitlines() if re.match(r"measure \w+ ", line)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_understood(name):
    module_name, *arguments = COMMANDS[name]
    folder = (ROOT / "benchmarks" / module_name).is_dir()
    module = importlib.import_module(f"benchmarks.{module_name}{'.__main__' * folder}")
    args = module.parse_arguments([*arguments, "--json", "out.json"])
    assert args.json == Path("out.json")
    if module_name in ("train", "sample"):
        for arm in args.arms:
            config = module.arm_config(args, arm)
            if module_name == "train":
                assert config.train.compile is (arm == "compiled" or "train.compile=true" in arguments)
                assert config.train.deterministic is ("train.deterministic=false" not in arguments)


def test_what_is_drawn_is_measured():
    drawn = re.findall(r'"\$out"/(train_\S+)\.json', SCRIPT)
    names = subprocess.run(["bash", "-c", f"echo {' '.join(drawn)}"], capture_output=True, text=True, check=True).stdout.split()
    assert len(names) == 10 and set(names) <= COMMANDS.keys()


def test_all_benchmarks_are_among_the_commands():
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    runnable |= {path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py")}
    assert runnable - {"plot", "estimate"} == {module for module, *_ in COMMANDS.values()}
