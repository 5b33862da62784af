"""The checks of benchmarks/gpu_check: they pass here, a broken thing fails, and a failure does not end the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import estimate
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import apart, checks
from benchmarks.gpu_check.checks import CHECKS, Failed, Skip
from models import layers
from training.checkpoint import CheckpointWriter
from training.optim import Stepper

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--set", *checks.MODELS["cpu"]]


@pytest.mark.timeout(900)
def test_all_that_has_a_meaning_on_a_cpu_passes(tmp_path):
    """But for the numbers of compiled blocks, which take a minute to compile; tests/test_reference.py holds them in float32."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--json", str(tmp_path / "found.json"), "--only", "^(?!numbers .* compiled)"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    passed = [row["check"] for row in rows if row["status"] == "PASS"]
    skipped = {row["figure"] for row in rows if row["status"] == "SKIP"}
    assert len(passed) == 20 and skipped == {checks.NO_FP16, "this is what the others are compared with",
                                             "a CPU computes at once, so there is nothing to wait for",
                                             "there is no GPU to have one too few of"}
    for row in rows:
        assert f"{row['status']}  {row['check']}: {row['figure']}" in process.stdout
    assert process.stdout.splitlines()[-1] == f"20 PASS, 0 FAIL, {len(rows) - 20} SKIP"


def of_one(function, *cases):
    """The checks with this function alone, for some of its cases."""
    return [(found, text, [case for case in choices if case in cases or not cases]) for found, text, choices in CHECKS if found is function]


@pytest.fixture
def place(tmp_path):
    return checks.Place(torch.device("cpu"), tmp_path)


def test_a_check_that_fails_does_not_end_the_others(capsys, monkeypatch):
    def wrong(place, case):
        raise {"figure": Failed("3 of 4"), "reason": Skip("not here"), "bug": KeyError("name")}[case]

    every = [(wrong, "wrong", [("figure",), ("reason",), ("bug",)]), (lambda place: "all of them", "right", [()])]
    rows = gpu_check.run_checks(every, None)
    assert [(row["check"], row["status"], row["figure"]) for row in rows] == [
        ("wrong figure", "FAIL", "3 of 4"), ("wrong reason", "SKIP", "not here"), ("wrong bug", "FAIL", "KeyError: 'name'"),
        ("right", "PASS", "all of them")]
    monkeypatch.setattr(checks, "CHECKS", every)
    monkeypatch.setattr(gpu_check, "start", lambda *arguments, **options: torch.device("cpu"))
    assert [gpu_check.main(["--only", word]) for word in ("wrong", "right")] == [1, 0]
    assert capsys.readouterr().out.endswith("1 PASS, 0 FAIL, 0 SKIP\n")


class LateWriter(CheckpointWriter):
    """Copies the weights when somebody waits for the file."""

    late = None

    def save(self, step, state):
        self.late = step, state

    def wait(self):
        if self.late is not None:
            (step, state), self.late = self.late, None
            super().save(step, state)
        return super().wait()


BROKEN = {
    "attention": (checks.numbers, ("bf16", "eager", "masked"),
                  lambda patch: patch.setattr(layers, "attention", lambda q, k, v: v if q.dtype == torch.bfloat16 else torch.softmax(
                      q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v)),
    "skipping": (checks.infinite_gradient, ("bf16",), lambda patch: patch.setattr(Stepper, "step", careless_step)),
    "order": (checks.loader, (), lambda patch: patch.setattr(checks, "stream_indices", lambda n, seed, start, count: range(count))),
    "copies": (checks.snapshot, (), lambda patch: patch.setattr(checks, "CheckpointWriter", LateWriter)),
}


def careless_step(stepper):
    """Takes any gradient."""
    stepper.optimizer.step()
    stepper.optimizer.zero_grad()
    return torch.ones(())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_fails_its_check(monkeypatch, place, name):
    function, case, break_it = BROKEN[name]
    assert [row["status"] for row in gpu_check.run_checks(of_one(function, case), place)] == ["PASS"]
    break_it(monkeypatch)
    place.folder = place.folder / "broken"
    assert [row["status"] for row in gpu_check.run_checks(of_one(function, case), place)] == ["FAIL"]


def test_each_format_compiles_its_own_graphs(monkeypatch, place):
    """All formats together have more graphs than torch keeps; those above would run eagerly, and the check would prove nothing."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    monkeypatch.setattr(checks, "loss_and_gradients", lambda *arguments: [torch.ones(1)])
    gpu_check.run_checks(of_one(checks.numbers), place)
    assert len(resets) == 2  # float32 and bf16; fp16 is skipped here


def test_results_that_differ_are_told():
    one = {"/model/a": torch.zeros(2), "/model/b": torch.ones(2)}
    assert checks.same_bits(one, dict(one), "both") == "2 tensors are equal"
    with pytest.raises(Failed, match="both: 1 of 2 tensors differ, the first is .'/model/b'"):
        checks.same_bits(one | {"/model/b": torch.ones(2) + 1e-7}, one, "both")
    with pytest.raises(Failed, match="nan"):
        checks.within(1e-4, [torch.tensor([torch.nan])], [torch.zeros(1)])
    with pytest.raises(Failed, match="2 different results"):
        apart.one_digest({"a", "b"})


@pytest.mark.parametrize("teraflops, status", [(1e-9, "PASS"), (1e9, "FAIL")])
def test_speed_is_held_against_the_estimate(monkeypatch, place, teraflops, status):
    monkeypatch.setattr(apart, "SPEED", ["--rounds", "1", "--warmup", "0", *TINY])
    monkeypatch.setattr(estimate, "GPUS", {"cpu": (teraflops, teraflops, 1)})
    monkeypatch.setattr(estimate, "HOST_S", 0.0)  # a CPU launches nothing
    (function, text, _), = apart.SPEED_CHECKS
    row, = gpu_check.run_checks([(function, text, [("ours", 2, "any kernel")])], place)
    assert row["status"] == status and "images/s" in row["figure"] and "of the estimate" in row["figure"]
    monkeypatch.setattr(estimate, "GPUS", {"h100": (1, 1, 1)})
    row, = gpu_check.run_checks([(function, text, [("ours", 2, "any kernel")])], place)
    assert (row["status"], row["figure"]) == ("SKIP", "there is no estimate for this device")
