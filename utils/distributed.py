"""Process groups: the only file that touches torch.distributed.

One process needs no set-up: every function then does the obvious thing. Control flags travel over gloo (CPU tensors), so
that they never wait for the GPU; gradients and statistics travel over NCCL when the device is a GPU.
"""

import dataclasses
import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.cli import UserError

START_TIMEOUT_S = 600.0  # longest wait for the other processes to start
NOTE_EVERY_S = 1.0  # how often a process tells the others where it is
GRACE_S = 3.0  # survivors of a failure wait this long, so that the process at fault is heard first

_store = None  # where processes leave notes that need no collective: where each one is, who failed
_noted_at = 0.0


def init(timeout_s=1800.0):
    """Join the process group that torchrun or `launch` described in the environment; set this process's GPU.

    timeout_s: seconds that a collective waits for the slowest process before the run ends with an error.
    Raises ConnectionError naming the processes that did not start, ValueError if there is no GPU for this one.
    """
    global _store
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(f"process {local_rank()} of this node has no GPU of its own: {torch.cuda.device_count()} found; "
                            f"start at most {torch.cuda.device_count()} processes per node")
        torch.cuda.set_device(local_rank())
    if "RANK" not in os.environ or dist.is_initialized():
        return
    _store, own_rank, size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=START_TIMEOUT_S)))
    _wait_for_all(own_rank, size)
    limit = datetime.timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        # NCCL ends the process when it times out; gloo, which carries the flags of every step, shall be first to say so
        dist.init_process_group("cpu:gloo,cuda:nccl", store=_store, rank=own_rank, world_size=size, timeout=2 * limit)
    else:
        dist.init_process_group("gloo", store=_store, rank=own_rank, world_size=size, timeout=limit)
    _make_control_group(limit)


def _wait_for_all(own_rank, size):
    """Processes start at different times: wait for each other before collectives and their shorter time-out begin."""
    _store.set(f"here/{own_rank}", "1")
    keys = [f"here/{other}" for other in range(size)]
    try:
        _store.wait(keys, datetime.timedelta(seconds=START_TIMEOUT_S))
    except RuntimeError as error:
        missing = [str(other) for other, key in enumerate(keys) if not _store.check([key])]
        raise UserError(f"process(es) {', '.join(missing)} of {size} did not start within {START_TIMEOUT_S:.0f} s") from error


def shutdown():
    """Leave the process group in good order; harmless when there is none.

    Not for the way out of an error: the others would see their connection closed before the error is told.
    """
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
    dist.all_gather_object(values, value, group=_control)
    return values


def broadcast_object(value):
    """Rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control)
    return values[0]


def any_rank(flag):
    """True on every process if `flag` is true on any of them."""
    return any_of_ranks([flag])[0]


def any_of_ranks(flags):
    """`any_rank` for several flags in one message: list of bools in, list of bools out."""
    if not dist.is_initialized():
        return [bool(flag) for flag in flags]
    votes = torch.tensor([int(bool(flag)) for flag in flags])  # a CPU tensor: gloo, so that the GPU's queue is not waited for
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control)
    return [bool(vote) for vote in votes.tolist()]


def broadcast_module(module):
    """Give every process rank 0's parameters and buffers."""
    if dist.is_initialized():
        for tensor in list(module.parameters()) + list(module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def data_parallel(net, static_graph=False):
    """Wrap `net` in DistributedDataParallel when there are several processes; gradients are then means over them.

    static_graph: every step has one backward pass over the same parameters, so that DDP looks for unused ones only once.
    """
    if world_size() == 1:
        return net
    gpu = [local_rank()] if torch.cuda.is_available() else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=gpu, gradient_as_bucket_view=True, static_graph=static_graph)


_control = None  # the gloo group of flags and pickled objects; None: the default group


def _make_control_group(limit):
    global _control
    if torch.cuda.is_available():
        _control = dist.new_group(backend="gloo", timeout=limit)


# ------------------------------------------------------------------------------------------------ failures

