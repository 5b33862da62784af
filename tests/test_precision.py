"""Number formats of a device, and what is compiled where."""

import os
import subprocess
import sys

import pytest
import torch
from training_runs import ROOT

from utils import precision
from utils.precision import arithmetic, autocast, effective_amp, native_bf16, use_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_formats_of_the_cpu():
    assert [effective_amp(amp, CPU) for amp in ("fp16", "bf16", "no")] == ["no", "bf16", "no"]
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("fp16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def tf32_switches():
    """Whether matrix products and convolutions may round to TF32, and torch's word for both GPUs and CPUs."""
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("device, tf32, inside", [
    (GPU, True, (True, True, "high")), (GPU, False, (False, False, "highest")), (CPU, True, (False, False, "highest"))])
@pytest.mark.parametrize("outside", ["medium", "high", "highest"])
def test_arithmetic_holds_inside_whatever_was_set_and_is_put_back_after_an_error(device, tf32, inside, outside):
    before = tf32_switches()
    try:
        torch.set_float32_matmul_precision(outside)  # as training with train.tf32 does
        torch.backends.cudnn.allow_tf32 = outside != "highest"
        settings = tf32_switches()
        with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16):
            with arithmetic(device, tf32=tf32):
                assert tf32_switches() == inside and torch.is_autocast_enabled("cpu") == (device != CPU)
                raise KeyError
        assert tf32_switches() == settings
    finally:
        torch.set_float32_matmul_precision(before[2])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_arithmetic_in_half_precision():
    with torch.autocast("cpu", torch.float16), arithmetic(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


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
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "NCCL_ALGO", "CUDA_PATH"):
        monkeypatch.setenv(name, "3")  # by the user
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        precision.setup_backends(tf32=False, deterministic=True, compiled=compiled)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_ALGO"] == os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with it flash attention's backward pass is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("cores, processes, threads", [(16, 4, "4"), (2, 8, "1"), (192, 1, "32")])
def test_processes_share_the_cores_among_their_compile_workers(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": str(processes)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    precision.setup_backends(tf32=False, deterministic=False, compiled=True)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == threads


def test_compiling_on_a_cpu_does_not_warn_of_cuda(tmp_path):
    (tmp_path / "nvcc").touch(mode=0o755)  # a toolkit, on a machine without a GPU
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    code = "from utils.precision import setup_backends; setup_backends(False, False, compiled={}); import torch.utils.cpp_extension"
    said = [subprocess.run([sys.executable, "-c", code.format(compiled)], cwd=ROOT, env=environment, capture_output=True, text=True).stderr
            for compiled in (False, True)]
    assert "CUDA" in said[0] and said[1] == ""
