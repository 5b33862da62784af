"""The training loop: one for latents and images, for one process and many.

Everything that a step draws is a function of (seed, rank, step). Everything else that a step depends on is in TrainState.
So a run that was stopped anywhere goes on as if it had not been stopped.
"""

import contextlib
import hashlib
import resource
import time
from pathlib import Path

import torch

from dataset.stream import BatchStream
from models import LOSSES, drop_labels
from models.masking import count_kept
from training.checkpoint import CheckpointWriter
from training.ema import EMA
from training.optim import STEADIER, Stepper, learning_rate, load_optimizer_state, make_optimizer, mask_ratio
from training.shard import divide, gather, share_steps
from utils import distributed
from utils.cli import EXIT_BAD, EXIT_OTHER_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from utils.config import to_dict
from utils.logging import Progress, RunLog
from utils.precision import autocast, compile_options, effective_amp, use_compile


class TrainState:
    """What a run is at one moment: weights, their average, optimizer, and how far it has come.

    step, images_seen: behind the weights, those of the checkpoint that the run started from included. start_step, start_images: their
    values when this run began; the schedules count from there. sums: of what `measured` names, over the good steps since the last log
    line. latents: the description of what the run is trained on, {"scale": ..., "shift": ..., "vae": digest or ""}.
    """

    def __init__(self, net, config, device, class_names=None, latents=None):
        train = config.train
        self.net, self.config, self.device, self.class_names, self.latents = net, config, device, class_names, latents or {}
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.owners = divide(net, self.world_size) if train.shard and self.world_size > 1 else {}
        self.ema = EMA(net, train.ema_decay, self.owners)
        self.optimizer = make_optimizer(net, train)
        if self.owners:
            share_steps(self.optimizer, self.owners)
        self.stepper = Stepper(self.optimizer, train.amp, device, train.grad_clip, train.max_bad_steps)
        self.amp, self.autocast = effective_amp(train.amp, device), autocast(train.amp, device)
        self.compiled = use_compile(train.compile, device)
        self.step = self.images_seen = self.start_step = self.start_images = 0
        self.measured, self.sums = [], torch.zeros(0, dtype=torch.float64, device=device)
        self.log_position = None

    @property
    def end_step(self):
        return self.start_step + self.config.train.max_num_steps

    def state_dict(self, log_position=0):
        """The checkpoint: the published keys `model`, `ema`, `opt`, then what an exact resume needs besides. Collective."""
        ema, opt = self.ema.net.state_dict(), self.optimizer.state_dict()
        if self.owners:
            ema, opt = gather(ema, opt, self.net, self.owners)
        return {"model": self.net.state_dict(), "ema": ema, "opt": opt,
                "step": self.step, "images_seen": self.images_seen,
                "start_step": self.start_step, "start_images": self.start_images,
                "stepper": self.stepper.state_dict(), "log_position": log_position,
                "measured": self.measured, "sums": distributed.all_gather_object(self.sums.tolist()),
                "world_size": self.world_size, "config": to_dict(self.config), "latents": self.latents,
                "class_names": self.class_names and list(self.class_names)}

    def resume(self, checkpoint):
        """Become the run that wrote `checkpoint` (a dict of this class's making)."""
        self.net.load_state_dict(checkpoint["model"])
        with self.ema.whole() as ema:
            ema.load_state_dict(checkpoint["ema"])
        load_optimizer_state(self.optimizer, checkpoint["opt"])
        self.stepper.load_state_dict(checkpoint["stepper"])
        self.step, self.images_seen = checkpoint["step"], checkpoint["images_seen"]
        self.start_step, self.start_images = checkpoint["start_step"], checkpoint["start_images"]
        self.log_position = checkpoint["log_position"]
        sums = torch.tensor(checkpoint["sums"], dtype=torch.float64, device=self.device)
        self.measured = checkpoint.get("measured", [])
        self.sums = sums[self.rank] if len(sums) == self.world_size else sums.sum(dim=0) * (self.rank == 0)

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
    return LOSSES[train.loss](train.P_mean, train.P_std, mae_loss_coef=train.mae_loss_coef, patch_size=net.patch_size)


