"""Several processes: the only file that touches torch.distributed.

With one process nothing needs to be set up, and every function does what is right for one. Flags and Python objects travel over gloo
(CPU tensors), so that they do not wait for the GPU; gradients and statistics travel over NCCL where there are GPUs.
"""

import datetime
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.cli import UserError

GRACE_S = 3.0  # after a failure the other processes wait this long, so that the one at fault speaks first
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe")  # words of errors that mean: another process is gone

_store = None  # keeps notes that every process can read without a collective: where each one is, who failed
_control = None  # the gloo group for flags and Python objects; None: the default group


def init(timeout_s=1800.0):
    """Join the processes that torchrun or `launch` started with this one; take this process's GPU.

    timeout_s: how long a collective waits for the slowest process. Raises UserError, on every process of a node, if it has fewer GPUs.
    """
    global _store, _control
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, to which torch prefers the one that every version reads
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches of many sizes leave no gaps
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank() + 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes on {socket.gethostname()}, which has {gpus} GPU(s); start at most {gpus} there")
        torch.cuda.set_device(local_rank())
    if "RANK" not in os.environ or dist.is_initialized():
        return
    limit = datetime.timedelta(seconds=timeout_s)
    _store, own_rank, size = next(rendezvous("env://"))
    if torch.cuda.is_available():
        # A time-out of NCCL kills the process. Gloo carries the flags of every step: with half the time it raises an error first.
        dist.init_process_group("cpu:gloo,cuda:nccl", store=_store, rank=own_rank, world_size=size, timeout=2 * limit)
        _control = dist.new_group(backend="gloo", timeout=limit)
    else:
        dist.init_process_group("gloo", store=_store, rank=own_rank, world_size=size, timeout=limit)
    note_progress("its start")


def shutdown():
    """Leave the other processes after a good run. (After an error they still need the connection, to read what went wrong.)"""
    global _store, _control
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
    _store = _control = None


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
    any_of_ranks([False])


def all_reduce_sum(tensor):
    """Sum `tensor` over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value):
    """[value of rank 0, value of rank 1, ...] on every process. Values are pickled."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_control)
    return values


def broadcast_object(value):
    """Rank 0's value on every process."""
    return all_gather_object(value if is_main() else None)[0]


def any_of_ranks(flags):
    """A list of bools, the same on every process: for each flag, whether it is true on any of them."""
    votes = torch.tensor(flags, dtype=torch.int32)  # on the CPU, so that gloo sends it
    if dist.is_initialized():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control)
    return votes.bool().tolist()


def share(owners):
    """Give every process the tensors that others have, in place. owners: {tensor: rank of the process that has it}."""
    for owner in sorted(set(owners.values())) if world_size() > 1 else ():
        theirs = [tensor.detach() for tensor, holder in owners.items() if holder == owner]
        joined = torch.cat([tensor.flatten() for tensor in theirs])  # one message, not one for each
        dist.broadcast(joined, src=owner)
        parts = joined.split([tensor.numel() for tensor in theirs])
        torch._foreach_copy_(theirs, [part.view_as(tensor) for part, tensor in zip(parts, theirs)])


def collect(tensors):
    """The {key: tensor} of all processes in one dict on rank 0, those of others on its CPU. One by one: that takes little memory."""
    found, kinds = dict(tensors), {key: (value.shape, value.dtype, value.device.type) for key, value in tensors.items()}
    for owner, theirs in enumerate(all_gather_object(kinds)):
        for key, (shape, dtype, device_type) in theirs.items():
            value = tensors[key] if owner == rank() else torch.empty(shape, dtype=dtype, device=device_type)
            dist.broadcast(value, src=owner)
            if is_main() and owner:
                found[key] = value.cpu()
    return found


def data_parallel(net, static_graph=False):
    """Give all processes rank 0's weights, and means of their gradients.

    static_graph: each step has one backward pass, always over the same parameters.
    """
    if world_size() == 1:
        return net
    gpu = [local_rank()] if torch.cuda.is_available() else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=gpu, gradient_as_bucket_view=True, static_graph=static_graph)


# ------------------------------------------------------------------------------------------------ failures

def note_progress(place):
    """Note for the other processes where this one is ("step 12")."""
    if _store is not None:
        _store.set(f"seen/{rank()}", f"{place} ({time.strftime('%X')})")


def note_failure(text):
    """Note for the other processes why this one fails. True if no process has failed with the same words before."""
    if _store is None:
        return True
    try:
        _store.compare_set("failed", "", f"rank {rank()} failed: {text}")
        return _store.add(f"said/{text}", 1) == 1
    except RuntimeError:  # the process that keeps the notes is gone, and with it everybody who could read them
        return True


def explain_loss(error):
    """One line that says which other process failed or is silent, if that is what `error` comes from; else None."""
    text = str(error).lower()
    if _store is None or not isinstance(error, RuntimeError) or not any(word in text for word in LOST):
        return None
    try:
        _store.set(f"alive/{rank()}", "1")
        time.sleep(GRACE_S)
        if _store.check(["failed"]):
            return f"ended because {_store.get('failed').decode()}"
        silent = [other for other in range(world_size()) if not _store.check([f"alive/{other}"])]
        seen = [f"rank {other} does not answer; it was last seen at {_store.get(f'seen/{other}').decode()}" for other in silent]
    except RuntimeError:
        return "ended because the process that connects all others (rank 0 or the launcher) is gone"
    if not silent:
        return f"ended because a collective failed on every rank: {' '.join(text.split())}"
    return f"ended because {'; '.join(seen)}. It was killed, is out of memory, or hung for train.timeout_s"


# ------------------------------------------------------------------------------------------------ starting processes

def launch(script, argv, num_processes):
    """Run `script argv` in `num_processes` processes on this machine, as torchrun does; returns the exit code.

    Returns None if num_processes is None or this process is one that was started. The first process that fails ends all of them, and
    its exit code is returned (128 + the signal if one killed it). SIGTERM, SIGINT, SIGHUP and SIGUSR1 (SLURM's notice) reach the
    processes as SIGTERM, and they end in their own time.
    """
    if num_processes is None or "RANK" in os.environ:
        return None
    if not 1 <= num_processes <= 4096:
        raise UserError(f"--num_process_per_node {num_processes}: wanted 1 to 4096")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]  # on a free port
    arguments = torchrun.parse_args([*meet, f"--nproc-per-node={num_processes}", str(script), *argv])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.disable(logging.ERROR)  # torchrun's red lines: the process that failed has said why, or we do below
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _pass_on)
    try:
        with ThreadPoolExecutor(1) as thread:  # in the main thread torchrun handles signals itself, and kills the processes after 30 s
            thread.submit(torchrun.run, arguments).result()
    except ChildFailedError as error:
        failed_rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"error: the process of rank {failed_rank} was ended by {failure.signal_name()} (SIGKILL: perhaps out of memory)",
              file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _pass_on(number, frame):
    """Ask the processes to stop; before there are any, end the launcher."""
    children = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    if not children:
        os._exit(128 + number)
    for pid in children:
        os.kill(pid, signal.SIGTERM)
