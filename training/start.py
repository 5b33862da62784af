"""From the settings of a run to `fit`: everything is checked before the network is made, and what is there is restored."""

import contextlib
import dataclasses
import fcntl
import os
import socket
from pathlib import Path

import torch

from models import LOSSES, build_model
from models.masking import count_kept
from sampling.load import config_of, load_checkpoint, load_weights_into, read_checkpoint, steps_done, weights_of
from sampling.sample import check_sampler
from training.checkpoint import find_latest
from training.loop import TrainState, fit
from training.optim import load_moments_by_name, mask_ratio
from training.watch import draw_loss_curve, forget_after, make_evaluate, make_sample_grid
from utils import distributed
from utils.cli import UserError
from utils.config import model_arguments, to_dict, to_yaml
from utils.files import make_folder
from utils.logging import check_sinks, say
from utils.schema import notes


def train_in(folder, config, args, open_dataset, make_encode, device, notice):
    """Check everything, then make the network, restore and train in `folder`; returns the exit code."""
    if config.train.loss not in LOSSES:
        raise UserError(f"train.loss={config.train.loss!r} is unknown; wanted one of {', '.join(LOSSES)}")
    check_sampler(config.sample)
    check_sinks(config.log)
    config, dataset = open_for_finetuning(config, open_dataset) if args.finetune else (config, open_dataset(config))
    encode, latents = make_encode(config, dataset, device)
    sample_grid = make_sample_grid(config, folder, dataset.class_names, device, latents)
    evaluate = make_evaluate(config, folder, device, latents)
    with claim(folder) if distributed.is_main() else contextlib.nullcontext():
        distributed.barrier()
        path, own, checkpoint = read_start(config, folder, args, latents)
        torch.manual_seed(config.train.seed)  # the same weights on every process
        net = build_model(**model_arguments(config)).to(device)
        distributed.share(dict.fromkeys(net.parameters(), 0))  # before its copies are made, should a network draw what is not seeded
        state = TrainState(net, config, device, dataset.class_names, latents)
        if own:
            state.resume(checkpoint)
            say(f"resuming from {path}: step {state.step}, {state.images_seen:,} images seen")
        elif path:
            strict = args.use_strict_load and not args.finetune
            start_from(state, checkpoint, path, strict, args.finetune)
            say(f"starting from {path} at step {state.step} ({'weights and optimizer' if strict else 'weights only'})")
        del checkpoint
        if distributed.is_main():
            (folder / "config.yaml").write_text(to_yaml(config))
            forget_after(folder, state.step)
        describe(state, dataset, folder)
        for note in notes(config, device, "train", "sample"):
            say(note)
        code = fit(state, folder, dataset, encode, notice, sample_grid, evaluate)
        if distributed.is_main():
            draw_loss_curve(folder)
        if code == 0:
            say(f"done: {folder} (checkpoints/, metrics.jsonl, loss.png)")
        return code