def train_step(state, model, loss, batch, labels, encode, generator):
    """One optimizer step on this process's batch, in grad_accum rounds; returns the mask ratio that was asked for.

    model: `state.net`, or its DistributedDataParallel wrapper. batch, labels: tensors on the device, (B, ...) and (B,).
    encode(batch, generator) -> latents (b, C, H, W). loss: see models.edm.EDMLoss; whatever it names is summed by its weights
    and measured. Losses and gradient norm are added to `state.sums`.
    """
    train, num_classes = state.config.train, state.config.model.num_classes
    progress = min(1.0, (state.step - state.start_step) / train.max_num_steps)
    ratio = mask_ratio(train, progress)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(train, state.images_seen - state.start_images, progress)
    generator.manual_seed(step_seed(train.seed, state.rank, state.step))

    # loss, backward
    means = 0.0
    rounds = list(zip(batch.chunk(train.grad_accum), labels.chunk(train.grad_accum)))
    for i, (part, part_labels) in enumerate(rounds):
        latents = encode(part, generator)
        part_labels = drop_labels(part_labels, num_classes, train.class_dropout_prob, generator) if num_classes else None
        last_round = i == len(rounds) - 1  # when processes exchange their gradients
        with contextlib.nullcontext() if last_round or model is state.net else model.no_sync():
            with state.autocast:
                losses = loss(model, latents, part_labels, ratio, generator)  # {name: (b,)}
            total, names, parts = 0.0, ["loss"], []
            for name, values in losses.items():
                parts.append(values.mean())
                names.append(f"loss_{name}")
                total = total + loss.weights.get(name, 1.0) * parts[-1]
            state.stepper.backward(total / len(rounds))
        means = means + torch.stack([total, *parts]).detach().double() / len(rounds)

    # step, EMA
    norm = state.stepper.step()
    state.ema.update()

    names += ["grad_norm", "good_steps"]
    if state.measured != names:
        state.measured, state.sums = names, torch.zeros(len(names), dtype=torch.float64, device=state.device)
    seen = torch.cat([means, norm.double()[None], torch.ones_like(means[:1])])
    state.sums += torch.where(torch.isfinite(norm), seen, 0.0)  # a skipped step has no part in the means
    state.step += 1
    state.images_seen += len(batch) * state.world_size
    return ratio


