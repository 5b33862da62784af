"""Optimizer steps that skip what is not finite, in every precision; what is compiled where."""

import platform
import subprocess
import sys

import pytest
import torch
from training_runs import ROOT

from utils import precision
from utils.precision import Stepper, autocast, effective_amp, missing_for_compile, native_bf16, use_compile

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


@pytest.fixture
def machine(monkeypatch):
    """machine(programs, triton, capability): what there is to compile with, seemingly."""
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(precision.sys, "platform", "linux")

    def set_up(programs=(), triton=True, capability=(9, 0)):
        monkeypatch.setattr(precision.shutil, "which", lambda name: name if name in programs else None)
        monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")

    return set_up


def test_auto_compiles_on_gpus_with_all_it_takes_and_never_on_a_cpu(machine):
    machine({"gcc", "g++"})
    assert use_compile("train.compile", "auto", GPU) is True and use_compile("train.compile", "auto", CPU) is False
    for lacking in ({"programs": {"g++"}}, {"programs": {"gcc"}, "triton": False}, {"programs": {"gcc"}, "capability": (6, 0)}):
        machine(**lacking)
        assert use_compile("train.compile", "auto", GPU) is False


def test_compiling_can_be_asked_for_and_switched_off_anywhere(machine):
    machine({"gcc", "g++"})
    assert [use_compile("train.compile", setting, device) for device in (CPU, GPU) for setting in (True, False)] == [True, False] * 2
    machine()
    assert use_compile("train.compile", False, CPU) is False


@pytest.mark.parametrize("device, there, wanted", [
    (CPU, {}, r"sample.compile=true needs a C\+\+ compiler \(g\+\+ is not there; the variable CXX names another\); set sample.compile=false"),
    (GPU, {}, r"needs a C compiler \(gcc or clang is not there; the variable CC names another\)"),
    (GPU, {"programs": {"gcc"}, "triton": False}, "needs the Python package triton; set"),
    (GPU, {"programs": {"gcc"}, "capability": (6, 0)}, "needs a GPU of compute capability 7.0 or more, which Tesla P100 has not")])
def test_what_is_missing_is_named(machine, device, there, wanted):
    machine(**there)
    with pytest.raises(ValueError, match=wanted):
        use_compile("sample.compile", True, device)


def test_variables_name_the_compilers_as_torch_and_triton_read_them(machine, monkeypatch):
    machine({"clang", "/opt/c++"})
    assert missing_for_compile(GPU) is None and "g++ is not there" in missing_for_compile(CPU)
    monkeypatch.setenv("CXX", "/opt/c++")
    monkeypatch.setenv("CC", "/nonexistent")
    assert missing_for_compile(CPU) is None and "(/nonexistent is not there" in missing_for_compile(GPU)


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_for_the_next_array(keep):
    """New pages for an array of 256 MiB that the same array was freed before: all of them, or none after the first few times."""
    program = f"""
import resource, torch
from utils.precision import keep_freed_memory
if {keep}:
    keep_freed_memory(torch.device("cpu"))
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
made = [pages() for _ in range(40)]  # the first few still find no gap of the right size
print(made[-1] / made[0])
"""
    again = float(subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert again < 0.1 if keep else again > 0.5
