"""From a command line to a run's folder: what train_latent.py and train.py share. No torch before the command line is understood."""

import argparse
import os
import sys
from pathlib import Path

from utils.cli import StopNotice, UserError, parse_with_overrides, str_to_bool
from utils.config import from_dict, load_config, to_dict


def parse_arguments(description, argv=None):
    """Parse a training script's command line: (args, overrides)."""
    parser = argparse.ArgumentParser(description=description, epilog="Any key of the config can be given as key=value, as in train.lr=5e-5 "
                                     "log.exp_name=mine. Starting the same command again goes on with a run that was stopped.")
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--num_process_per_node", type=int, help="start this many processes, one per GPU; on several nodes use torchrun")
    parser.add_argument("--ckpt_path", help="checkpoint to start from, ours or a published one")
    parser.add_argument("--finetune", action="store_true", help="start a new run on other data from the weights of --ckpt_path: "
                        "classes are the data's, weights of another shape start fresh, positions are interpolated")
    flag = {"type": str_to_bool, "default": True, "metavar": "BOOL"}
    parser.add_argument("--use_ckpt_path", **flag, help="False: start a new folder; True (default): go on in the checkpoint's own")
    parser.add_argument("--use_strict_load", **flag, help="False: weights only; True (default): the optimizer's state too")
    parser.add_argument("--accept_data", action="store_true", help="go on although data.root is another path (the same data was moved) or, "
                        "with --ckpt_path, although the latents have another scale, shift or autoencoder")
    parser.add_argument("--no_amp", action="store_true", help="train in float32: the same as train.amp=no")
    parser.add_argument("--exp_name", help="the same as log.exp_name=...: the folder of the run")
    parser.add_argument("--results_dir", help="the same as log.results_dir=...: where the folders of runs are")
    return parse_with_overrides(parser, argv)


def resolve_config(args, overrides):
    """The run's Config: the YAML file, then key=value overrides, then the flags that stand for one key."""
    config = load_config(args.config, overrides)
    log = {key: getattr(args, key) for key in ("exp_name", "results_dir") if getattr(args, key)}
    log.setdefault("exp_name", config.log.exp_name or Path(args.config).stem)
    return from_dict(to_dict(config), {"log": log, "train": {"amp": "no"} if args.no_amp else {}})


def run_folder(config, args):
    """The experiment folder: results_dir/exp_name, or the one that --ckpt_path lies in."""
    if args.finetune and args.ckpt_path is None:
        raise UserError("--finetune needs --ckpt_path: the checkpoint whose weights it starts from")
    checkpoint = args.ckpt_path and Path(args.ckpt_path)
    if checkpoint and not checkpoint.is_file():
        raise UserError(f"--ckpt_path {checkpoint}: no such file")
    if not checkpoint or args.finetune or not args.use_ckpt_path:
        return Path(config.log.results_dir) / config.log.exp_name
    if checkpoint.parent.name != "checkpoints":
        raise UserError(f"--ckpt_path {checkpoint} is not in the checkpoints/ folder of a run that could go on; to start a new run "
                        f"from it, add --finetune (weights only) or --use_ckpt_path False (weights and optimizer)")
    return checkpoint.parent.parent


def train(description, example, open_dataset, make_encode):
    """What a training script does: read the command line, check, find or make the run's folder, restore what is there, train.

    example: a data.root. open_dataset(config) -> dataset. make_encode(config, dataset, device) -> (encode(batch, generator) ->
    latents, their description {"scale": ..., "shift": ..., "vae": digest or ""}). Returns the exit code.
    """
    args, overrides = parse_arguments(description)
    config = resolve_config(args, overrides)
    if not config.data.root:
        raise UserError(f"data.root is empty: give the folder of the data, as in data.root={example}")
    folder = run_folder(config, args)
    if args.num_process_per_node is not None and "RANK" not in os.environ:
        from utils.distributed import launch

        return launch(sys.argv[0], sys.argv[1:], args.num_process_per_node)
    with StopNotice() as notice:  # before the slow imports: a run that is asked to stop meanwhile stops before the first step
        from training.start import train_in
        from utils import distributed
        from utils.precision import setup_backends, use_compile

        device = distributed.device()
        setup_backends(config.train.tf32, config.train.deterministic, use_compile(config.train.compile, device))
        distributed.init(config.train.timeout_s)  # after NCCL_ALGO is set
        code = train_in(folder, config, args, open_dataset, make_encode, device, notice)
        distributed.shutdown()
    return code
