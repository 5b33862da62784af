"""The checks of one process. A check is a function of (place, *case) that returns its figure.

It raises Failed with a figure that is wrong, or Skip with the reason why it does not apply. Any other exception counts as a failure.
Most checks run on a CPU as well, by the same lines of code with smaller sizes.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import train_latent
from benchmarks.common import device_name, random_inception, write_random_latents
from benchmarks.train import make_training
from dataset.formats import open_latents
from dataset.stream import BatchStream, stream_indices
from fid.embeddings import Inception
from models import LossDraws, TokenMask, build_model, load_autoencoder
from sampling.load import load_checkpoint
from training.checkpoint import CheckpointWriter
from training.loop import TrainState, fit, make_loss
from utils import distributed
from utils.cli import PROJECT_ROOT
from utils.config import load_config, model_arguments, to_yaml
from utils.precision import DTYPES, autocast, compile_options, effective_amp

# On a GPU a block of XL/2's encoder and one of its decoder, with their head sizes 72 and 32; on a CPU the smallest that has all parts.
MODELS = {"cuda": ["model.depth=1", "model.decoder_depth=1"],
          "cpu": ["model.in_size=8", "model.num_classes=10", "model.depth=1", "model.width=32", "model.num_heads=2",
                  "model.decoder_depth=1", "model.decoder_width=32", "model.decoder_num_heads=2"]}
BATCH = {"cuda": 8, "cpu": 4}
PRODUCT = {"cuda": 4096, "cpu": 128}  # size of the matrix products that keep the device busy
LIMITS = {"no": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # of relative errors, beside float32 on the CPU
MODES = ("eager", "compiled")
KERNELS = ("deterministic", "any kernel")
GRADIENT_SCALE = 1024  # keeps the gradients of fp16 above its smallest numbers
NO_FP16 = "a CPU trains in float32 instead of fp16"

CHECKS = []  # (function, what it checks, cases)


class Failed(Exception):
    """The figure of a check that is not what it should be."""


class Skip(Exception):
    """Why a check does not apply here."""


def check(text, *choices, registry=CHECKS):
    """Register a function as a check, once for each combination of the choices."""
    def register(function):
        registry.append((function, text, list(itertools.product(*choices))))
        return function

    return register


class Place:
    """Where checks run: a device and a temporary folder, with stored latents in it."""

    def __init__(self, device, folder):
        self.device, self.folder, self.latents = device, folder, folder / "latents"
        self.batch = BATCH[device.type]
        model = load_config(overrides=MODELS[device.type]).model
        write_random_latents(self.latents, 100, (8, model.in_size, model.in_size), "float16", model.num_classes)

    def config(self, amp, mode, *overrides):
        """Config of a run of six steps with fewer and fewer masked patches."""
        return load_config(overrides=[
            *MODELS[self.device.type], f"data.root={self.latents}", f"train.batchsize={self.batch}", "train.max_num_steps=6",
            f"train.amp={amp}", f"train.compile={mode == 'compiled'}", "train.lr=1e-3", "train.tf32=false", "train.mask_ratio_fn=cosine4",
            f"log.results_dir={self.folder}", "log.exp_name=run", *overrides])

    def training(self, amp, mode):
        """(TrainState, function that does one step on random data)."""
        return make_training(self.config(amp, mode, "train.mask_ratio_fn=constant"), "ours", self.device)


def run_script(*arguments):
    """Run Python with these arguments in a process of its own: (exit code, what it printed)."""
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=PROJECT_ROOT, text=True, timeout=600, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    return process.returncode, process.stdout


def within(limit, found, wanted):
    """The figure of the largest relative error (norm of the difference over norm) of tensors; it must not be above the limit."""
    pairs = [(one.detach().cpu().double(), other.detach().cpu().double()) for one, other in zip(found, wanted, strict=True)]
    error = max((one - other).norm().item() / max(other.norm().item(), 1e-30) for one, other in pairs)
    figure = f"{error:.1e} (at most {limit:g})"
    if not all(one.isfinite().all() for one, _ in pairs) or error > limit:
        raise Failed(figure)
    return figure


def tensors_of(content, name=""):
    """{path: tensor} of nested dicts and lists."""
    if torch.is_tensor(content):
        return {name: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    return {path: tensor for key, value in items for path, tensor in tensors_of(value, f"{name}/{key}").items()}


def copy_of(state):
    """Copies on the CPU of the tensors of a TrainState: weights, EMA, optimizer."""
    return {path: tensor.detach().cpu().clone() for path, tensor in tensors_of(state.state_dict()).items()}


def same_bits(found, wanted, what):
    """The figure of two dicts of tensors that must be equal bit for bit."""
    differing = [path for path in wanted if path not in found or not torch.equal(found[path].cpu(), wanted[path].cpu())]
    if differing or found.keys() != wanted.keys():
        raise Failed(f"{what}: {len(differing)} of {len(wanted)} tensors differ, the first is {differing[:1]}")
    return f"{len(wanted)} tensors are equal"


def digest_of(tensors):
    """16 hex digits that name the bits of some tensors."""
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


# ---- device and numbers

@check("device and software")
def identity(place):
    parts = [device_name(place.device), f"torch {torch.__version__}"]
    if place.device.type == "cuda":
        query = [shutil.which("nvidia-smi") or "true", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"]
        parts += [f"{torch.cuda.device_count()} GPUs", f"driver {driver[0]}", f"CUDA {torch.version.cuda}",
                  f"cuDNN {torch.backends.cudnn.version()}", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]
    return ", ".join(parts)


@check("attention kernel of head size", (72, 64, 32), KERNELS)
def attention_kernel(place, head_size, kernels):
    """In each format: the name of the backward pass tells the kernel."""
    found = []
    with allowed(kernels):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q = torch.randn(2, 4, 128, head_size, device=place.device, dtype=dtype, requires_grad=True)
            named = re.match(r"ScaledDotProduct(\w+?)Attention", F.scaled_dot_product_attention(q, q, q).grad_fn.name())
            found.append(f"{str(dtype).removeprefix('torch.')} {named[1] if named else 'plain products'}")
    return ", ".join(found)


@contextlib.contextmanager
def allowed(kernels):
    """Deterministic kernels only, or any."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(kernels == "deterministic")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def loss_and_gradients(config, share, device):
    """[loss, gradient of each weight] of random weights, on data and draws that are the same for all devices and formats."""
    torch.manual_seed(0)
    net = build_model(**model_arguments(config))
    weights = [p for p in net.parameters() if p.requires_grad]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.02)  # no zeros: they would hide differences
    latents, loss = 0.5 * torch.randn(config.train.batchsize, net.in_channels, net.in_size, net.in_size), make_loss(config.train, net)
    labels = torch.arange(len(latents)) % (net.num_classes + 1)
    ratio = {"masked": 0.5, "unmasked": 0.0, "odd count": 0.5 - 1.5 / net.num_tokens}[share]
    sigma, noise, mask = loss.draw(latents, ratio)
    assert share == "unmasked" or mask.num_keep % 2 == (share == "odd count")
    mask = mask and TokenMask(mask.ids_shuffle.to(device), mask.num_keep)
    net.to(device)
    if config.train.compile:
        net.compile_blocks(**compile_options(config.train))
    with autocast(config.train.amp, device):
        losses = loss(net, latents.to(device), labels.to(device), draws=LossDraws(sigma.to(device), noise.to(device), mask))
    total = sum(loss.weights[name] * values.mean() for name, values in losses.items())
    (GRADIENT_SCALE * total).backward()
    return [total, *(weight.grad / GRADIENT_SCALE for weight in weights)]


