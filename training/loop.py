"""The training loop: one for latents and images, one process and many.

Everything that a step draws is a function of (seed, rank, step), and everything else that a step depends on is in
TrainState, so a run that was stopped anywhere goes on as if it had not been.
"""

import contextlib
import hashlib
import resource
import time
from pathlib import Path

import torch

from models import EDMLoss, drop_labels
from sampling.load import strip_prefixes
from training.checkpoint import CheckpointWriter
from utils import distributed
from utils.cli import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from utils.config import to_dict
from dataset.stream import BatchStream
from training.ema import EMA
from utils.logging import Progress, RunLog, format_seconds
from utils.precision import Stepper, autocast, compile_options, effective_amp, run_uncompiled, use_compile
from training.schedules import learning_rate, mask_ratio

MIN_LOSS_SCALE = 1.0  # below it fp16 gradients vanish instead of overflowing
LOGGED = ("loss", "loss_denoising", "loss_mae", "grad_norm")


class TrainState:
    """What a run is at one moment: weights, their average, optimizer, and how far it has come.

    step, images_seen: optimizer steps and images behind the weights, those of the checkpoint it started from included.
    start_step, start_images: their values when this run began; the schedules count from there.
    """

    def __init__(self, net, config, device, class_names=None):
        train = config.train
        self.net, self.config, self.device, self.class_names = net, config, device, class_names
        self.ema = EMA(net, train.ema_decay, foreach=train.uses("foreach_ema"))
        trainable = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay,
                                           fused=train.uses("fused_adamw"), foreach=False)
        self.stepper = Stepper(self.optimizer, train.amp, device, train.grad_clip, train.max_bad_steps)
        self.step = self.images_seen = self.start_step = self.start_images = 0
        self.log_position = None
        self.sums = torch.zeros(len(LOGGED) + 1, dtype=torch.float64, device=device)  # since the last log line; last: steps

    @property
    def end_step(self):
        return self.start_step + self.config.train.max_num_steps

    @property
    def progress(self):
        """Share of this run's steps that is done, in [0, 1]."""
        return min(1.0, (self.step - self.start_step) / self.config.train.max_num_steps)

    def state_dict(self, log_position=0):
        """The checkpoint: the published keys `model`, `ema`, `opt`, then what an exact resume needs besides. Collective."""
        return {"model": self.net.state_dict(), "ema": self.ema.net.state_dict(), "opt": self.optimizer.state_dict(),
                "step": self.step, "images_seen": self.images_seen,
                "start_step": self.start_step, "start_images": self.start_images,
                "stepper": self.stepper.state_dict(), "log_position": log_position,
                "sums": distributed.all_gather_object(self.sums.tolist()),
                "world_size": distributed.world_size(), "config": to_dict(self.config),
                "class_names": self.class_names and list(self.class_names)}

    def resume(self, checkpoint):
        """Become the run that wrote `checkpoint` (a dict of this class's making)."""
        self.net.load_state_dict(checkpoint["model"])
        self.ema.net.load_state_dict(checkpoint["ema"])
        self._load_optimizer_state(checkpoint["opt"])
        self.stepper.load_state_dict(checkpoint["stepper"])
        self.step, self.images_seen = checkpoint["step"], checkpoint["images_seen"]
        self.start_step, self.start_images = checkpoint["start_step"], checkpoint["start_images"]
        self.log_position = checkpoint["log_position"]
        sums = torch.tensor(checkpoint["sums"], dtype=torch.float64)
        if len(sums) == distributed.world_size():
            self.sums.copy_(sums[distributed.rank()])
        elif distributed.is_main():
            self.sums.copy_(sums.sum(dim=0))

    def load_optimizer(self, checkpoint, path):
        """Take AdamW's moments from a checkpoint, ours or a published one, tensor by tensor under their names.

        An optimizer counts parameters in the order of the state dict; the published one counts the frozen positions too.
        Raises ValueError if the two do not belong together.
        """
        saved = checkpoint["opt"]
        names = [strip_prefixes(name) for name in checkpoint["model"]]
        count = len(saved["param_groups"][0]["params"])
        if count != len(names):
            names = [name for name in names if not name.endswith("pos_embed")]
        own_names = [name for name, p in self.net.named_parameters() if p.requires_grad]
        by_name = {names[i]: state for i, state in saved["state"].items()} if count == len(names) else {}
        own = self.optimizer.state_dict()
        for i, (name, parameter) in enumerate(zip(own_names, self.optimizer.param_groups[0]["params"])):
            if name not in by_name or by_name[name]["exp_avg"].shape != parameter.shape:
                raise UserError(f"checkpoint {path}: its optimizer state has nothing that fits {name} {tuple(parameter.shape)}; "
                                f"to start from its weights only, add --use_strict_load False")
            own["state"][i] = by_name[name]
        self._load_optimizer_state(own)

    def _load_optimizer_state(self, saved):
        """AdamW's moments from a state dict; its settings stay those of the config."""
        self.optimizer.load_state_dict(saved | {"param_groups": self.optimizer.state_dict()["param_groups"]})

    @property
    def amp(self):
        """The number format in use: fp16, bf16 or no."""
        return effective_amp(self.config.train.amp, self.device)

    @property
    def compiled(self):
        """Whether training starts with compiled blocks."""
        return use_compile(self.config.train.compile, self.device)

    @property
    def nbytes(self):
        """Size of a checkpoint in bytes: weights, EMA and AdamW's two moments."""
        return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 2) for p in self.net.parameters())


