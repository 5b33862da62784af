"""The checks of several processes, and of speed."""

import functools
import gc
import json
import statistics

import torch

from benchmarks import estimate, train
from benchmarks.gpu_check.checks import KERNELS, Failed, Skip, allowed, check, digest_of, run_script, train_run
from benchmarks.common import alternate, device_name
from utils import distributed
from utils.cli import EXIT_USER_ERROR

NUMBERS = {"cuda": 2**24, "cpu": 2**16}  # summed over processes
SPEED = ["--size", "XL/2", "--rounds", "10"]
LOWEST_UTILISATION = 0.23  # of the GPU's peak: what the slowest of the paper's own runs reached
RANK_CHECKS, SPEED_CHECKS = [], []


@check("one process more than there are GPUs is named")
def surplus_process(place):
    if place.device.type != "cuda":
        raise Skip("there is no GPU to have one too few of")
    number = torch.cuda.device_count() + 1
    code, printed = run_script("train_latent.py", "--config", "configs/train/maskdit-latent-imagenet.yaml", "data.root=nowhere",
                               "--num_process_per_node", number)
    if code != EXIT_USER_ERROR or f"{number} processes" not in printed:
        raise Failed(f"exit code {code}: {printed[-300:]}")
    return printed.strip().splitlines()[-1]


@check("20 sums of the same numbers over all processes", registry=RANK_CHECKS)
def all_reduce(place):
    values = torch.randn(NUMBERS[place.device.type], generator=torch.Generator().manual_seed(distributed.rank())).to(place.device)
    digests = {digest_of([distributed.all_reduce_sum(values.clone())]) for _ in range(20)}
    return one_digest(digests)


@check("weights of all ranks after 3 steps, twice and with train.shard", registry=RANK_CHECKS)
def ranks(place):
    configs = (place.config("bf16", "eager", "train.max_num_steps=3", f"log.exp_name={name}", f"train.shard={name == 'sharded'}")
               for name in ("first", "second", "sharded"))
    return one_digest({digest_of(train_run(place, config).net.parameters()) for config in configs})


def one_digest(digests):
    """The figure of results that must have the same bits, here and on all ranks."""
    digests = set().union(*distributed.all_gather_object(digests))
    if len(digests) > 1:
        raise Failed(f"{len(digests)} different results")
    return f"the same bits on {distributed.world_size()} processes"


@functools.cache
def rank_rows(place):
    """{text: row} of RANK_CHECKS, run by torchrun on all GPUs, or on two processes of a CPU."""
    number = torch.cuda.device_count() if place.device.type == "cuda" else 2
    if number < 2:
        raise Skip("two processes need two GPUs")
    path = place.folder / "ranks.json"
    code, printed = run_script("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m", "benchmarks.gpu_check",
                               "--json", path)
    if not path.is_file():
        raise Failed(f"torchrun ended with code {code}: {printed[-1000:]}")
    return {row["check"]: row for row in json.loads(path.read_text())["rows"]}


@check("on several processes:", [text for _, text, _ in RANK_CHECKS])
def several_processes(place, text):
    row = rank_rows(place)[text]
    if row["status"] == "FAIL":
        raise Failed(row["figure"])
    return row["figure"]


@check("training speed of XL/2:", ("ours", "compiled", "unmasked", "dit"), (32, 128), KERNELS, registry=SPEED_CHECKS)
def speed(place, arm, batch, kernels):
    """Images per second of an arm of benchmarks/train.py beside the estimate."""
    gpu = next((name for name in estimate.GPUS if name in device_name(place.device).lower()), None)
    if gpu is None:
        raise Skip("there is no estimate for this device")
    args = train.parse_arguments([*SPEED, "--batchsize", str(batch)])
    args.set = [*args.set, f"train.compile={arm != 'ours'}"]
    config = train.arm_config(args, arm)
    gc.collect()  # the network of the last case refers to itself, and this case may need its memory
    torch.compiler.reset()
    try:
        with allowed(kernels):
            seconds = alternate({arm: train.make_arm(config, arm, place.device)}, args, place.device)[arm]["seconds"]
    except torch.OutOfMemoryError as error:
        raise Skip(f"it does not fit: {error}") from error
    found = batch / statistics.median(seconds)
    wanted = estimate.run_row(config.train, estimate.count(config), gpu, 1, estimate.UTILISATION, price=0)["img/s per GPU"]
    figure = f"{found:.0f} images/s, {found / wanted:.2f} of the estimate"
    if found / wanted * estimate.UTILISATION < LOWEST_UTILISATION:
        raise Failed(figure)
    return figure