@contextlib.contextmanager
def claim(folder):
    """Make a run's folder and hold its run.lock, which the system frees when the process dies. A new folder that stays empty goes again."""
    new = not os.path.isdir(folder)
    make_folder(folder, "log.results_dir/log.exp_name")
    path = folder / "run.lock"
    while True:
        lock = open(path, "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{folder} is in use by {lock.read()}; stop that job first, or give this one another log.exp_name") from None
        except OSError as error:  # some network disks have no locks
            print(f"{path} cannot be locked ({error.strerror}): see to it that no other job trains in this folder", flush=True)
        if os.fstat(lock.fileno()).st_nlink:  # else its last holder has deleted it meanwhile
            break
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def open_for_finetuning(config, open_dataset):
    """(config, dataset): the number of classes is the data's, wherever its format tells it."""
    dataset = open_dataset(dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0)))
    if dataset.num_classes is None:
        dataset.num_classes = config.model.num_classes or None
        return config, dataset
    say(f"fine-tuning to the {dataset.num_classes} classes of {dataset.name}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=dataset.num_classes)), dataset


def read_start(config, folder, args, latents):
    """(path, own, checkpoint) to begin with: the run's own newest one, else --ckpt_path, else (None, False, None).

    own: it is the run's. Says which settings have changed since, and refuses what does not go together.
    """
    latest = distributed.broadcast_object(find_latest(folder / "checkpoints") if distributed.is_main() else None)
    path = latest or args.ckpt_path
    if path is None:
        return None, False, None
    checkpoint = read_checkpoint(path) if latest else load_checkpoint(path)  # rank 0 has read all of the run's own
    differing = differences(checkpoint.get("latents"), latents)
    if latest is None:
        if differing and not args.accept_data:
            raise UserError(f"checkpoint {path} was trained on latents of another kind ({differing}); set data.scale and data.shift, "
                            f"or add --accept_data to train on these all the same")
        return path, False, checkpoint
    if args.ckpt_path and args.use_ckpt_path and not args.finetune and latest.resolve() != Path(args.ckpt_path).resolve():
        say(f"{args.ckpt_path} is not the newest of its run: {latest.name} is")
    then, reached, start = checkpoint["config"], checkpoint["step"], checkpoint["start_step"]
    root = then["data"]["root"]
    if root != config.data.root and Path(root).resolve() != Path(config.data.root).resolve() and not args.accept_data:
        raise UserError(f"{folder} holds a run on data.root={root}, not {config.data.root}; choose another log.exp_name for other data, "
                        f"or add --accept_data if the same data was moved")
    if differing:
        raise UserError(f"{folder} holds a run on latents of another kind ({differing}); choose another log.exp_name, or give that data")
    if reached > start + config.train.max_num_steps:
        raise UserError(f"{folder} has reached step {reached}, past the end that train.max_num_steps={config.train.max_num_steps} sets, "
                        f"step {start + config.train.max_num_steps}; nothing was done. Set it above {reached - start} to go on")
    _tell_changes(config, checkpoint, path, folder)
    return path, True, checkpoint


def differences(then, now):
    """In which way two descriptions of latents differ, in words; empty if they agree, as far as both are known."""
    if not then or not now:
        return ""
    return ", ".join(f"{key} {then[key]}, now {now[key]}" for key in ("scale", "shift", "vae") if then[key] != now[key]
                     and (key != "vae" or then[key] and now[key]))


def start_from(state, checkpoint, path, strict, finetune=False):
    """Begin a new run with the weights of a checkpoint, ours or a published one; steps count on from its own.

    strict: take the optimizer's state too. finetune: tensors of another shape keep their fresh values.
    """
    remedy = "check the model section of the config, or add --finetune, which leaves out what does not fit"
    with state.ema.whole() as ema:
        for net, which, tell in ((state.net, "model", say), (ema, "ema", lambda text: None)):  # both leave out the same: told once
            load_weights_into(net, weights_of(checkpoint, which, path), path, finetune, remedy, tell)
    if strict:
        if "opt" not in checkpoint:
            raise UserError(f"checkpoint {path} has no optimizer state; to start from its weights only, add --use_strict_load False")
        load_moments_by_name(state.optimizer, state.net, checkpoint, path)
    state.step = state.start_step = steps_done(checkpoint)
    state.images_seen = state.start_images = int(checkpoint.get("images_seen", 0))


def _tell_changes(config, checkpoint, path, folder):
    """Say which settings differ from the run so far, before going on with the new ones. Another model is a UserError."""
    then, now = to_dict(config_of(checkpoint, path)), to_dict(config)
    changed = [f"{section}.{key} {then[section][key]} -> {value}" for section in now if section != "log"
               for key, value in now[section].items() if then[section][key] != value]
    other_model = [change for change in changed if change.startswith("model.")]
    if other_model:
        raise UserError(f"{folder} holds a run of another model: {', '.join(other_model)}; choose another log.exp_name, or the settings "
                        f"of that run (its config.yaml)")
    if changed:
        say(f"settings changed since the checkpoint: {', '.join(changed)}")
    ranks_then, batch_then = checkpoint["world_size"], then["train"]["batchsize"]
    ranks_now, batch_now = distributed.world_size(), config.train.batchsize
    if (ranks_then, batch_then) != (ranks_now, batch_now):
        say(f"going on with {ranks_now} processes of {batch_now} images instead of {ranks_then} of {batch_then}: the data goes on at image "
            f"{checkpoint['images_seen']:,}, steps are now {ranks_now * batch_now} images instead of {ranks_then * batch_then}, "
            f"and the random draws differ from the run so far")


def describe(state, dataset, folder):
    """Say what is going to be trained, with the sizes that it really has."""
    train, net, sizes = state.config.train, state.net, ""
    if train.shard and not state.owners:
        say("train.shard=true has no effect: there is one process")
    for name, prefix in (("encoder", ""), ("decoder", "decoder_")):
        blocks, positions = getattr(net.model, f"{prefix}blocks", None), getattr(net.model, f"{prefix}pos_embed", None)
        if blocks is not None and positions is not None:  # a network of one's own may have neither
            sizes += f"{name} {len(blocks)} x {positions.shape[2]}, "
    kept = sorted({count_kept(net.num_tokens, mask_ratio(train, progress)) for progress in (0.0, 1.0)})
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{folder}: {state.config.model.model_type}, {sizes}{parameters:.1f}M parameters, {net.num_classes} classes, latents "
        f"{net.in_channels} x {net.in_size} x {net.in_size}, {' to '.join(map(str, kept))} of {net.num_tokens} patches kept")
    say(f"{len(dataset):,} samples of {dataset.name}; {state.world_size} process(es) on {state.device.type}, {train.batchsize} images each "
        f"per step in {train.grad_accum} round(s), precision {state.amp}, blocks {'compiled' if state.compiled else 'not compiled'}, "
        f"steps {state.step} to {state.end_step}")