def step_seed(seed, rank, step):
    """64-bit seed of everything that one rank draws in one step."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_loss(train, net):
    """The loss of a TrainConfig for a bare network."""
    return EDMLoss(train.P_mean, train.P_std, mae_loss_coef=train.mae_loss_coef, patch_size=net.patch_size)


def train_step(state, model, loss, batch, labels, encode, generator):
    """One optimizer step on this process's batch, in grad_accum rounds; returns the mask ratio that was used.

    model: `state.net`, or its DistributedDataParallel wrapper. batch, labels: tensors on the device, (B, ...) and (B,).
    encode(batch, generator) -> latents (b, C, H, W). Losses and gradient norm are added to `state.sums`.
    """
    train, num_classes = state.config.train, state.config.model.num_classes
    generator.manual_seed(step_seed(train.seed, distributed.rank(), state.step))
    ratio = mask_ratio(train, state.progress)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(train, state.images_seen - state.start_images, state.progress)

    _begin_pass(train)
    losses = torch.zeros(3, dtype=torch.float64, device=state.device)
    rounds = list(zip(batch.chunk(train.grad_accum), labels.chunk(train.grad_accum)))
    for i, (part, part_labels) in enumerate(rounds):
        latents = encode(part, generator)
        part_labels = drop_labels(part_labels, num_classes, train.class_dropout_prob, generator) if num_classes else None
        last = i == len(rounds) - 1
        with contextlib.nullcontext() if last or model is state.net else model.no_sync():
            with autocast(train.amp, state.device):
                parts = loss(model, latents, part_labels, ratio, generator)
            denoising, mae = parts["denoising"].mean(), parts["mae"].mean()
            total = sum(loss.weights.get(name, 1.0) * values.mean() for name, values in parts.items())
            state.stepper.backward(total / len(rounds))
        losses += torch.stack([total, denoising, mae]).detach() / len(rounds)

    norm = state.stepper.step()
    state.ema.update()
    seen = torch.cat([losses, norm.double()[None], torch.ones_like(losses[:1])])
    state.sums += torch.where(torch.isfinite(norm), seen, 0.0)  # a skipped step is counted apart, not averaged in
    state.step += 1
    state.images_seen += len(batch) * distributed.world_size()
    return ratio


def fit(state, folder, dataset, encode, notice, sample_grid=None, evaluate=None):
    """Train until `state.end_step`; returns 0, or EXIT_STOPPED after a signal (saved, ready to be continued).

    folder: the experiment folder. dataset: see dataset.stream. encode: see train_step. notice: see utils.cli.StopNotice.
    sample_grid(net, step) -> (H, W, 3) uint8 picture or None, called on rank 0; evaluate(net, step) -> dict of numbers, called on
    all ranks; both get the EMA network and must leave the global random state alone.
    Raises ValueError when too many steps in a row have NaN or Inf gradients, and what the data set raises on bad data
    (after the weights are saved); OSError when checkpoints cannot be written, before the first step.
    """
    config, folder = state.config, Path(folder)
    log_config = config.log
    writer = None
    if distributed.is_main():
        writer = CheckpointWriter(folder / "checkpoints", log_config.keep_last, log_config.keep_every)
        writer.prepare(state.step, state.nbytes, -(-(state.end_step - state.step) // log_config.ckpt_every))
    distributed.barrier()
    log = RunLog(folder, state.log_position, log_config.tensorboard, log_config.wandb, to_dict(config))
    run = _Run(state, folder, log, writer, sample_grid, evaluate)
    stream = BatchStream(dataset, config.train.batchsize, config.train.seed, distributed.rank(), distributed.world_size(),
                         start=state.images_seen, device=state.device, num_workers=config.data.num_workers,
                         prefetch=2 if config.train.uses("read_ahead") else 0)
    try:
        with stream:
            return run.loop(iter(stream), encode, notice)
    finally:
        if writer is not None:
            writer.wait()  # whatever happened: nobody else may write here before this is on disk
        log.close()


class _Run:
    """The moving parts of `fit` that its steps share."""

    def __init__(self, state, folder, log, writer, sample_grid, evaluate):
        self.state, self.folder, self.log, self.writer = state, folder, log, writer
        self.sample_grid, self.evaluate = sample_grid, evaluate
        self.saved_step = state.step  # what the run starts from is on disk already, or the same command makes it again
        self.bad_steps_told = int(state.stepper.bad_steps[1])

    def loop(self, batches, encode, notice):
        state, train = self.state, self.state.config.train
        loss = make_loss(train, state.net)
        generator = torch.Generator(state.device)
        if state.compiled:
            self._compile(loss)
        model = distributed.data_parallel(state.net, static_graph=train.grad_accum == 1)
        if model is not state.net:
            # DDP lays its buckets out anew after the first pass, and the sums of three or more processes depend on the layout
            _rehearse(state, model, loss)
        check_every = min(self.state.config.log.log_every, train.max_bad_steps)
        self.clock_step, self.clock_started = state.step, time.monotonic()
        with Progress(state.end_step, "train", "step", initial=state.step, every_s=None) as progress:
            while state.step < state.end_step:
                batch, error = _next_or_error(batches)
                stop, failed = distributed.any_of_ranks([notice.requested, error is not None])
                if stop or failed:
                    return self._end_early(error, failed)
                ratio = train_step(state, model, loss, *batch, encode, generator)
                distributed.note_progress(f"step {state.step}")
                if state.step % check_every == 0 or state.step == state.end_step:
                    self._check_bad_steps()
                self._report(ratio)
                progress.update()
        self._save()
        return 0 if self._written() else 1

    def _compile(self, loss):
        """Compile the blocks, which happens when they first run; with train.compile=auto do without where the compiler fails."""
        state, failure = self.state, None
        state.net.compile_blocks(**compile_options(state.config.train))
        try:
            _rehearse(state, state.net, loss)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind; one that is not the compiler's comes again in the first step
            if state.config.train.compile != "auto":
                raise
            failure = " ".join(str(error).split("\n")[:2])  # which backend, and what it raised; then come pages
        failures = [text for text in distributed.all_gather_object(failure) if text is not None]
        if failures:
            run_uncompiled()
            state.optimizer.zero_grad(set_to_none=True)
            self.log.say(f"going on without compiled blocks, because torch.compile failed ({failures[0]}); train.compile=true shows all of it")

    def _end_early(self, error, failed):
        self._save()
        written = self._written()
        if error is not None:
            raise error
        if failed:
            return EXIT_USER_ERROR  # the rank that failed says why
        self.log.say(f"stopped at step {self.state.step} as asked; the same command goes on from there")
        return EXIT_STOPPED if written else 1

    def _report(self, ratio):
        """What is due after this step, in an order that a resume repeats: evaluation, log line, grid, then the checkpoint."""
        state, due = self.state, self.state.config.log
        last = state.step == state.end_step
        values = {}
        if state.step % due.log_every == 0 or last:
            values |= self._averages(ratio)
            self.log.say(self._line(values))
        paused = time.monotonic()
        every = state.config.eval.every
        if self.evaluate is not None and every and (state.step % every == 0 or last):
            values |= self.evaluate(state.ema.net, state.step)
        if values:
            self.log.metrics(state.step, values)
        if self.sample_grid is not None and due.sample_every and (state.step % due.sample_every == 0 or last):
            self._draw_grid()
        if state.step % due.ckpt_every == 0 and not last:
            self._save()
        self.clock_started += time.monotonic() - paused  # the rate is that of training alone

    def _averages(self, ratio):
        state = self.state
        sums = distributed.all_reduce_sum(state.sums.clone()).tolist()
        state.sums.zero_()
        steps = max(sums[-1], 1.0)
        now = time.monotonic()
        rate = (state.step - self.clock_step) * state.config.train.batchsize * distributed.world_size() / (now - self.clock_started)
        self.clock_step, self.clock_started = state.step, now
        values = {"images": state.images_seen} | {name: total / steps for name, total in zip(LOGGED, sums)}
        values |= {"lr": state.optimizer.param_groups[0]["lr"], "mask_ratio": ratio, "bad_steps": int(state.stepper.bad_steps[1])}
        if state.stepper.scaler.is_enabled():
            values["loss_scale"] = state.stepper.scaler.get_scale()
        return values | {"images_per_s": rate, "peak_memory_gb": _peak_memory_gb(state.device)}

    def _line(self, values):
        state = self.state
        images_left = (state.end_step - state.step) * state.config.train.batchsize * distributed.world_size()
        return (f"step {state.step}/{state.end_step}: loss {values['loss']:.4f} (denoising {values['loss_denoising']:.4f}, "
                f"mae {values['loss_mae']:.4f}), grad norm {values['grad_norm']:.3f}, lr {values['lr']:.2e}, "
                f"masked {values['mask_ratio']:.0%}, {values['images_per_s']:.0f} img/s, {values['peak_memory_gb']:.2f} GB, "
                f"{format_seconds(images_left / values['images_per_s'])} left")

    def _draw_grid(self):
        if distributed.is_main():
            picture = self.sample_grid(self.state.ema.net, self.state.step)
            self.log.picture(self.state.step, "samples", picture)
        distributed.barrier()

    def _check_bad_steps(self):
        """Warn of skipped steps; end the run when there were too many in a row, or when fp16's loss scale has collapsed."""
        state, limit = self.state, self.state.config.train.max_bad_steps
        in_a_row, total = state.stepper.bad_steps.tolist()
        scale = state.stepper.scaler.get_scale() if state.stepper.scaler.is_enabled() else None
        scale_text = "" if scale is None else f", loss scale {scale:g}"
        if in_a_row > limit:
            first = state.step - in_a_row + 1
            self._give_up(f"steps {first} to {first + limit} all had NaN or Inf losses or gradients{scale_text}")
        if scale is not None and scale < MIN_LOSS_SCALE:
            self._give_up(f"fp16's loss scale has fallen to {scale:g} by step {state.step}, after {total} skipped steps")
        if total > self.bad_steps_told:
            self.log.say(f"WARNING: {total - self.bad_steps_told} steps up to step {state.step} had NaN or Inf losses or gradients "
                         f"and were skipped ({total} in all{scale_text})")
            self.bad_steps_told = total

    def _give_up(self, what):
        newest = self.writer.newest() if self.writer is not None else None
        newest = distributed.broadcast_object(newest)
        raise UserError(f"{what}. Last good checkpoint: {newest or 'none yet'}. "
                        f"Try a lower train.lr, train.grad_clip=1, or train.amp=bf16 (or no)")

    def _save(self):
        """Start writing a checkpoint of this step, unless it is there already."""
        if self.saved_step == self.state.step:
            return
        content = self.state.state_dict(self.log.position)
        if self.writer is not None:
            self.writer.save(self.state.step, content)
        self.saved_step = self.state.step

    def _written(self):
        """Wait for the background writer; True on all ranks if the last checkpoint is on disk."""
        failed = self.writer is not None and not self.writer.wait()
        return not distributed.any_rank(failed)


def _rehearse(state, model, loss):
    """Run one pass on zeros and throw its gradients away.

    What is settled in the first pass (DDP's buckets, kernels compiled for the first shapes) is then the same in a new run and
    in a resumed one: no step depends on where the run was started.
    """
    net, train = state.net, state.config.train
    _begin_pass(train)
    latents = torch.zeros(train.batchsize // train.grad_accum, net.in_channels, net.in_size, net.in_size, device=state.device)
    labels = torch.zeros(len(latents), dtype=torch.int64, device=state.device) if net.num_classes else None
    with autocast(train.amp, state.device):
        parts = loss(model, latents, labels, train.mask_ratio, torch.Generator(state.device).manual_seed(0))
    sum(values.sum() for values in parts.values()).backward()
    state.optimizer.zero_grad(set_to_none=True)


def _begin_pass(train):
    if train.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # what the graphs put out in the last pass may be overwritten, nothing sooner


def _next_or_error(batches):
    """(next batch, None), or (None, error) when the data went bad: the ranks must agree before anyone leaves."""
    try:
        return next(batches), None
    except (OSError, ValueError) as error:
        return None, error


def _peak_memory_gb(device):
    """Most memory in use so far: GPU memory, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
