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


def setup_backends(tf32, deterministic, compiled=False):
    """Set the process-wide switches of a run, once, from its script.

    tf32: float32 matrix products on GPUs may round their inputs to TF32 (10 bits of mantissa).
    deterministic: use GPU kernels whose result does not depend on the order of threads; exact resume needs them. An operation
    without such a kernel is an error that names it. compiled: the run compiles blocks.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if compiled and not torch.cuda.is_available():
        os.environ.setdefault("CUDA_PATH", "")  # or the compiler for CPUs looks for CUDA, and warns if it finds a toolkit without a GPU
    if deterministic:
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


def run_uncompiled():
    """From now on blocks that were compiled run as they are."""
    torch.compiler.set_stance("force_eager")


def compile_options(train):
    """Arguments of torch.compile for blocks that are trained as a TrainConfig says.

    Blocks of the same width share a graph. Where a schedule changes the number of kept tokens, the graph takes any number.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split graphs to send gradients early; blocks are small enough as they are
    # Do not merge batch and token dimensions that happen to be equal: a resumed run must compile the same graph.
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
