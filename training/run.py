"""From a command line to `trainer.fit`: what train_latent.py and train.py share."""

import argparse
import dataclasses
from pathlib import Path

from utils.cli import UserError, str_to_bool
from utils.config import load_config, to_dict, to_yaml


def parse_arguments(description, argv=None):
    """Parse a training script's command line: (args, overrides). No torch, so that --help answers at once."""
    parser = argparse.ArgumentParser(description=description, epilog="Any key of the config can be given as key=value, for example "
                                     "train.batchsize=64 train.lr=5e-5 log.exp_name=mine. Starting the same command again goes on "
                                     "with a run that was stopped.")
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--num_process_per_node", type=int, help="start this many processes here (one per GPU); "
                        "not needed under torchrun")
    parser.add_argument("--num_nodes", type=int, default=1, help="nodes in all, with --num_process_per_node (default 1)")
    parser.add_argument("--node_rank", type=int, default=0, help="index of this node, with --num_nodes")
    parser.add_argument("--master_address", default="127.0.0.1", help="address of node 0, with --num_nodes")
    parser.add_argument("--master_port", type=int, default=0, help="port of node 0, with --num_nodes")
    parser.add_argument("--ckpt_path", help="checkpoint to start from, ours or a published one")
    parser.add_argument("--use_ckpt_path", type=str_to_bool, default=True, metavar="BOOL",
                        help="True (default): go on in the checkpoint's own experiment folder; False: start a new folder")
    parser.add_argument("--use_strict_load", type=str_to_bool, default=True, metavar="BOOL",
                        help="True (default): optimizer state and all weights must fit; False: weights only")
    parser.add_argument("--skip_mismatched", action="store_true",
                        help="leave weights whose shape differs at their fresh values (another class count); "
                        "positions of another resolution are interpolated")
    parser.add_argument("--no_amp", action="store_true", help="train in float32: the same as train.amp=no")
    parser.add_argument("--exp_name", help="the same as log.exp_name=...: the folder of the run")
    parser.add_argument("--results_dir", help="the same as log.results_dir=...: where the folders of runs are")
    return parser.parse_known_args(argv)


def resolve_config(args, overrides):
    """The run's Config: the YAML file, then key=value overrides, then the flags that stand for one key."""
    config = load_config(args.config, overrides)
    train, log = {}, {}
    if args.no_amp:
        train["amp"] = "no"
    if args.exp_name:
        log["exp_name"] = args.exp_name
    if args.results_dir:
        log["results_dir"] = args.results_dir
    log.setdefault("exp_name", config.log.exp_name or Path(args.config).stem)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train), log=dataclasses.replace(config.log, **log))


def run_folder(config, args):
    """The experiment folder: results_dir/exp_name, or the one that --ckpt_path lies in."""
    if args.ckpt_path and args.use_ckpt_path:
        checkpoint = Path(args.ckpt_path)
        if checkpoint.parent.name != "checkpoints":
            raise UserError(f"--ckpt_path {checkpoint} is not in the checkpoints/ folder of a run that could go on; "
                            f"to start a new run from it, add --use_ckpt_path False")
        return checkpoint.parent.parent
    return Path(config.log.results_dir) / config.log.exp_name


def launch_if_asked(args, script, argv):
    """With --num_process_per_node, run this script in that many processes; returns their exit code, or None."""
    if args.num_process_per_node is None:  # not worth the slow import
        return None
    from utils import distributed

    return distributed.launch(script, argv, args.num_process_per_node, args.num_nodes, args.node_rank,
                              args.master_address, args.master_port)


def train(config, args, open_dataset, make_encode):
    """Set the process up, find or make the run's folder, restore what is there, train; returns the exit code.

    open_dataset(config) -> dataset. make_encode(config, dataset, device) -> encode(batch, generator) -> latents.
    """
    from utils.cli import StopNotice

    with StopNotice() as notice:  # before the slow imports: who is asked to stop meanwhile stops before the first step
        from utils import distributed
        from utils.precision import setup_backends, use_compile

        distributed.init(config.train.timeout_s)
        device = distributed.device()
        setup_backends(config.train.tf32, config.train.deterministic, use_compile(config.train.compile, device))
        code = _train(config, args, open_dataset, make_encode, notice)
        distributed.shutdown()
    return code


