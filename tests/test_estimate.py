"""The arithmetic of benchmarks/estimate.py: counted on the real network, worked by hand, and held against the paper's measurements."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import estimate
from benchmarks.work import count_weights, kept_bytes, model_flops
from models import build_model, layers, random_mask
from utils.cli import UserError
from utils.config import load_config

TINY = ["model.model_type=DiT-S/2", "model.in_size=8", "model.num_classes=10", "model.depth=3", "model.width=32", "model.num_heads=2",
        "model.decoder_depth=2", "model.decoder_width=16", "model.decoder_num_heads=2"]

# Steps/s of the paper's Figure on 8 A100, XL/2 at 256 px (read off bars, 3 %) and GB per GPU: (masked, decoder, amp, global batch)
PAPER_BARS = {
    ("DiT TF32", False, "no", 256): (2.25, 39), ("DiT TF32", False, "no", 1024): (0.62, 109),
    ("MaskDiT TF32", True, "no", 256): (4.35, 28), ("MaskDiT TF32", True, "no", 1024): (1.35, 65),
    ("MaskDiT AMP", True, "fp16", 256): (5.70, 26), ("MaskDiT AMP", True, "fp16", 1024): (2.16, 49),
}


def config(*overrides):
    return load_config(overrides=["train.amp=bf16", *overrides])


def block_flops(tokens, width):
    """Of a DiT block without adaLN: qkv, projection and MLP are 12 width^2 multiplications a token, attention 2 tokens * width."""
    return 2 * tokens * (12 * width**2 + 2 * tokens * width)


def test_flops_equal_the_closed_form():
    """Half masked: 8 of 16 tokens in three blocks of width 32, 16 in two of width 16, and what is computed once per image."""
    blocks = 3 * block_flops(8, 32) + 2 * block_flops(16, 16)
    modulation = 2 * 32 * (3 * 6 * 32 + 2 * 32 + 2 * 6 * 16 + 2 * 16)  # encoder blocks, decoder_layer, decoder blocks, final_layer
    ends = 2 * (8 * 16 * 32 + 8 * 32 * 16 + 16 * 16 * 16)  # patches of 16 numbers in, projection to the decoder, 16 numbers out
    conditioning = 2 * (256 * 32 + 32 * 32)
    assert model_flops(config(*TINY), 0.5) == blocks + modulation + ends + conditioning


@pytest.mark.parametrize("overrides, gflops", [
    ([], 130.9), (["train.mask_ratio=0"], 251.5), (["train.mask_ratio=0", "model.use_decoder=false"], 237.2)])
def test_flops_of_xl2(overrides, gflops):
    """Worked out apart, forward pass; training is three times as much, but for the input's gradient, which nobody needs."""
    settings = config(*overrides)
    forward, training = (model_flops(settings, settings.train.mask_ratio, training=training) for training in (False, True))
    assert forward == pytest.approx(1e9 * gflops, rel=1e-3) and training == pytest.approx(3 * forward, rel=1e-3)


def kept_by_a_real_pass(amp, compiled, batch, depth, decoder_depth):
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    net = build_model("DiT-S/2", in_size=32, in_channels=4, num_classes=10, depth=depth, width=96, num_heads=2,
                      decoder_depth=decoder_depth, decoder_width=64, decoder_num_heads=2)
    if compiled:  # as far as the choice of what is kept; kernels do not matter here
        torch.compiler.reset()
        net.compile_blocks(backend="aot_eager_decomp_partition")
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # the storage itself: held, so that no address comes twice
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if amp != "no" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        net(torch.randn(batch, 4, 32, 32), torch.ones(batch), torch.arange(batch), random_mask(batch, 256, 0.5))
    return sum(storage.nbytes() for storage in kept.values())


def counted_bytes(amp, batch, depth, decoder_depth):
    sizes = ["model.width=96", "model.num_heads=2", "model.decoder_width=64", "model.decoder_num_heads=2"]
    settings = config("model.model_type=DiT-S/2", f"model.depth={depth}", f"model.decoder_depth={decoder_depth}", *sizes)
    return kept_bytes(settings, 0.5, amp, batch)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_counted_activations_are_those_that_the_blocks_keep(monkeypatch, amp, compiled):
    """Two more encoder blocks and one more decoder block, four more images."""
    # as on a GPU, where attention in low precision is one kernel; the CPU's plain products keep the scores
    monkeypatch.setattr(layers, "attention", F.scaled_dot_product_attention)
    shallow, deep = ((1, 1), (3, 2))
    kept = {(batch, depths): kept_by_a_real_pass(amp, compiled, batch, *depths) for batch in (2, 6) for depths in (shallow, deep)}
    counted = {(batch, depths): counted_bytes(amp, batch, *depths) for batch in (2, 6) for depths in (shallow, deep)}
    real, wanted = (table[6, deep] - table[2, deep] - table[6, shallow] + table[2, shallow] for table in (kept, counted))
    assert real == pytest.approx(wanted * (estimate.COMPILED_KEEPS[amp] if compiled else 1), rel=0.02)


@functools.cache
def count(*overrides):
    """What XL/2 needs, for any batch."""
    return estimate.count(config(*overrides))


def memory(batch, *overrides, num_gpus=8):
    return estimate.memory_gb(config(f"train.batchsize={batch}", *overrides).train, count(*overrides), num_gpus)


