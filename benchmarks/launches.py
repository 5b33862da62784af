"""Kernels that a training step launches on a GPU, counted without one: it is the real step, on tensors that have shapes but no contents.

    python -m benchmarks.estimate --launches --config configs/train/maskdit-latent-imagenet.yaml train.batchsize=32

Eager, every operation that torch sends to the GPU is a launch; views are none. Compiled, inductor writes the Triton kernels of the blocks
for an H100, as in training. They do not run, but their calls are counted beside torch's operations. The backward pass of attention is four
launches (flash, deterministic); an operation on a list of tensors is as many as torch splits it into. What cuBLAS adds, the drawing of
latents and the exchange between GPUs are not in it. Counted with torch 2.14; for other releases the stand-ins may not fit.
"""

import collections
import contextlib
import heapq
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import build_model
from training.loop import TrainState, make_loss, train_step
from utils.config import model_arguments
from utils.precision import compile_options

COLUMNS = ("blocks", "launches", "matrix products", "attention", "casts", "optimizer, EMA, norm", "other")
HOST_ONLY = ("detach", "empty", "new_empty", "_unsafe_view")
LISTS = ("_foreach", "_fused_adam")  # operations on lists of tensors
MOST_BLOCKS = 2240 if (torch.version.cuda or "13") >= "13" else 320  # of 65,536 numbers, in one launch over a list of tensors
H100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32,
                       regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
                       shared_memory_per_block_optin=232448)


class Counter(FakeTensorMode):
    """Makes tensors without contents; launches: how often by the name of what is launched."""

    def __init__(self):
        super().__init__()
        self.launches, self.nested = collections.Counter(), False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outermost, self.nested = not self.nested, True  # not the operations that an operation is made of
        if outermost:
            self.launches[operation._schema.name.removeprefix("aten::")] += launches_of(operation, args)
        try:
            return super().__torch_dispatch__(operation, types, args, kwargs)
        finally:
            self.nested = not outermost

    def __deepcopy__(self, memo):
        return self  # the copy of a tensor belongs to the same counter