@check("loss and gradients against the CPU:", LIMITS, MODES, ("masked", "unmasked", "odd count"))
def numbers(place, amp, mode, share):
    """The largest relative error: of the loss, or of the gradient of any weight."""
    if effective_amp(amp, place.device) != amp:
        raise Skip(NO_FP16)
    if (place.device.type, amp, mode) == ("cpu", "no", "eager"):
        raise Skip("this is what the others are compared with")
    if (mode, share) == ("compiled", "masked"):
        torch.compiler.reset()  # torch keeps 8 graphs of the blocks and runs the rest as it is; a format has 3
    wanted = loss_and_gradients(place.config("no", "eager"), share, torch.device("cpu"))
    return within(LIMITS[amp], loss_and_gradients(place.config(amp, mode), share, place.device), wanted)


@check("autoencoder against float32 on the CPU:", ("bf16", "fp16"))
def autoencoder(place, amp):
    """Moments of images, and images of latents; by the published autoencoder if it is there, else by the demo's."""
    path = "assets/autoencoder_kl.pth" if Path("assets/autoencoder_kl.pth").is_file() else "assets/demo-vae"
    exact = load_autoencoder(path)
    fast = copy.deepcopy(exact).to(place.device, DTYPES[amp])
    images = 2 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    moments = exact.encode_moments(images)
    latents = exact.scale * moments.chunk(2, dim=1)[0]
    found = fast.encode_moments(images.to(place.device)), fast.decode(latents.to(place.device))
    return within(5e-2, found, (moments, exact.decode(latents)))


