"""FLOPs, memory, time and cost of a training run on named GPUs, 1 to N of them. Needs no GPU and measures nothing.

    python -m benchmarks.estimate --config configs/train/maskdit-latent-imagenet.yaml --gpu h100,a100 --gpus 8,64

FLOPs are counted by torch on the config's network; so is what torch keeps for the backward pass, to which memory adds what every weight
needs. Time is FLOPs over the GPU's peak times --utilisation. The default, 0.35, is what the paper's own run reached (MaskDiT with AMP,
2.16 steps/s of 1024 images on 8 A100); its other runs reached 0.23 to 0.44. A step takes no less than the host needs to launch its kernels,
which is all of it with few images per GPU (below 60 of XL/2 on an H100). Optimizer, slow data, slow links and evaluations are not in the
arithmetic.
"""

from benchmarks.common import make_parser, report, start
from utils.cli import UserError, run
from utils.config import load_config

# Peak TFLOP/s of dense matrix products with float32 sums in half precision and TF32, and GiB, from NVIDIA's data sheets (A100 80GB SXM4,
# H100 SXM5, H200 SXM5, L40S) and architecture papers (Ada for the 4090, Ampere GA102 for the 3090).
GPUS = {"a100": (312, 156, 80), "h100": (989, 494.5, 80), "h200": (989, 494.5, 141), "l40s": (362, 183, 48), "4090": (165, 82.6, 24),
        "3090": (71, 35.6, 24)}
UTILISATION = 0.35       # share of the peak that a step reaches: see above
STATE_BYTES = 8 + 4      # per weight: AdamW's two moments, EMA; train.shard divides them by the number of GPUs
GRADIENT_BYTES = 4       # per weight
CONTEXT_GB = 1.0         # CUDA context, cuBLAS workspace, fragmentation
COMPILED_KEEPS = {"no": 0.85, "fp16": 0.75, "bf16": 0.75}  # of eager's activations, counted on compiled graphs (a test holds it)
# kernels of a step, counted by benchmarks/launches.py: of each block, and of all the rest; eager, then compiled
LAUNCHES = {"no": ((67, 232), (43, 212)), "fp16": ((109, 270), (58, 262)), "bf16": ((109, 270), (58, 262))}
HOST_S = 28e-6  # of one EPYC core for a launch: it took 61 to 75 ms for 2,430 compiled ones, 100 to 160 ms for 4,280 eager ones
COLUMNS = ("gpus", "batch", "GFLOP/image", "host ms", "steps/s", "img/s per GPU", "GB", "fits", "GB sent per step", "hours", "$")


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.epilog = "Any key of the config can be given as key=value, for example train.batchsize=32."
    parser.add_argument("--config", help="YAML file of a training run (default: the defaults, XL/2 half masked)")
    parser.add_argument("--gpu", default="h100", help=f"one or several of {','.join(GPUS)} (default h100)")
    parser.add_argument("--gpus", default="8", help="how many in all, one or several numbers, as in 8,64 (default 8)")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="of the peak (default %(default)s: see above)")
    parser.add_argument("--price", type=float, default=2.0, help="dollars per GPU and hour (default 2, an assumption: give your own)")
    parser.add_argument("--launches", action="store_true", help="instead: the kernels that a step launches, counted (about a minute)")
    args, overrides = parser.parse_known_args(argv)
    for name in args.gpu.split(","):
        if name not in GPUS:
            raise UserError(f"--gpu {name} is unknown; known are {', '.join(GPUS)}")
    if not all(count.isdigit() and int(count) for count in args.gpus.split(",")):
        raise UserError(f"--gpus {args.gpus}: wanted numbers above 0, as in 8 or 8,64,512")
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation}: wanted a number above 0, at most 1")
    return args, overrides