def fit(state, folder, dataset, encode, notice, sample_grid=None, evaluate=None):
    """Train until `state.end_step`; returns 0, EXIT_STOPPED after a signal (saved, ready to go on) or EXIT_BAD if most steps failed.

    folder: the experiment folder. dataset: see dataset.stream. encode: see train_step. notice: see utils.cli.StopNotice.
    sample_grid(net, step) -> picture (H, W, 3) uint8 or None, called on rank 0; evaluate(net, step) -> dict of numbers, called on
    all ranks. Both get the EMA network and must leave the global random state alone.
    Raises UserError when too many steps in a row have NaN or Inf gradients or, before the first step, when checkpoints cannot be
    written; and what the data set raises on bad data, after the weights are saved.
    """
    config, train, due = state.config, state.config.train, state.config.log
    end_step, saved_step = state.end_step, state.step  # what the run starts from is on disk, or the same command makes it again
    check_every = min(due.log_every, train.max_bad_steps)
    writer = CheckpointWriter(Path(folder) / "checkpoints", due.keep_last, due.keep_every)
    if distributed.is_main():
        writer.prepare(state.step, state.nbytes, -(-(end_step - state.step) // due.ckpt_every))
    distributed.barrier()
    log = RunLog(folder, state.log_position, due.tensorboard, due.wandb, to_dict(config))
    generator, loss = torch.Generator(state.device), make_loss(train, state.net)
    stop = failed = error = None
    try:
        model = prepare_model(state, loss, log)
        if state.step > state.start_step:
            look(state, log, sample_grid, evaluate)  # a run that ended right after its last checkpoint still owes this
        logged_step, training_since = state.step, time.monotonic()
        with BatchStream(dataset, train.batchsize, train.seed, state.rank, state.world_size, start=state.images_seen,
                         device=state.device, num_workers=config.data.num_workers) as batches, \
                Progress(end_step, "train", "step", initial=state.step, every_s=None) as bar:
            while state.step < end_step:
                # data; all processes leave in the same step
                try:
                    batch, labels = next(batches)
                except (OSError, ValueError) as problem:
                    error = problem
                stop, failed = distributed.any_of_ranks([notice.requested, error is not None])
                if stop or failed:
                    break

                # loss, backward, step, EMA
                ratio = train_step(state, model, loss, batch, labels, encode, generator)
                distributed.note_progress(f"step {state.step}")
                bar.update()
                last = state.step == end_step

                # log
                if (state.step % check_every == 0 or last) and (warning := state.stepper.report(state.step)):
                    log.say(f"WARNING: {warning}")
                if state.step % due.log_every == 0 or last:
                    rate = (state.step - logged_step) * train.batchsize * state.world_size / (time.monotonic() - training_since)
                    values = measure(state, ratio, rate)
                    log.metrics(state.step, values)
                    log.say(progress_line(state, values))
                    logged_step, training_since = state.step, time.monotonic()

                # save; then evaluation and grid, so that their failure costs no step
                paused = time.monotonic()
                if state.step % due.ckpt_every == 0 or last:
                    save(state, log, writer)
                    saved_step = state.step
                look(state, log, sample_grid, evaluate)
                training_since += time.monotonic() - paused  # the rate is that of training alone

        if saved_step != state.step:
            save(state, log, writer)
        unwritten = any(distributed.all_gather_object(not writer.wait()))
        if error is not None:
            raise error
        if failed:
            return EXIT_USER_ERROR  # the rank that failed says why
        if unwritten:
            return EXIT_OTHER_FAILED  # the writer has said why
        if stop:
            log.say(f"stopped at step {state.step} as asked; the same command goes on from there")
            return EXIT_STOPPED
        bad, steps = int(state.stepper.bad_steps[1]), state.step - state.start_step
        if 2 * bad > steps:
            log.say(f"WARNING: {bad} of the run's {steps} steps had NaN or Inf losses or gradients and changed nothing: the weights are "
                    f"of little use. {STEADIER}, with another log.exp_name")
            return EXIT_BAD
        return 0
    finally:
        writer.wait()  # whatever happened: nobody else may write here before this is on disk
        log.close()


def prepare_model(state, loss, log):
    """The network as the loop calls it: blocks compiled, wrapped for several processes.

    Passes on zeros settle what the first pass settles (kernels; DDP's buckets, which change the order of sums), the same in a new and
    in a resumed run. Where the number of kept tokens will change, what will not fit fails now, and nothing is compiled later.
    """
    net, train = state.net, state.config.train
    latents = torch.zeros(train.batchsize // train.grad_accum, net.in_channels, net.in_size, net.in_size, device=state.device)
    labels = torch.zeros(len(latents), dtype=torch.int64, device=state.device) if net.num_classes else None
    first, last = (count_kept(net.num_tokens, ratio) for ratio in (train.mask_ratio, train.mask_ratio_min))
    near = min(last, first + (-first % 8 or 1))  # inductor makes one graph for counts divisible by 8, and one for the rest
    counts = sorted({first, near, last}) if train.mask_ratio_varies else [first]

    def rehearse(model):
        own = [p for p in net.parameters() if p.requires_grad and state.owners.get(p, state.rank) == state.rank]
        moments = not state.optimizer.state and [torch.empty_like(p) for p in own for _ in range(2)]
        for count in counts:
            ratio = max(0.0, 1 - (count + 0.5) / net.num_tokens)
            with state.autocast:
                losses = loss(model, latents, labels, ratio, torch.Generator(state.device).manual_seed(0))
            sum(values.sum() for values in losses.values()).backward()
            state.optimizer.zero_grad(set_to_none=True)
        del moments  # the first step makes AdamW's two; until here they took their room

    if state.compiled:
        log.say("compiling the blocks: about 1 minute on the first batch")
        net.compile_blocks(**compile_options(train))
        failure = None
        try:
            rehearse(net)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind; one that is not the compiler's comes again in the first step
            if train.compile != "auto":
                raise
            failure = " ".join(str(error).split("\n")[:2])  # which backend, and what it raised; then come pages
        failures = [text for text in distributed.all_gather_object(failure) if text is not None]
        if failures:
            torch.compiler.set_stance("force_eager")  # blocks that were compiled run as they are
            state.optimizer.zero_grad(set_to_none=True)
            log.say(f"going on without compiled blocks, because torch.compile failed ({failures[0]}); train.compile=true shows all of it")
    model = distributed.data_parallel(net, static_graph=train.grad_accum == 1)
    if model is not net or len(counts) > 1:
        rehearse(model)
    return model


def measure(state, ratio, images_per_s):
    """The values of a log line: means over the good steps since the last one (None if there were none), then the rest. Collective."""
    sums = distributed.all_reduce_sum(state.sums.clone()).tolist()
    state.sums.zero_()
    good_steps, num_tokens = sums.pop(), state.net.num_tokens
    values = {"images": state.images_seen}
    values |= {name: total / good_steps if good_steps else None for name, total in zip(state.measured, sums)}
    values |= {"lr": state.optimizer.param_groups[0]["lr"], "mask_ratio": 1 - count_kept(num_tokens, ratio) / num_tokens,
               "bad_steps": int(state.stepper.bad_steps[1])}
    if state.stepper.scaler.is_enabled():
        values["loss_scale"] = state.stepper.scaler.get_scale()
    on_gpu = state.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(state.device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return values | {"images_per_s": images_per_s, "peak_memory_gb": peak / 1e9}


def progress_line(state, values):
    """One line about the values of `measure`."""
    if values["loss"] is None:
        losses = "no loss: every step since the last line was skipped"
    else:
        parts = ", ".join(f"{name.removeprefix('loss_')} {values[name]:.4f}" for name in state.measured if name.startswith("loss_"))
        losses = f"loss {values['loss']:.4f} ({parts}), grad norm {values['grad_norm']:.3f}"
    images_left = (state.end_step - state.step) * state.config.train.batchsize * state.world_size
    return (f"step {state.step}/{state.end_step}: {losses}, lr {values['lr']:.2e}, masked {values['mask_ratio']:.0%}, "
            f"{values['images_per_s']:.0f} img/s, {values['peak_memory_gb']:.2f} GB, "
            f"{Progress.format_interval(images_left / values['images_per_s'])} left")


def save(state, log, writer):
    """Start writing a checkpoint of this step. Collective."""
    content = state.state_dict(log.position)
    if distributed.is_main():
        writer.save(state.step, content)


def look(state, log, sample_grid, evaluate):
    """Evaluate and draw the average, if this step is one for it. Collective."""
    def is_due(every):
        return every and (state.step % every == 0 or state.step == state.end_step)

    if evaluate is not None and is_due(state.config.eval.every):
        with state.ema.whole() as net:
            log.metrics(state.step, evaluate(net, state.step))
    if sample_grid is not None and is_due(state.config.log.sample_every):
        with state.ema.whole() as net:
            picture = sample_grid(net, state.step) if distributed.is_main() else None
        if picture is not None:
            log.picture(state.step, "samples", picture)
        distributed.barrier()