def launches_of(operation, args):
    name, returns = operation._schema.name.removeprefix("aten::"), operation._schema.returns
    views = returns and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    if views or name.startswith(HOST_ONLY) or "::" in name:
        return 0
    if name.startswith(LISTS):
        return -(-sum(-(-tensor.numel() // 65536) for tensor in args[0]) // MOST_BLOCKS) + (name == "_foreach_norm")
    return 4 if name == "_scaled_dot_product_flash_attention_backward" else 1


def run_backward(outputs, gradients, keep_graph, create_graph, inputs=(), allow_unreachable=True, accumulate_grad=False):
    """torch's backward pass in Python. Its own engine asks for the GPU that the tensors say they are on."""
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in inputs]
    goals, found, arrived, queue = {edge.node for edge in edges}, {}, {}, []

    def send(node, index, gradient):
        if node is None or gradient is None:
            return
        if not isinstance(node, torch.autograd.function.BackwardCFunction):
            wanted = node._input_metadata[index]
            if gradient.shape != tuple(wanted.shape):
                gradient = gradient.sum_to_size(wanted.shape)
            gradient = gradient.to(wanted.dtype)
        if node not in arrived:
            arrived[node] = {}
            heapq.heappush(queue, (-node._sequence_nr(), id(node), node))  # what was computed last comes first
        arrived[node][index] = arrived[node][index] + gradient if index in arrived[node] else gradient

    with torch.set_grad_enabled(create_graph):
        for output, gradient in zip(outputs, gradients):
            edge = torch.autograd.graph.get_gradient_edge(output)
            send(edge.node, edge.output_nr, torch.ones_like(output) if gradient is None else gradient)
        while queue:
            node = heapq.heappop(queue)[2]
            slots = arrived.pop(node)
            if node in goals:
                found |= {(node, index): gradient for index, gradient in slots.items()}
            elif hasattr(node, "variable"):  # a weight
                node.variable.grad = slots[0] if node.variable.grad is None else node.variable.grad + slots[0]
            else:
                results = getattr(node, "apply", node)(*[slots.get(index) for index in range(len(node._input_metadata))])
                for (following, index), result in zip(node.next_functions, results if isinstance(results, tuple) else (results,)):
                    send(following, index, result)
    return tuple(found.get((edge.node, edge.output_nr)) for edge in edges)


@contextlib.contextmanager
def pretend_gpu(counter):
    """Torch and inductor believe in an H100; what they would launch there is counted."""
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.runtime.hints import DeviceProperties

    def kernel(self, name, source, **options):
        return SimpleNamespace(run=lambda *args, **kwargs: counter.launches.update([name]))

    known = {name: value for name, value in vars(H100).items() if name in DeviceProperties._fields}
    hints = DeviceProperties(type="cuda", index=0, cc=90, **known)
    stand_ins = {
        "models.layers.attention": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
        "torch.autograd._engine_run_backward": run_backward, "torch.autograd.graph._engine_run_backward": run_backward,
        "torch._C._current_graph_task_id": lambda: 0,  # activation checkpointing: one backward pass recomputes once
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.set_device": lambda index: None, "torch.cuda._DeviceGuard": lambda index: contextlib.nullcontext(),
        "torch._C._cuda_getCurrentRawStream": lambda index: 0,
        "torch._C._dynamo.guards._empty_strided_cuda":
            lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda"),
        "torch._C._dynamo.guards._reinterpret_tensor":
            lambda tensor, size, stride, offset=0: tensor.as_strided(size, stride, tensor.storage_offset() + offset),
        "torch.utils._triton.triton_hash_with_backend": lambda: "", "torch._inductor.scheduler.has_triton": lambda *args: True,
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda device: hints,
        "torch._inductor.async_compile.AsyncCompile.triton": kernel,
        "torch._inductor.async_compile.AsyncCompile.wait": lambda self, scope: None,
    }
    for place in ("torch.cuda", "torch._dynamo.device_interface.CudaInterface"):
        stand_ins |= {f"{place}.get_device_properties": lambda *args: H100, f"{place}.current_device": lambda: 0,
                      f"{place}.is_bf16_supported": lambda *args, **options: True}
    stand_ins["torch._dynamo.device_interface.CudaInterface.get_compute_capability"] = lambda *args: 90
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(config.patch(force_disable_caches=True, joint_graph_constant_folding=False))  # folding would compute on the GPU
        stack.enter_context(autograd_config.patch(donated_buffer=False))  # only torch's own backward pass can give them away
        stack.enter_context(counter)
        yield


def count(config, compiled=False):
    """Launches of a training step by name: a collections.Counter."""
    torch.compiler.reset()
    counter, device, train, model = Counter(), torch.device("cuda"), config.train, config.model
    with pretend_gpu(counter):
        with device:
            net = build_model(**model_arguments(config))
            latents = torch.empty(train.batchsize, model.in_channels, model.in_size, model.in_size)
            labels = torch.empty(train.batchsize, dtype=torch.int64) if model.num_classes else None
        if compiled:
            net.compile_blocks(**compile_options(train) | {"dynamic": False})  # a schedule is counted at its first mask ratio
        state, loss = TrainState(net, config, device), make_loss(train, net)
        for _ in range(2):  # the first step compiles, and makes AdamW's moments
            counter.launches.clear()
            train_step(state, net, loss, latents, labels, lambda batch, generator: batch, torch.Generator())
    torch.compiler.reset()
    return counter.launches


def table_row(name, launches):
    """What is launched, in groups by name; inductor's kernels that only cast are called triton_poi_fused__to_copy_NUMBER."""
    row = dict.fromkeys(COLUMNS[1:], 0)
    for kernel, number in launches.items():
        group = ("matrix products" if "mm" in kernel else "attention" if "dot_product" in kernel else
                 "casts" if kernel.rstrip("0123456789").strip("_").removeprefix("triton_poi_fused__") == "to_copy" else
                 "optimizer, EMA, norm" if kernel.startswith(LISTS) else "other")
        row[group] += number
        row["launches"] += number
    return {"blocks": name} | row