def count(config):
    """What the network needs: {"weights", "flops" of one image, "launches" of a round, "kept_per_image" and "kept_copies": bytes}.

    flops: forward and backward at the mean mask ratio of the run, what is computed again included.
    kept_per_image, kept_copies: for the backward pass, and of them those of the weights in half precision, for any batch.
    """
    from benchmarks.work import count_weights, kept_bytes, model_flops
    from training.optim import mask_ratio

    train = config.train
    flops = model_flops(config, sum(mask_ratio(train, (i + 0.5) / 100) for i in range(100)) / 100, training=True)
    most_tokens = train.mask_ratio_min if train.mask_ratio_varies else train.mask_ratio
    (one, inputs, blocks), (two, _, _) = (kept_bytes(config, most_tokens, train.amp, batch) for batch in (1, 2))
    per_image, copies = two - one, 2 * one - two
    if train.activation_checkpointing:  # the inputs of all blocks, and one block at a time
        per_image = inputs + per_image / blocks
    elif train.compile is not False:  # auto compiles on all of these GPUs
        per_image *= COMPILED_KEEPS[train.amp]
    per_block, rest = LAUNCHES[train.amp][train.compile is not False]
    launches = rest + blocks * per_block * (4 / 3 if train.activation_checkpointing else 1)
    return {"weights": count_weights(config), "flops": flops, "launches": launches, "kept_per_image": per_image, "kept_copies": copies}


def memory_gb(train, work, num_gpus):
    """GB (1e9 bytes) of one GPU in training: weights with all that belongs to them, activations of one round, and the context.

    In the backward pass gradients come as activations go, so the larger of the two counts. Both count if gradients stay through the
    forward pass, as they do in DDP's buckets and between the rounds of an accumulated batch.
    """
    kept = train.batchsize // train.grad_accum * work["kept_per_image"] + work["kept_copies"]
    gradients = work["weights"] * GRADIENT_BYTES
    both = kept + gradients if num_gpus > 1 or train.grad_accum > 1 else max(kept, gradients)
    return (work["weights"] * (4 + STATE_BYTES / (num_gpus if train.shard else 1)) + both) / 1e9 + CONTEXT_GB


def compute_seconds(train, work, name, utilisation):
    """Time of a step's FLOPs on one GPU at a share of its peak."""
    half, tf32, _ = GPUS[name]
    return train.batchsize * work["flops"] / (1e12 * (tf32 if train.amp == "no" else half) * utilisation)


def run_row(train, work, name, num_gpus, utilisation, price):
    """Table row of a whole run on num_gpus GPUs of one kind, train.batchsize images on each."""
    host, gibibytes = HOST_S * train.grad_accum * work["launches"], GPUS[name][2]
    seconds = max(host, compute_seconds(train, work, name, utilisation))
    hours, memory = train.max_num_steps * seconds / 3600, memory_gb(train, work, num_gpus)
    sent = 2 * (num_gpus - 1) / num_gpus * GRADIENT_BYTES * work["weights"]  # by each GPU, in a ring
    values = (f"{num_gpus} {name}", train.batchsize * num_gpus, work["flops"] / 1e9, 1e3 * host, 1 / seconds, train.batchsize / seconds,
              memory, "yes" if memory < gibibytes * 2**30 / 1e9 else "no", sent / 1e9, hours, hours * num_gpus * price)
    return dict(zip(COLUMNS, values))


def main(argv=None):
    args, overrides = parse_arguments(argv)
    config = load_config(args.config, overrides)
    device = start(args)
    if args.launches:
        from benchmarks import launches

        rows = [launches.table_row(name, launches.count(config, name == "compiled")) for name in ("eager", "compiled")]
        return report(args, device, rows, launches.COLUMNS)
    work = count(config)
    rows = [run_row(config.train, work, name, int(number), args.utilisation, args.price)
            for name in args.gpu.split(",") for number in args.gpus.split(",")]
    print(f"{config.model.model_type}, {config.model.in_size}x{config.model.in_size} latents, {work['weights'] / 1e6:.1f} million weights, "
          f"precision {config.train.amp}, {config.train.max_num_steps:,} steps, at {args.utilisation:g} of the peak")
    report(args, device, rows, COLUMNS)


if __name__ == "__main__":
    run(main)
