"""Number formats and how they are computed: autocast, TF32, determinism, compiling. The only file that sets them."""

import contextlib
import os
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def effective_amp(amp, device):
    """The format that `amp` ("fp16", "bf16", "no") means on `device`: a CPU cannot train in fp16 and uses float32 instead."""
    return "no" if amp == "fp16" and device.type == "cpu" else amp


def native_bf16(device):
    """True if the device multiplies bf16 matrices in hardware. Other devices emulate it, many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    words = set(CPU_INFO.read_text().split()) if CPU_INFO.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm; a system without the file counts as no


def autocast(amp, device):
    """Context in which the network's matrix products run in `amp`'s format."""
    amp = effective_amp(amp, device)
    if amp == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[amp])


@contextlib.contextmanager
def arithmetic(device, amp="no", tf32=False):
    """Compute inside the block as stated here, whatever the caller has set; the caller's settings are put back after.

    amp: format of the matrix products; "no" is float32. tf32: on GPUs float32 products may round their inputs to TF32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _set_tf32(tf32 and device.type == "cuda")
    try:
        with torch.autocast(device.type, enabled=False), autocast(amp, device):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _set_tf32(allowed):
    """Let float32 matrix products and convolutions round their inputs to TF32 (10 bits of mantissa), or not."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def setup_backends(tf32, deterministic, compiled=False):
    """Set the process-wide switches of a run, once, from its script.

    tf32: float32 matrix products on GPUs may round their inputs to TF32; `arithmetic` sets its own.
    deterministic: use GPU kernels whose result does not depend on the order of threads; exact resume needs them. An operation
    without such a kernel is an error that names it. compiled: the run compiles blocks.
    """
    _set_tf32(tf32 and torch.cuda.is_available())  # on CPUs "high" would allow other roundings
    if compiled:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # by default each process would take all
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, max(1, cores))))
        if not torch.cuda.is_available():
            os.environ.setdefault("CUDA_PATH", "")  # or the compiler for CPUs looks for CUDA, and warns if it finds a toolkit without a GPU
    if deterministic:
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # for NCCL's start; sums in H100 nodes' switches differ from call to call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
        # "error", not "warn": with warnings alone, the backward pass of attention would stay non-deterministic.
        if compiled:
            torch.use_deterministic_algorithms(True)  # tells the compiler too, whose import takes more than a second
        else:
            torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every new tensor


def use_compile(setting, device):
    """Whether a compile setting (True, False or "auto") compiles on `device`: "auto" does so on GPUs.

    On a CPU the first step would wait 20 to 50 s for the compiler.
    """
    return device.type == "cuda" if setting == "auto" else setting


def compile_options(train):
    """Arguments of torch.compile for blocks that are trained as a TrainConfig says.

    Blocks of the same width share a graph. Where a schedule changes the number of kept tokens, the graph takes any number.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split graphs to send gradients early; blocks are small enough as they are
    # Do not merge batch and token dimensions that happen to be equal: a resumed run must compile the same graph.
    torch.fx.experimental._config.use_duck_shape = not train.mask_ratio_varies
    return {"dynamic": train.mask_ratio_varies}