def note_progress(place):
    """Tell the other processes where this one is ("step 12"); at most once in NOTE_EVERY_S."""
    global _noted_at
    now = time.monotonic()
    if _store is not None and now - _noted_at >= NOTE_EVERY_S:
        _noted_at = now
        _store.set(f"seen/{rank()}", f"{time.time():.0f} {place}")


def note_failure(text):
    """Tell the other processes why this one fails. True if no other process has failed with the same words before."""
    if _store is None:
        return True
    try:
        _store.compare_set("failed", "", f"rank {rank()} failed: {text}")
        return _store.add(f"said/{text}", 1) == 1
    except RuntimeError:  # whoever keeps the notes is gone: nobody is left to tell
        return True


def explain_loss(error):
    """If `error` means that another process is gone or silent: which one and why, after giving it time to say so itself; else None."""
    if _store is None or not isinstance(error, RuntimeError) or not _is_lost_connection(error):
        return None
    try:
        _store.set(f"alive/{rank()}", "1")
        time.sleep(GRACE_S)
        if _store.check(["failed"]):
            return f"ended because {_store.get('failed').decode()}"
        silent = [other for other in range(world_size()) if not _store.check([f"alive/{other}"])]
        places = "; ".join(f"rank {other} was last seen {_last_seen(other)}" for other in silent)
    except RuntimeError:
        return "ended because the process that connects all others (rank 0 or the launcher) is gone"
    if not silent:
        return f"ended because a collective failed on every rank: {' '.join(str(error).split())}"
    timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    how = "did not answer within train.timeout_s: it hangs, or its disk or network does" if timed_out else "is gone: killed, or out of memory"
    return f"ended because rank {', '.join(map(str, silent))} {how}; {places}"


def _is_lost_connection(error):
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _last_seen(other):
    if not _store.check([f"seen/{other}"]):
        return "before its first step"
    when, _, place = _store.get(f"seen/{other}").decode().partition(" ")
    return f"at {place}, {time.time() - float(when):.0f} s ago"


# ------------------------------------------------------------------------------------------------ starting workers

def launched():
    """True inside a worker of torchrun or of `launch`."""
    return "RANK" in os.environ


def launch(script, argv, num_processes, num_nodes=1, node_rank=0, master_address="127.0.0.1", master_port=0):
    """Run `script argv` in `num_processes` processes on this node through torch's elastic launcher; return the exit code.

    The first worker that fails ends all of them, and its exit code is returned (128 + the signal if one killed it).
    SIGTERM, SIGINT and SIGUSR1 (SLURM's notice) are passed on to the workers, which end in their own time.
    master_port 0 takes a free port, which only works on one node.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if num_nodes > 1 and not master_port:
        raise UserError("several nodes need --master_port, the same on every node (for example 29500)")
    rendezvous_config = {"rank": node_rank} if num_nodes > 1 else {}
    # Left to torch (before signals_to_handle came), a signal gives the workers 30 s, and their exit code is lost.
    known = {option.name for option in dataclasses.fields(LaunchConfig)}
    own_signals = {"signals_to_handle": "SIGQUIT"} if "signals_to_handle" in known else {}
    config = LaunchConfig(min_nodes=num_nodes, max_nodes=num_nodes, nproc_per_node=num_processes, run_id="maskdit",
                          rdzv_backend="static" if num_nodes > 1 else "c10d", rdzv_endpoint=f"{master_address}:{master_port}",
                          rdzv_configs=rendezvous_config, max_restarts=0, **own_signals)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except ChildFailedError as failure:
        return _worker_exit_code(*failure.get_first_failure())
    except SignalException as received:
        return 128 + received.sigval
    return 0


def _pass_on(number, frame):
    """A notice to stop, for the workers; before there are any it ends the launcher."""
    workers = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    if not workers:
        sys.exit(128 + number)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)


def _worker_exit_code(failed_rank, failure):
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    print(f"error: the process of rank {failed_rank} was ended by {name}" +
          (" (kill -9, or the system was out of memory)" if name == "SIGKILL" else ""), file=sys.stderr, flush=True)
    return 128 - failure.exitcode
