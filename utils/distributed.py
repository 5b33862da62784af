"""Process groups: the only file that touches torch.distributed.

One process needs no set-up: every function then does the obvious thing. Control flags travel over gloo (CPU tensors), so
that they never wait for the GPU; gradients and statistics travel over NCCL when the device is a GPU.
"""

import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist


def init(timeout_s=1800.0):
    """Join the process group that torchrun or `launch` described in the environment; set this process's GPU.

    timeout_s: seconds that a collective waits for the slowest process before the run ends with an error.
    Raises RuntimeError if the other processes cannot be reached.
    """
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank()} of this node has no GPU of its own: {torch.cuda.device_count()} found; "
                             f"start at most {torch.cuda.device_count()} processes per node")
        torch.cuda.set_device(local_rank())
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def shutdown():
    """Leave the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Index of this process on its node, which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main():
    return rank() == 0


def device():
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier():
    """Wait for all processes."""
    any_rank(False)


def all_reduce_sum(tensor):
    """Sum `tensor` over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value):
    """[value of rank 0, value of rank 1, ...] on every process; values are pickled, so only between our own processes."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_control_group())
    return values


def broadcast_object(value):
    """Rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control_group())
    return values[0]


def any_rank(flag):
    """True on every process if `flag` is true on any of them."""
    return any_of_ranks([flag])[0]


def any_of_ranks(flags):
    """`any_rank` for several flags in one message: list of bools in, list of bools out."""
    if not dist.is_initialized():
        return [bool(flag) for flag in flags]
    votes = torch.tensor([int(bool(flag)) for flag in flags])  # a CPU tensor: gloo, so that the GPU's queue is not waited for
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def broadcast_module(module):
    """Give every process rank 0's parameters and buffers."""
    if dist.is_initialized():
        for tensor in list(module.parameters()) + list(module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def data_parallel(net):
    """Wrap `net` in DistributedDataParallel when there are several processes; gradients are then means over them."""
    if world_size() == 1:
        return net
    gpu = [local_rank()] if torch.cuda.is_available() else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=gpu, gradient_as_bucket_view=True)


_control = None


def _control_group():
    """A gloo group for pickled objects (NCCL would carry them over the GPU)."""
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo") if torch.cuda.is_available() else dist.group.WORLD
    return _control


def launched():
    """True inside a worker of torchrun or of `launch`."""
    return "RANK" in os.environ


def launch(script, argv, num_processes, num_nodes=1, node_rank=0, master_address="127.0.0.1", master_port=0):
    """Run `script argv` in `num_processes` processes on this node through torch's elastic launcher; return the exit code.

    The first worker that fails ends all of them, and its exit code is returned. A signal sent to the launcher reaches
    every worker; when all of them end in good order, their common exit code is returned.
    master_port 0 takes a free port, which only works on one node.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if num_nodes > 1 and not master_port:
        raise ValueError("several nodes need --master_port, the same on every node (for example 29500)")
    rendezvous = {"rank": node_rank} if num_nodes > 1 else {}
    config = LaunchConfig(min_nodes=num_nodes, max_nodes=num_nodes, nproc_per_node=num_processes, run_id="maskdit",
                          rdzv_backend="static" if num_nodes > 1 else "c10d",
                          rdzv_endpoint=f"{master_address}:{master_port}", rdzv_configs=rendezvous, max_restarts=0)
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # SLURM's notice, passed on to the workers
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except ChildFailedError as failure:
        return failure.get_first_failure()[1].exitcode
    except SignalException as received:
        return 128 + received.sigval
    return 0
