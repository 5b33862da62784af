"""Speed and memory of a training step, beside the plain path with the same weights, batch and precision.

    python -m benchmarks.train --size B/2 --amp no --json benchmarks/results/train_cpu.json

An arm is a whole step on stored moments: draw latents, drop labels, loss, backward, AdamW, EMA.
    plain      benchmarks/reference.py: the same step as the papers' code writes it
    ours       the step of training/loop.py, with eager blocks
    compiled   the same with compiled blocks
    unmasked   nothing is masked
    dit        no mask and no decoder: the paper's baseline
`unmasked` and `dit` run with compiled blocks if --set train.compile=true. Kernels are deterministic, as in training, unless
--set train.deterministic=false. All arms are in memory together: on a small GPU give fewer.
"of peak" is the FLOPs of the model over time over the speed of a large matrix product in the same run. GB is the most that an arm's
tensors take at once, weights, moments and EMA included; on a CPU it needs two warm-up rounds.
"""

from benchmarks.common import compare, make_parser, start
from utils.cli import run
from utils.config import load_config, model_arguments

ARMS = ("plain", "ours", "compiled", "unmasked", "dit")
COLUMNS = ("model", "masked", "amp", "batch", "arm", "ms", "img/s", "TFLOP/s", "of peak", "x plain", "GB", "first s")


def parse_arguments(argv=None):
    return make_parser(__doc__, rounds=5, settings=True, arms=ARMS).parse_args(argv)


def arm_config(args, arm):
    own = {"unmasked": ["train.mask_ratio=0"], "dit": ["train.mask_ratio=0", "model.use_decoder=false"]}
    return load_config(overrides=[f"model.model_type=DiT-{args.size}", f"train.amp={args.amp}", f"train.batchsize={args.batchsize}",
                                  f"train.compile={arm == 'compiled'}", *args.set, *own.get(arm, [])])


def make_training(config, arm, device):
    """(TrainState or PlainTraining, function that does one step of `arm`). Weights and data are random, the same for all arms."""
    import torch

    from benchmarks.reference import PlainTraining
    from models import build_model, sample_moments
    from training.loop import TrainState, make_loss, train_step
    from utils.precision import compile_options, use_compile

    torch.manual_seed(0)
    train, model, generator = config.train, config.model, torch.Generator(device)
    net = build_model(**model_arguments(config)).to(device)
    moments = torch.randn(train.batchsize, 2 * model.in_channels, model.in_size, model.in_size, device=device)
    labels = torch.randint(model.num_classes, (train.batchsize,), device=device)
    if arm == "plain":
        training = PlainTraining(net, train, device)
        return training, lambda: training.step(sample_moments(moments, generator), labels, generator)
    if use_compile(train.compile, device):
        net.compile_blocks(**compile_options(train))
    state, loss = TrainState(net, config, device), make_loss(train, net)
    return state, lambda: train_step(state, net, loss, moments, labels, sample_moments, generator)


def make_arm(config, arm, device):
    return make_training(config, arm, device)[1]


def image_flops(config):
    from benchmarks.work import model_flops

    return model_flops(config, config.train.mask_ratio, training=True)


def main():
    args = parse_arguments()
    configs = {arm: arm_config(args, arm) for arm in args.arms}
    train = configs[args.arms[0]].train
    device = start(args, train.tf32, train.deterministic)
    about = {"model": args.size, "masked": train.mask_ratio, "amp": args.amp, "batch": args.batchsize}
    compare(args, device, configs, about, make_arm, image_flops, COLUMNS)


if __name__ == "__main__":
    run(main)
