"""Number formats and what computes them: autocast, loss scaling, TF32, determinism, compiling, memory. The only file that sets them."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from utils.cli import UserError

CPU_INFO = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def effective_amp(amp, device):
    """The format that `amp` ("fp16", "bf16", "no") means on `device`: CPUs have no fp16 training and use float32 instead."""
    return "no" if amp == "fp16" and device.type == "cpu" else amp


def native_bf16(device):
    """True if the device multiplies bf16 matrices in hardware; others imitate it, many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    words = set(CPU_INFO.read_text().split()) if CPU_INFO.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm; systems without the file: taken as no


def autocast(amp, device):
    """Context in which the network's matrix products run in `amp`'s format."""
    amp = effective_amp(amp, device)
    if amp == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[amp])


def setup_backends(tf32, deterministic, compiled=False):
    """Set the process-wide switches of a run, once, from its script.

    tf32: float32 matrix products on GPUs may round their inputs to TF32 (10 bits of mantissa).
    deterministic: GPU kernels whose result does not depend on thread order, which exact resume needs; an operation that has
    none is an error that names it. (Mere warnings would leave attention's backward pass as it is.) compiled: the run compiles blocks.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
        if compiled:
            torch.use_deterministic_algorithms(True)  # tells the compiler too
        else:
            torch.set_deterministic_debug_mode("error")  # the same without loading the compiler, which takes seconds
        # True also fills every new tensor with NaN to catch reads of uninitialised memory: a debugging aid that costs a pass
        torch.utils.deterministic.fill_uninitialized_memory = False


def keep_freed_memory(device):
    """On a CPU: keep memory that was freed for what is allocated next, instead of giving it back to the system each time.

    Otherwise the system clears the pages of every large array anew, 5 to 10 % of a training step. The process stays as large
    as it has once been. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def use_compile(key, setting, device):
    """Whether the config key `key`, set to True, False or "auto", means compiled blocks on `device`: depends on the machine alone.

    "auto" compiles on GPUs that have what it takes; on a CPU the first step would wait for 20 to 50 s.
    Raises ValueError naming what is missing if True cannot be done.
    """
    if setting == "auto":
        return device.type == "cuda" and missing_for_compile(device) is None
    missing = missing_for_compile(device) if setting else None
    if missing is not None:
        raise UserError(f"{key}=true needs {missing}; set {key}=false to go without")
    return setting


def missing_for_compile(device):
    """What torch.compile lacks here to make kernels for `device`, in words; None if nothing."""
    if device.type == "cpu":
        return _missing_compiler("C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"])
    if importlib.util.find_spec("triton") is None:
        return "the Python package triton"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"a GPU of compute capability 7.0 or more, which {torch.cuda.get_device_name(device)} has not"
    return _missing_compiler("C", "CC", ["gcc", "clang"])  # for what launches triton's kernels


def _missing_compiler(language, variable, names):
    """Look for the programs that torch and triton call."""
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if any(shutil.which(name) for name in names):
        return None
    return f"a {language} compiler ({' or '.join(names)} is not there; the variable {variable} names another)"


def run_uncompiled():
    """From now on blocks that were compiled run as they are."""
    torch.compiler.set_stance("force_eager")


def compile_options(train, num_tokens):
    """Arguments of torch.compile for the blocks of a network of num_tokens tokens that is trained as a TrainConfig says.

    The blocks of one width share a graph: one for all numbers of kept tokens where a schedule changes them, or, with
    cuda_graphs, one for each number, whose kernels are recorded and replayed, which saves their launch times.
    """
    torch._dynamo.config.optimize_ddp = False  # it splits graphs so that gradients are sent early; blocks are small enough as they are
    if train.cuda_graphs:
        # for every count, and the decoder; newer names of this limit are aliases of it
        torch._dynamo.config.cache_size_limit = num_tokens // train.token_multiple + 8
        return {"mode": "reduce-overhead", "dynamic": False}
    # A batch that happens to equal a number of tokens is another size all the same: one graph, however the run was started.
    torch.fx.experimental._config.use_duck_shape = not train.mask_ratio_varies
    return {"dynamic": train.mask_ratio_varies}


class Stepper:
    """One optimizer step in any precision: loss scaling, clipping, and skipping of steps with NaN or Inf losses or gradients.

    Nothing here waits for the GPU: whether a step is skipped is a number on the device, which fused AdamW reads itself (for an
    unfused optimizer the number is waited for).
    `bad_steps` (2,) int64 on the device counts skipped steps: [in a row until now, in all]. After more than max_bad_steps
    in a row every step is skipped, so that whoever looks some steps later still finds when it began.
    """

    def __init__(self, optimizer, amp, device, grad_clip=0.0, max_bad_steps=20):
        self.optimizer, self.grad_clip, self.max_bad_steps = optimizer, grad_clip, max_bad_steps
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=effective_amp(amp, device) == "fp16")
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)

    def backward(self, loss):
        """Add the gradients of the scaled loss (a scalar)."""
        # A loss that overflows can have finite gradients; NaN ones make all processes skip, after they are averaged.
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self.scaler.scale(loss * sound).backward()

    def step(self):
        """Unscale, clip, update the weights unless the step is bad, clear the gradients.

        Returns the gradient norm before clipping, a scalar on the device (NaN when the step was skipped).
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        in_a_row, total = self.bad_steps
        bad = ~torch.isfinite(norm) | (in_a_row > self.max_bad_steps)
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm, foreach=True)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad.float()  # how GradScaler tells fused AdamW to skip; here also without a scaler
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = torch.stack([(in_a_row + 1) * bad, total + bad])
        return torch.where(bad, torch.nan, norm)

    def state_dict(self):
        return {"scaler": self.scaler.state_dict(), "bad_steps": self.bad_steps.tolist()}

    def load_state_dict(self, state):
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = torch.tensor(state["bad_steps"], device=self.bad_steps.device)
