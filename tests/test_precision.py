"""Optimizer steps that skip what is not finite, in every precision; what is compiled where."""

import os
import subprocess
import sys

import pytest
import torch
from training_runs import ROOT

from utils import precision
from utils.precision import Stepper, autocast, effective_amp, native_bf16, use_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def make(scaled=False, fused=True, **options):
    """A problem of two weights of 1, AdamW with lr 0.1; scaled: with fp16's loss scaler, which also runs on a CPU."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=fused)
    stepper = Stepper(optimizer, "fp16", CPU, **options)
    if scaled:
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return weight, optimizer, stepper


def step(weight, stepper, factor=1.0):
    stepper.backward((weight * factor).sum())
    return stepper.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_step_changes_nothing_and_is_counted(scaled, fused, bad):
    weight, optimizer, stepper = make(scaled, fused)
    norm = step(weight, stepper, 3.0)
    assert norm.item() == pytest.approx(3 * 2**0.5, rel=1e-6)  # unscaled
    before = weight.detach().clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert torch.isnan(step(weight, stepper, bad))
    assert torch.equal(weight, before[0])
    for key, value in before[1].items():
        assert torch.equal(optimizer.state[weight][key], value), key
    assert stepper.bad_steps.tolist() == [1, 1]
    step(weight, stepper, bad), step(weight, stepper, 1.0)
    assert stepper.bad_steps.tolist() == [0, 2] and not torch.equal(weight, before[0])


def test_scaled_steps_equal_plain_ones_bit_for_bit():
    """The scale is a power of two, so scaling and unscaling are exact."""
    plain, scaled = make(), make(scaled=True)
    for factor in (1.0, 0.3, float("nan"), 2.0):
        for weight, _, stepper in (plain, scaled):
            step(weight, stepper, factor)
    assert torch.equal(plain[0], scaled[0])


def test_scale_falls_on_bad_steps_and_rises_again():
    weight, _, stepper = make(scaled=True)
    scales = []
    for factor in (1.0, float("nan"), 1.0, 1.0, 1.0):
        step(weight, stepper, factor)
        scales.append(stepper.scaler.get_scale())
    assert scales == [1024, 512, 512, 512, 1024]


def test_infinite_loss_with_finite_gradients_is_a_bad_step():
    weight, _, stepper = make()
    weight.data.fill_(2e19)  # the square overflows float32, its derivative 4e19 does not
    loss = weight.square().sum()
    assert torch.isinf(loss)
    stepper.backward(loss)
    assert torch.isnan(stepper.step()) and stepper.bad_steps.tolist() == [1, 1]


def test_past_the_limit_every_step_is_skipped():
    weight, _, stepper = make(max_bad_steps=2)
    for factor in (float("nan"), float("nan"), float("nan"), 1.0, 1.0):
        step(weight, stepper, factor)
    assert stepper.bad_steps.tolist() == [5, 5] and torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_bounds_the_norm(scaled):
    weight, _, stepper = make(scaled, grad_clip=1.0)
    seen = []
    stepper.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.norm().item()))
    assert step(weight, stepper, 100.0).item() == pytest.approx(100 * 2**0.5, rel=1e-6)
    assert step(weight, stepper, 0.1).item() == pytest.approx(0.1 * 2**0.5, rel=1e-6)
    assert seen == pytest.approx([1.0, 0.1 * 2**0.5], rel=1e-4)  # torch divides by norm + 1e-6


def test_state_comes_back():
    weight, _, stepper = make(scaled=True)
    for factor in (1.0, float("nan"), 1.0):
        step(weight, stepper, factor)
    other = make(scaled=True)[2]
    other.load_state_dict(stepper.state_dict())
    assert other.state_dict() == stepper.state_dict() and other.scaler.get_scale() == 512
    assert other.scaler.state_dict()["_growth_tracker"] == 1


def test_formats_of_the_cpu():
    assert [effective_amp(amp, CPU) for amp in ("fp16", "bf16", "no")] == ["no", "bf16", "no"]
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("fp16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("text, wanted", [
    ("flags\t\t: fpu avx512f avx512_bf16 clzero", True), ("flags\t\t: fpu avx512f amx_bf16", True), ("Features\t: fp asimd bf16", True),
    ("flags\t\t: fpu avx512f avx2", False), (None, False),
])
def test_bf16_instructions_of_a_cpu_are_read_from_its_flags(text, wanted, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(f"model name\t: Some CPU\n{text}\n")
    monkeypatch.setattr(precision, "CPU_INFO", path)
    assert native_bf16(CPU) is wanted


def test_auto_compiles_on_a_gpu_and_never_on_a_cpu():
    assert [use_compile("auto", device) for device in (CPU, GPU)] == [False, True]
    assert [use_compile(setting, device) for device in (CPU, GPU) for setting in (True, False)] == [True, False] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_kernels_are_asked_for_with_and_without_the_compiler(monkeypatch, compiled):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        precision.setup_backends(tf32=False, deterministic=True, compiled=compiled)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with it flash attention's backward pass is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_compiling_on_a_cpu_does_not_warn_of_cuda(tmp_path):
    (tmp_path / "nvcc").touch(mode=0o755)  # a toolkit, on a machine without a GPU
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    code = "from utils.precision import setup_backends; setup_backends(False, False, compiled={}); import torch.utils.cpp_extension"
    said = [subprocess.run([sys.executable, "-c", code.format(compiled)], cwd=ROOT, env=environment, capture_output=True, text=True).stderr
            for compiled in (False, True)]
    assert "CUDA" in said[0] and said[1] == ""
