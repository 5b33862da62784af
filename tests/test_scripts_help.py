"""`--help` of everything that can be run answers at once: nothing heavy is loaded before the arguments are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "omegaconf", "torchvision", "diffusers", "timm", "scipy", "matplotlib", "lmdb", "tensorboard", "requests"]



def commands():
    """Everything that can be run: scripts by path, modules of the packages as `python -m` takes them."""
    folders = (".", "scripts", "utils", "fid", "benchmarks", "benchmarks/gpu_check", "experiments")
    files = [path.relative_to(ROOT) for folder in folders for path in ROOT.glob(f"{folder}/*.py")
             if '__name__ == "__main__"' in path.read_text() or path.name == "__main__.py"]
    return sorted(str(path) if path.parent.name in ("", "scripts") else ".".join(path.with_suffix("").parts).removesuffix(".__main__")
                  for path in files)


RUNNER = """
import json, runpy, sys
target, heavy = sys.argv[1], json.loads(sys.argv[2])
sys.argv = [target, "--help"]
code = None
try:
    runpy.run_path(target, run_name="__main__") if target.endswith(".py") else runpy.run_module(target, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print("RESULT", json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize("target", commands())
def test_help_answers_without_loading_anything_heavy(target):
    process = subprocess.run([sys.executable, "-c", RUNNER, target, json.dumps(HEAVY)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    text, _, result = process.stdout.partition("RESULT ")
    assert process.returncode == 0 and process.stderr == ""
    assert "usage:" in text or Path(target).name in text
    assert json.loads(result) == [0, []]