def test_half_masked_xl_fits_small_gpus():
    """Batch 32 in 24 GiB, compiled or with activation checkpointing, and on one GPU as it is; batch 128 in 50 GB."""
    limit, eager = 24 * 2**30 / 1e9, "train.compile=false"
    assert memory(32, "train.compile=true") < limit - 2
    assert memory(32, "train.activation_checkpointing=true", eager) < limit - 7
    assert memory(32, eager) < limit
    assert memory(32, eager, num_gpus=1) < limit - 3
    assert memory(128, eager) < 50


def test_gradients_and_activations_share_memory_unless_gradients_stay():
    work = {"weights": 10**9, "kept_per_image": 10**8, "kept_copies": 0}
    train = config("train.batchsize=10").train
    assert estimate.memory_gb(train, work, 1) == 16 + 4 + estimate.CONTEXT_GB  # 1 GB of activations is less than the gradients
    assert estimate.memory_gb(train, work, 8) == 16 + 4 + 1 + estimate.CONTEXT_GB
    assert estimate.memory_gb(config("train.batchsize=10", "train.grad_accum=2").train, work, 1) == 16 + 4 + 0.5 + estimate.CONTEXT_GB
    sharded = config("train.batchsize=10", "train.shard=true").train
    assert estimate.memory_gb(sharded, work, 8) == 4 + 12 / 8 + 4 + 1 + estimate.CONTEXT_GB


def test_the_paper_is_met_in_memory_and_reached_the_stated_utilisation():
    """Six bars, read off within 3 %: memory within 10 %; utilisation from 0.23 to 0.44, 0.35 with AMP at batch 1024, the default."""
    reached = {}
    for (name, decoder, amp, batch), (steps_per_s, gigabytes) in PAPER_BARS.items():
        overrides = f"model.use_decoder={decoder}", f"train.mask_ratio={0.5 if decoder else 0}", f"train.amp={amp}", "train.compile=false"
        assert memory(batch // 8, *overrides) == pytest.approx(gigabytes, rel=0.10), (name, batch)
        train = config(f"train.batchsize={batch // 8}", *overrides).train
        reached[name, batch] = steps_per_s * estimate.compute_seconds(train, count(*overrides), "a100", utilisation=1.0)
    assert min(reached.values()) == pytest.approx(0.23, abs=0.005) and max(reached.values()) == pytest.approx(0.435, abs=0.005)
    assert reached["MaskDiT AMP", 1024] == pytest.approx(estimate.parse_arguments([])[0].utilisation, abs=0.005)


def test_time_and_cost_follow_from_flops():
    """100 images of 1 TFLOP at half of 989 TFLOP/s are 0.2022 s; 18,000 steps are 1.011 hours, on 4 GPUs at 3 $ 12.13 $."""
    work = {"weights": 10**6, "flops": 1e12, "launches": 1000, "kept_per_image": 0, "kept_copies": 0}
    row = estimate.run_row(config("train.batchsize=100", "train.max_num_steps=18000").train, work, "h100", 4, utilisation=0.5, price=3.0)
    assert row["steps/s"] == pytest.approx(4.945) and row["img/s per GPU"] == pytest.approx(494.5) and row["batch"] == 400
    assert row["hours"] == pytest.approx(1.0111, abs=1e-4) and row["$"] == pytest.approx(12.133, abs=1e-3)
    assert row["GB sent per step"] == pytest.approx(2 * 3 / 4 * 4 * 1e-3)


def test_a_step_takes_no_less_than_its_launches():
    """10,000 launches of 28 us in each of two rounds are 0.56 s, more than 100 images of 1 TFLOP at the peak."""
    work = {"weights": 10**6, "flops": 1e12, "launches": 10000, "kept_per_image": 0, "kept_copies": 0}
    row = estimate.run_row(config("train.batchsize=100", "train.grad_accum=2").train, work, "h100", 1, utilisation=1.0, price=1.0)
    assert row["host ms"] == pytest.approx(560) and row["steps/s"] == pytest.approx(1 / 0.56)


def test_recomputing_costs_a_forward_pass_and_a_schedule_its_mean_ratio():
    plain, recomputed = (estimate.count(config(*TINY, f"train.activation_checkpointing={on}"))["flops"] for on in (False, True))
    assert plain * 1.25 < recomputed < plain * 4 / 3  # all blocks, not the layers around them
    falling = estimate.count(config(*TINY, "train.mask_ratio_fn=linear"))["flops"]
    assert falling == model_flops(config(*TINY), 0.25, training=True)


def test_command_line_prints_a_row_per_gpu_and_count(capsys):
    estimate.main(["--gpu", "h100,a100", "--gpus", "8,64", *TINY])
    text = capsys.readouterr().out
    assert [name for name in ("8 h100", "64 h100", "8 a100", "64 a100") if name not in text] == []
    assert f"{count_weights(config(*TINY)) / 1e6:.1f} million weights" in text


@pytest.mark.parametrize("arguments, message", [(["--gpu", "v100"], "--gpu v100 is unknown; known are a100, h100"),
                                                (["--gpus", "8,0"], "--gpus 8,0: wanted numbers above 0"),
                                                (["--utilisation", "35"], "--utilisation 35.0: wanted a number above 0, at most 1"),
                                                (["train.lrr=1"], "unknown key 'train.lrr'")])
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate.main(arguments)