@check("Inception against the CPU, and twice the same")
def inception(place):
    weights = random_inception(place.folder / "inception.pth")
    images = torch.randint(256, (4, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embedding = Inception(weights, place.device)
    found = embedding.taps(images)
    same_bits(embedding.taps(images), found, "two passes")
    return within(1e-3, found.values(), Inception(weights, "cpu").taps(images).values())


# ---- steps

def train_run(place, config, stop_at=math.inf):
    """The TrainState after the last step of a run, or after `stop_at` steps, when it is asked to stop."""
    dataset = train_latent.open_dataset(config)
    encode, latents = train_latent.make_encode(config, dataset, place.device)
    torch.manual_seed(config.train.seed)
    net = build_model(**model_arguments(config)).to(place.device)
    state = TrainState(net, config, place.device, dataset.class_names, latents)

    class Notice:
        requested = property(lambda self: state.step >= stop_at)

    folder = place.folder / config.log.exp_name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    with contextlib.redirect_stdout(io.StringIO()):
        fit(state, folder, dataset, encode, Notice())
    return state


@check("6 steps twice, and 3 + 3 resumed in another process:", MODES)
def steps(place, mode):
    torch.compiler.reset()
    first, second, resumed = (place.config("bf16", mode, f"log.exp_name={mode}-{name}") for name in ("first", "second", "resumed"))
    wanted = copy_of(train_run(place, first))
    same_bits(copy_of(train_run(place, second)), wanted, "6 steps again")
    train_run(place, resumed, stop_at=3)
    folder = place.folder / resumed.log.exp_name
    code, printed = run_script("train_latent.py", "--config", folder / "config.yaml")
    if code:
        raise Failed(f"the other process ended with code {code}: {printed[-1000:]}")
    return same_bits(tensors_of(load_checkpoint(folder / "checkpoints/0000006.pt")), wanted, "3 + 3 steps")


@check("the host waits for nothing in 5 steps:", ("bf16", "fp16"), MODES)
def waits(place, amp, mode):
    if place.device.type != "cuda":
        raise Skip("a CPU computes at once, so there is nothing to wait for")
    state, step = place.training(amp, mode)
    with BatchStream(open_latents(place.latents), place.batch, seed=0, device=place.device) as batches:
        for _ in range(2):  # they make AdamW's moments, choose kernels and compile
            next(batches)
            step()
        torch.cuda.synchronize(place.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                next(batches)
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "0 waits"


@check("Inf in one gradient skips the step:", ("bf16", "fp16"))
def infinite_gradient(place, amp):
    if effective_amp(amp, place.device) != amp:
        raise Skip(NO_FP16)
    state, step = place.training(amp, "eager")
    for _ in range(10):  # fp16 finds its loss scale
        step()
    before, bad = tensors_of(copy.deepcopy(state.net.state_dict())), state.stepper.bad_steps[1].item()
    weight = state.net.model.x_embedder.proj.weight
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    step()
    hook.remove()
    figure = same_bits(tensors_of(state.net.state_dict()), before, "after the step")
    step()
    if state.stepper.bad_steps.tolist() != [0, bad + 1] or torch.equal(weight, before["/model.x_embedder.proj.weight"]):
        raise Failed(f"the step after it was skipped too: {state.stepper.bad_steps.tolist()} in a row and in all")
    return figure


# ---- data and checkpoints

@check("200 batches of the loader beside a busy device")
def loader(place):
    """Batches are copied while products wait to be computed, and their memory is free again at once."""
    dataset, kept, wrong = open_latents(place.latents), [], 0
    busy = torch.randn(PRODUCT[place.device.type], PRODUCT[place.device.type], device=place.device)
    with BatchStream(dataset, place.batch, seed=0, device=place.device) as batches:
        for samples, labels in itertools.islice(batches, 200):
            busy = (busy @ busy).clamp(-1, 1)
            kept.append((samples.clone(), labels.clone()))
    for number, batch in enumerate(kept):
        stored = dataset.read(stream_indices(len(dataset), 0, number * place.batch, place.batch))
        wrong += not all(torch.equal(found.cpu(), torch.from_numpy(wanted)) for found, wanted in zip(batch, stored))
    if wrong:
        raise Failed(f"{wrong} of {len(kept)} batches differ from what is stored")
    return f"{len(kept)} batches of {place.batch} are what is stored"


@check("a checkpoint whose weights are overwritten while it is written")
def snapshot(place):
    state, step = place.training("bf16", "eager")
    step()
    wanted, writer = copy_of(state), CheckpointWriter(place.folder / "snapshot")
    writer.prepare(state.step, state.nbytes, 1)
    writer.save(state.step, state.state_dict())
    for tensor in tensors_of(state.state_dict()).values():
        tensor.detach().fill_(math.nan)
    if not writer.wait():
        raise Failed("it was not written")
    return same_bits(tensors_of(load_checkpoint(place.folder / f"snapshot/{state.step:07d}.pt")), wanted, "the file")
