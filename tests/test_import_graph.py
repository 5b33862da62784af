"""The shape of the house: who may import whom, and that importing has no effect."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of the others, and the order of modules inside utils/; the rooms in between are free inside.
ROOMS = {
    "models": {"utils.cli"},  # UserError, nothing else: models/ stands alone
    "utils": set(),
    "dataset": {"utils"},
    "fid": {"utils", "dataset"},
    "sampling": {"utils", "models", "dataset"},
    "training": {"utils", "models", "dataset", "sampling", "training.watch"},
    "training.watch": {"utils", "models", "dataset", "sampling", "fid"},
    "scripts": {"utils", "models", "dataset", "sampling", "training", "fid"},
}
# Each module of utils/ imports those of the rows before its own only.
UTILS_ROWS = ["cli", "schema class_names files", "config", "distributed", "logging precision images", "download"]
PACKAGES = ("models", "utils", "dataset", "fid", "sampling", "training")
TOOLS = ("scripts", "benchmarks", "experiments")  # they may import what the top-level scripts may
NO_TORCH = ["utils.cli", "utils.schema", "utils.config", "utils.class_names", "utils.files", "download_assets"]

# Import names of requirements that are called otherwise, and of what comes with them.
PACKAGE_OF = {"PIL": "pillow", "urllib3": "requests", "torch.utils.tensorboard": "tensorboard",
              "pytorch_fid": "pytorch-fid", "torch_fidelity": "torch-fidelity"}
OPTIONAL = {"wandb"}                       # asked for by an option, with a message where it is missing
NOT_IMPORTED = {"pytest-timeout", "pytest-xdist", "execnet"}  # plugins: limits of pytest.ini, processes of scripts/test.sh


def source_files():
    """{module name: path} of everything that is imported or run; a package is its __init__."""
    paths = [*ROOT.glob("*.py"), *(path for folder in (*PACKAGES, *TOOLS) for path in ROOT.glob(f"{folder}/**/*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths))


FILES = source_files()


def imports_of(name, path):
    """Dotted names that the file imports anywhere, `from a import b` as a.b when that is a module of ours and as a when not."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "importorskip":
            if isinstance(node.args[0], ast.Constant):  # a name put together at run time is not known here
                yield node.args[0].value


GRAPH = {name: {target for target in imports_of(name, path) if target in FILES} - {name} for name, path in FILES.items()}


def room(name):
    """The entry of ROOMS that a module falls under."""
    package = name.partition(".")[0]
    return name if name in ROOMS else package if package in ROOMS else "scripts"


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_only_what_they_may(name):
    outside = [f"{module} imports {target}" for module, targets in GRAPH.items() if room(module) == name for target in targets
               if room(target) not in (name, name.partition(".")[0]) and not ROOMS[name] & {target, target.partition(".")[0]}]
    assert not outside


def test_utils_import_rows_above_only():
    row_of = {f"utils.{name}": number for number, row in enumerate(UTILS_ROWS) for name in row.split()}
    assert row_of.keys() == {name for name in FILES if name.startswith("utils.")}, "give new modules a row"
    upward = [f"{name} imports {target}" for name in row_of for target in GRAPH[name] & row_of.keys() if row_of[target] >= row_of[name]]
    assert not upward


def test_no_module_imports_itself_round_a_corner():
    # A package's __init__ gathers its modules; they import one another directly.
    TopologicalSorter(GRAPH).prepare()


def third_party():
    """Packages that the code and its tests import, under the names of requirements.txt."""
    tests = {path.stem: path for path in ROOT.glob("tests/*.py")}
    ours = {*FILES, *tests, *TOOLS}
    found = set()
    for name, path in (FILES | tests).items():
        for target in imports_of(name, path):
            top = target.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ours:
                found.add(PACKAGE_OF.get(target, PACKAGE_OF.get(top, top)))
    return found


def required(file):
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return {re.match(r"[A-Za-z0-9_-]+", line).group().lower() for line in lines if line}


def test_requirements_are_what_is_imported():
    imported, listed = third_party() - OPTIONAL, required("requirements.txt") | required("requirements-test.txt")
    assert imported - listed == set(), "imported but not in a requirements file"
    assert listed - imported - NOT_IMPORTED == set(), "in a requirements file but never imported"


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_light_modules_do_not_load_torch():
    result = run("import importlib, sys\n"
                 "for name in sys.argv[1:]:\n"
                 "    importlib.import_module(name)\n"
                 "    assert 'torch' not in sys.modules, name", *NO_TORCH)
    assert result.returncode == 0, result.stderr


WATCH = """
import importlib, json, os, random, signal, sys, threading
import numpy, torch, torchvision  # which names a folder for compiled code in the environment
def state():
    backends = torch.backends
    return {
        "random": hash(random.getstate()), "numpy": hash(numpy.random.get_state()[1].tobytes()),
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "cudnn": [backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32],
        "matmul": [backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()],
        "grad": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "deterministic": torch.are_deterministic_algorithms_enabled(), "environment": dict(os.environ), "folder": os.getcwd(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
    }
changed = {}
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    if before != after:
        changed[name] = [key for key in before if before[key] != after[key]]
print("CHANGED", json.dumps(changed))
"""


def test_importing_changes_and_prints_nothing():
    modules = sorted(name for name in FILES if not name.endswith("__main__"))
    result = run(WATCH, *modules)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "CHANGED {}\n" and result.stderr == ""
