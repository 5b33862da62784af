"""The fast path equals the plain one of the benchmarks: the same weights, the same random draws, float32."""

import copy
import shutil

import pytest
import torch

import models
from benchmarks.reference import PlainTraining, plain_guided, plain_loss
from training.optim import mask_ratio
from utils.config import from_dict, load_config
from training.ema import EMA
from utils.precision import compile_options
from training.loop import TrainState, make_loss, step_seed, train_step

MODEL = {"model_type": "DiT-S/2", "in_size": 8, "in_channels": 3, "num_classes": 7, "depth": 2, "width": 24, "num_heads": 3,
         "decoder_depth": 2, "decoder_width": 16, "decoder_num_heads": 2}


def tiny_net(**options):
    """A network with all weights random, so that no zero hides a difference."""
    torch.manual_seed(0)
    net = models.build_model(**MODEL, **options)
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture
def latents():
    return 0.5 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 6, 7, 3, 3])  # 7: unconditional


def one_hot(labels):
    return torch.nn.functional.one_hot(labels, 8)[:, :7].float()


def total(losses):
    return losses["denoising"] + 0.1 * losses["mae"]


def compare_with_plain(fast, latents, mask_ratio):
    """Loss within 1e-6 and gradients within 1e-5, relative: float32 sums in other orders."""
    plain, generator = copy.deepcopy(fast), torch.Generator()
    fast_loss = total(models.EDMLoss()(fast, latents, LABELS, mask_ratio, generator.manual_seed(2)))
    plain_losses = plain_loss(plain, latents, one_hot(LABELS), mask_ratio, generator.manual_seed(2))
    torch.testing.assert_close(fast_loss, plain_losses, rtol=1e-6, atol=1e-6)
    fast_loss.mean().backward()
    plain_losses.mean().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            # the plain path gives the mask token no gradient when nothing is removed; ours is zero then
            grad = torch.zeros_like(parameter) if wanted[name].grad is None else wanted[name].grad
            assert (parameter.grad - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fast_loss_and_gradients_equal_the_plain_ones(latents, mask_ratio, checkpointing):
    compare_with_plain(tiny_net(activation_checkpointing=checkpointing), latents, mask_ratio)


SWITCHES = [[], ["train.mask_ratio_fn=cosine4"], ["train.activation_checkpointing=true"]]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_compiled_loss_and_gradients_equal_the_plain_ones(latents, switches, mask_ratio):
    """Traced and differentiated as a compiler sees it, then run as it is: the compiled kernels are in the slow test."""
    torch.compiler.reset()
    config = load_config(overrides=["train.compile=true", *switches])
    fast = tiny_net(activation_checkpointing=config.train.activation_checkpointing)
    fast.compile_blocks(backend="aot_eager", dynamic=compile_options(config.train)["dynamic"])
    compare_with_plain(fast, latents, mask_ratio)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes CPU kernels with a C++ compiler, and there is none")
@pytest.mark.parametrize("switches", SWITCHES)
def test_compiled_kernels_equal_the_plain_path(latents, switches):
    torch.compiler.reset()
    config = load_config(overrides=["train.compile=true", *switches])
    fast = tiny_net(activation_checkpointing=config.train.activation_checkpointing)
    fast.compile_blocks(**compile_options(config.train))
    compare_with_plain(fast, latents, 0.5)


@pytest.mark.parametrize("settings, graphs", [
    (["train.mask_ratio_fn=cosine4"], (2, 2)),  # a graph per width, although the first count equals the batch
    ([], (2, 2))])
def test_a_schedule_compiles_few_graphs(settings, graphs):
    torch.compiler.reset()
    train, net = load_config(overrides=["train.compile=true", *settings]).train, tiny_net()
    latents, labels, made = torch.randn(8, 3, 8, 8), torch.arange(8) % 7, []

    def count(graph, inputs):
        made.append(graph)
        return graph

    net.compile_blocks(backend=count, dynamic=compile_options(train)["dynamic"])
    loss = make_loss(train, net)
    for progress in range(11):
        total(loss(net, latents, labels, mask_ratio(train, progress / 10))).mean().backward()
    assert graphs[0] <= len(made) <= graphs[1]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_fast_sampling_equals_the_plain_one(latents, cfg_scale):
    fast = tiny_net()
    labels = torch.tensor([0, 6, 2, 3, 3])
    plain = models.edm_sampler(plain_guided(fast, cfg_scale), latents, labels, num_steps=5)
    sampled = models.edm_sampler(models.guided(fast, cfg_scale), latents, labels, num_steps=5)
    torch.testing.assert_close(sampled, plain, rtol=1e-5, atol=1e-5)


def test_training_steps_of_the_trainer_equal_plain_ones():
    """Losses of five steps of the real `train_step`: draws, fused AdamW and masks give the plain path's numbers."""
    # The class table's rows that no label asks for have gradients of exactly zero in both; the learning rate is small because
    # AdamW's first steps are lr * sign(gradient), whatever the gradient's size, and rounding decides the sign of tiny ones.
    config = from_dict({"model": MODEL, "train": {"amp": "no", "batchsize": 6, "lr": 1e-5, "ema_decay": 0.9}})
    device = torch.device("cpu")
    net = tiny_net()
    plain = PlainTraining(net, config.train, device)
    state = TrainState(net, config, device)
    generator, data = torch.Generator(), torch.Generator().manual_seed(3)
    loss = models.EDMLoss(patch_size=2)
    for step in range(5):
        batch = 0.5 * torch.randn(6, 3, 8, 8, generator=data)
        labels = torch.randint(7, (6,), generator=data)
        train_step(state, state.net, loss, batch, labels, lambda latents, _: latents, generator)
        plain_value = plain.step(batch, labels, generator.manual_seed(step_seed(config.train.seed, 0, step)))
        fast_value = state.sums[state.measured.index("loss")].item()
        state.sums.zero_()
        assert fast_value == pytest.approx(plain_value.item(), rel=1e-5)
    for average, wanted in zip(state.ema.net.parameters(), plain.ema.parameters()):
        torch.testing.assert_close(average, wanted, rtol=0, atol=5e-5)  # five steps of at most lr each


def test_foreach_ema_equals_the_plain_one():
    net = tiny_net()
    config = from_dict({"model": MODEL, "train": {"ema_decay": 0.9}})
    plain, fast = PlainTraining(net, config.train, torch.device("cpu")), EMA(net, 0.9)
    for weights in (net, plain.net):
        for parameter in weights.parameters():
            parameter.data.mul_(1.5).add_(0.25)
    plain.update_ema()
    fast.update()
    for average, wanted in zip(fast.net.parameters(), plain.ema.parameters()):
        torch.testing.assert_close(average, wanted)