def _train(config, args, open_dataset, make_encode, notice):
    import torch

    from utils import distributed
    from sampling.sample import build_model
    from training.lock import RunLock
    from utils.logging import say
    from training.loop import TrainState, fit
    from training.watch import draw_loss_curve, make_evaluate, make_sample_grid

    device = distributed.device()
    dataset = open_dataset(config)
    folder = run_folder(config, args)
    lock = None
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
    try:
        distributed.barrier()
        torch.manual_seed(config.train.seed)
        net = build_model(config.model, config.train).to(device)
        distributed.broadcast_module(net)  # before its copies are made
        state = TrainState(net, config, device, dataset.class_names)
        restore(state, folder, args)
        if distributed.is_main():
            (folder / "config.yaml").write_text(to_yaml(config))
        _describe(state, dataset, folder)
        sample_grid = make_sample_grid(config, folder, dataset, device)
        evaluate = make_evaluate(config, folder, device)
        code = fit(state, folder, dataset, make_encode(config, dataset, device), notice, sample_grid, evaluate)
        if distributed.is_main():
            draw_loss_curve(folder)
        if code == 0:
            say(f"done: {folder} (checkpoints/, metrics.jsonl, loss.png)")
        return code
    finally:
        if lock is not None:
            lock.release()


# ------------------------------------------------------------------------------------------------ starting point

def restore(state, folder, args):
    """Bring `state` to where the run stands: its own newest checkpoint, else --ckpt_path, else fresh weights."""
    from utils import distributed
    from sampling.load import load_checkpoint
    from training.checkpoint import find_latest
    from utils.logging import say

    latest = distributed.broadcast_object(find_latest(folder / "checkpoints") if distributed.is_main() else None)
    if latest is not None:
        if args.ckpt_path and args.use_ckpt_path and latest.resolve() != Path(args.ckpt_path).resolve():
            say(f"{args.ckpt_path} is not the newest of its run: {latest.name} is")
        checkpoint = load_checkpoint(latest)
        _tell_changes(state, checkpoint, folder)
        state.resume(checkpoint)
        say(f"resuming from {latest}: step {state.step}, {state.images_seen:,} images seen")
    elif args.ckpt_path:
        checkpoint = load_checkpoint(args.ckpt_path)
        start_from(state, checkpoint, args.ckpt_path, strict=args.use_strict_load, skip_mismatched=args.skip_mismatched)
        say(f"starting from {args.ckpt_path} at step {state.step} "
            f"({'weights and optimizer' if args.use_strict_load else 'weights only'})")


def start_from(state, checkpoint, path, strict, skip_mismatched=False):
    """Begin a new run with the weights of a checkpoint, ours or a published one; steps count on from its own.

    strict: take the optimizer state too. skip_mismatched: tensors of another shape keep their fresh values.
    Raises ValueError listing, by name, what is missing, unknown or of another shape.
    """
    from sampling.load import load_weights_into, steps_done, weights_of

    for net, which in ((state.net, "model"), (state.ema.net, "ema")):
        load_weights_into(net, weights_of(checkpoint, which, path), path, skip_mismatched)
    if strict:
        if "opt" not in checkpoint:
            raise UserError(f"checkpoint {path} has no optimizer state; to start from its weights only, add --use_strict_load False")
        state.load_optimizer(checkpoint, path)
    state.step = state.start_step = steps_done(checkpoint)
    state.images_seen = state.start_images = int(checkpoint.get("images_seen", 0))


def _tell_changes(state, checkpoint, folder):
    """Say which settings differ from the run so far, before going on with the new ones. Another model is a ValueError."""
    from utils import distributed
    from utils.logging import say

    then, now = checkpoint["config"], to_dict(state.config)
    changed = {f"{section}.{key}": f"{then[section].get(key)} -> {value}" for section in now if section != "log"
               for key, value in now[section].items() if section in then and then[section].get(key) != value}
    other_model = [f"{key} {change}" for key, change in changed.items() if key.startswith("model.")]
    if other_model:
        raise UserError(f"{folder} holds a run of another model: {', '.join(other_model)}; "
                        f"choose another log.exp_name, or the settings of that run (its config.yaml)")
    if changed:
        say(f"settings changed since the checkpoint: {', '.join(f'{key} {change}' for key, change in changed.items())}")
    batch_then = then["train"]["batchsize"] * checkpoint["world_size"]
    batch_now = state.config.train.batchsize * distributed.world_size()
    if checkpoint["world_size"] != distributed.world_size() or batch_then != batch_now:
        say(f"going on with {distributed.world_size()} processes of {state.config.train.batchsize} images instead of "
            f"{checkpoint['world_size']} of {then['train']['batchsize']}: the data goes on at image {checkpoint['images_seen']:,}, "
            f"steps are now {batch_now} images instead of {batch_then}, and the random draws differ from the run so far")


def _describe(state, dataset, folder):
    from utils import distributed
    from utils.logging import say

    train = state.config.train
    parameters = sum(p.numel() for p in state.net.parameters())
    say(f"{folder}: {state.config.model.model_type}, {parameters / 1e6:.1f}M parameters, {len(dataset):,} samples of {dataset.name}")
    say(f"{distributed.world_size()} process(es) on {state.device.type}, {train.batchsize} images each per step in {train.grad_accum} "
        f"round(s), precision {state.amp}, blocks {'compiled' if state.compiled else 'not compiled'}, steps {state.step} to {state.end_step}")
