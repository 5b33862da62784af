import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import models
from models.layers import attention, patchify, sincos_positions, unpatchify
from utils.cli import UserError

PARAMETER_COUNTS = {"S": 68_346_496, "B": 175_909_888, "L": 510_176_512, "XL": 730_541_440, "H": 1_010_002_432}
NUM_HEADS = {"S": 6, "B": 12, "L": 16, "XL": 16, "H": 16}  # they change no parameter, only its meaning
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes CPU kernels with a C++ compiler, and there is none")
TINY = dict(in_size=8, in_channels=3, num_classes=7, depth=2, width=24, num_heads=3, decoder_depth=2, decoder_width=16, decoder_num_heads=2)


def tiny_net(num_classes=7, use_decoder=True, **changes):
    """A network for 3-channel 8x8 latents, 16 patches, with all weights random so that nothing is hidden by zeros."""
    torch.manual_seed(0)
    net = models.build_model("DiT-S/2", **{**TINY, "num_classes": num_classes, "use_decoder": use_decoder, **changes})
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture
def batch():
    """x, sigma and labels of five samples, one of them unconditional."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 8, 8, generator=generator)
    return x, torch.tensor([0.1, 0.3, 1.0, 5.0, 40.0]), torch.tensor([0, 6, 7, 3, 3])


# ---- names, counts, initial values

@pytest.mark.parametrize("size", PARAMETER_COUNTS)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        net = models.build_model(f"DiT-{size}/8", in_size=32, in_channels=4, num_classes=1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETER_COUNTS[size]
    assert (net.model.blocks[0].attn.num_heads, net.model.decoder_blocks[0].attn.num_heads) == (NUM_HEADS[size], 16)


def test_parameter_names_are_the_published_ones():
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "decoder_layer.linear",
              "decoder_layer.adaLN_modulation.1", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [f"{blocks}.{n}.{layer}" for blocks in ("blocks", "decoder_blocks") for n in range(2)
               for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    names = {f"model.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names |= {"model.y_embedder.embedding_table.weight", "model.pos_embed", "model.decoder_pos_embed", "model.mask_token"}
    net = tiny_net()
    assert set(net.state_dict()) == names
    assert net.state_dict()["model.y_embedder.embedding_table.weight"].shape == (24, 7)
    assert not net.model.pos_embed.requires_grad and not net.model.decoder_pos_embed.requires_grad


def test_plain_and_unconditional_models_have_no_other_parameters():
    names = set(tiny_net(num_classes=0, use_decoder=False).state_dict())
    assert not [name for name in names if "decoder" in name or "mask_token" in name or "y_embedder" in name]


def test_fresh_network_predicts_only_the_skip_path(batch):
    """adaLN-Zero and a zero final layer: D = c_skip * x, whatever the mask."""
    x, sigma, class_labels = batch
    net = models.build_model("DiT-S/2", **TINY)
    c_skip = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net(x, sigma, class_labels, models.random_mask(5, 16, 0.5)), c_skip * x)


def test_initial_weights():
    torch.manual_seed(0)
    model = models.build_model("DiT-S/2", in_size=32, in_channels=4, num_classes=1000, depth=1, decoder_depth=1).model
    # the bound of Xavier-uniform, reached within 1% by thousands of weights
    for weight in (model.x_embedder.proj.weight, model.blocks[0].mlp.fc1.weight):
        bound = math.sqrt(6 / (weight.shape[0] + weight[0].numel()))
        assert 0.99 * bound < weight.abs().max() <= bound
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[2].weight, model.mask_token):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.blocks[0].attn.qkv.bias.any() and not model.decoder_layer.linear.weight.any()
    for layer in (*model.blocks, *model.decoder_blocks, model.decoder_layer, model.final_layer):  # blocks start as the identity
        assert not layer.adaLN_modulation[1].weight.any() and not layer.adaLN_modulation[1].bias.any()


def test_positions_have_the_column_first_then_the_row():
    table = sincos_positions(width=16, grid=3)[0].reshape(3, 3, 16)  # row, column
    assert table[2, 1, 0].item() == pytest.approx(math.sin(1))
    assert table[2, 1, 4].item() == pytest.approx(math.cos(1))
    assert table[2, 1, 8].item() == pytest.approx(math.sin(2))
    assert table[2, 1, 15].item() == pytest.approx(math.cos(2 / 10000**0.75))


def test_unpatchify_inverts_patchify():
    images = torch.randn(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert torch.equal(patches[1, 2], images[1, :, 4:8, 0:4].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 4), images)


# ---- the fast path equals the method as it is usually written

def slow_network(model, x, c_noise, class_labels, mask):
    """Embed everything by convolution, add positions, then drop; back in image order before the decoder; one-hot labels."""
    batch_size, grid = len(x), model.in_size // model.patch_size
    one_hot = F.one_hot(class_labels, model.num_classes + 1)[:, : model.num_classes].float()
    c = model.t_embedder(c_noise) + one_hot @ model.y_embedder.embedding_table.weight.t()
    tokens = model.x_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed
    tokens = torch.stack([tokens[b, mask.ids_keep[b]] for b in range(batch_size)])
    for block in model.blocks:
        tokens = block(tokens, c)
    tokens = model.decoder_layer(tokens, c)
    whole = model.mask_token.repeat(batch_size, grid**2, 1)
    for b in range(batch_size):
        whole[b, mask.ids_keep[b]] = tokens[b]
    tokens = whole + model.decoder_pos_embed
    for block in model.decoder_blocks:
        tokens = block(tokens, c)
    patches = model.final_layer(tokens, c)
    patches = patches.reshape(batch_size, grid, grid, model.patch_size, model.patch_size, model.in_channels)
    return torch.einsum("brcpqk->bkrpcq", patches).reshape(x.shape)


@pytest.mark.parametrize("num_keep", [1, 8, 16])
def test_shuffled_order_equals_image_order(batch, num_keep):
    x, sigma, class_labels = batch
    model = tiny_net().model
    mask = models.random_mask(5, 16, 1 - num_keep / 16)
    results = []
    for forward in (model, lambda *inputs: slow_network(model, *inputs)):
        model.zero_grad()
        output = forward(x, sigma.log() / 4, class_labels, mask)
        output.square().sum().backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    (fast, fast_grads), (slow, slow_grads) = results
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)  # float32, other orders of summation
    for name, grad in slow_grads.items():
        torch.testing.assert_close(fast_grads[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)


def test_mask_that_removes_nothing_equals_no_mask(batch):
    net = tiny_net()
    torch.testing.assert_close(net(*batch, models.random_mask(5, 16, 0.0)), net(*batch), rtol=1e-5, atol=1e-5)


def test_removed_patches_do_not_reach_the_encoder(batch):
    """Only their own skip path sees them: the network's output does not change with them."""
    x, sigma, class_labels = batch
    net, mask = tiny_net(), models.random_mask(5, 16, 0.5)
    removed = unpatchify(mask.mask.unsqueeze(-1).expand(-1, -1, 2 * 2 * 3), 2)
    c_noise = sigma.log() / 4
    assert torch.equal(net.model(x, c_noise, class_labels, mask), net.model(x + 9 * removed, c_noise, class_labels, mask))


def test_bfloat16_is_close_to_float32(batch):
    """Also holds the attention that is used for bfloat16 on a CPU. bfloat16 has 8 bits: errors of a few percent."""
    net, mask = tiny_net(), models.random_mask(5, 16, 0.5)
    exact = net(*batch, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(*batch, mask)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


@torch.no_grad()
def test_layers_cast_once_give_the_numbers_of_autocast(batch):
    net = tiny_net().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(*batch)
        net.cast_layers(torch.bfloat16)
        assert torch.equal(net(*batch), expected)
    kept = {name.split(".")[1] for name, parameter in net.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"x_embedder", "t_embedder", "y_embedder", "pos_embed", "decoder_pos_embed", "mask_token"}


@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_bfloat16_attention_on_a_cpu_is_softmax_attention(backend, sharpness):
    """sharpness 30: scores up to 130, whose exponentials overflow unless the largest is taken off first."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 64, 32, generator=generator).mul(factor).bfloat16().requires_grad_() for factor in (sharpness, 1, 1)]
    direction = torch.randn(2, 3, 64, 32, generator=generator)
    form = attention if backend is None else torch.compile(attention, backend=backend)

    def output_and_gradients(function, inputs):
        output = function(*inputs)
        return output, *torch.autograd.grad((output.float() * direction).sum(), inputs)

    exact = output_and_gradients(F.scaled_dot_product_attention, [tensor.float() for tensor in inputs])
    for rounded, wanted in zip(output_and_gradients(form, inputs), exact):
        assert rounded.dtype == torch.bfloat16
        # every number is rounded to 2^-9 several times, scores too, which exp magnifies
        assert (rounded.float() - wanted).norm() / wanted.norm() < (0.01 if sharpness == 1 else 0.1)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_activation_checkpointing_changes_no_gradient(batch, mask_ratio):
    mask = models.random_mask(5, 16, mask_ratio)
    grads, calls = [], []
    for flag in (False, True):
        net = tiny_net(activation_checkpointing=flag)
        calls.append([])
        for block in (*net.model.blocks, *net.model.decoder_blocks):
            block.norm1.register_forward_hook(lambda *_: calls[-1].append(1))
        net(*batch, mask).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*grads):
        assert torch.equal(plain, recomputed)
    assert [len(called) for called in calls] == [4, 8]  # every block runs once more in the backward pass


@pytest.mark.parametrize("mask_ratio", [None, 0.0, 0.5])
@pytest.mark.parametrize("class_labels", [None, [7] * 5, [0, 1, 2, 7, 7]])
def test_every_trainable_parameter_gets_a_gradient(batch, mask_ratio, class_labels):
    """DDP waits for all of them, so none may be left out by a mask ratio or by dropped labels."""
    x, sigma, _ = batch
    net = tiny_net()
    mask = None if mask_ratio is None else models.random_mask(5, 16, mask_ratio)
    net(x, sigma, class_labels and torch.tensor(class_labels), mask).sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_plain_and_unconditional_models_train(batch):
    x, sigma, _ = batch
    net = tiny_net(num_classes=0, use_decoder=False)
    net(x, sigma).sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_compiled_blocks_keep_names_and_share_graphs_over_token_counts(batch):
    """One graph per width, although the number of kept tokens changes. Traced, not translated to C++: seconds."""
    net = tiny_net()
    names, masks = list(net.state_dict()), [models.random_mask(5, 16, 1 - n / 16) for n in (8, 5, 11)]
    expected = [net(*batch, mask) for mask in masks]
    num_graphs = 0

    def count(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    torch.compiler.reset()
    net.compile_blocks(backend=count, dynamic=True)
    for mask, output in zip(masks, expected):
        torch.testing.assert_close(net(*batch, mask), output)
    assert list(net.state_dict()) == names
    assert num_graphs == 2


# ---- bad input

@pytest.mark.parametrize("model_type, known", [
    ("DiT-XXL/2", "S, B, L, XL, H and PATCH one of 1, 2, 4, 8"), ("DiT-S/3", "one of 1, 2, 4, 8"), ("DiT-S", "one of 1, 2, 4, 8"),
    ("S/2", "one of DiT, as in DiT-XL/2"), ("", "one of DiT"), (None, "one of DiT")])
def test_unknown_model_type_names_the_known_ones(model_type, known):
    with pytest.raises(UserError, match=f"model.model_type={model_type!r} is unknown.*{known}"):
        models.build_model(model_type, **TINY)


def test_an_option_that_the_network_does_not_take_is_named():
    with pytest.raises(UserError, match="model.options does not fit MaskDiT: got an unexpected keyword argument 'depht'; it takes .* depth, width"):
        models.build_model("DiT-S/2", **TINY, depht=3)
    with pytest.raises(UserError, match="missing a required argument: 'num_classes'"):
        models.build_model("DiT-S/2", in_size=8, in_channels=3)


# ---- a network of one's own

class Toy(torch.nn.Module):
    """One linear layer on all pixels, as models/__init__.py says what a network needs."""
    patch_size = 4

    def __init__(self, model_type, in_size, in_channels, num_classes, gain=1.0, **unused):
        super().__init__()
        self.in_size, self.in_channels, self.num_classes = in_size, in_channels, num_classes
        self.num_tokens = (in_size // self.patch_size) ** 2
        self.gain, self.layer = gain, torch.nn.Linear(in_channels * in_size**2, in_channels * in_size**2)

    def forward(self, x, c_noise, class_labels, mask):
        return self.gain * self.layer(x.flatten(1)).reshape(x.shape)


def test_a_network_from_outside_is_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(models.MODELS, "Toy", Toy)
    net = models.build_model("Toy-anything", **TINY, activation_checkpointing=True, gain=0.5)
    assert isinstance(net, models.EDMPrecond) and net.model.gain == 0.5 and net.num_tokens == 4
    losses = models.EDMLoss(patch_size=net.patch_size)(net, torch.randn(2, 3, 8, 8), torch.tensor([0, 7]), mask_ratio=0.5)
    (losses["denoising"] + losses["mae"]).sum().backward()
    assert net.model.layer.weight.grad.any()
    net.compile_blocks(backend="eager")  # neither knows a DiTBlock here: nothing changes
    net.cast_layers(torch.bfloat16)
    latents = models.edm_sampler(models.guided(net.eval(), 2.0), torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), num_steps=2)
    assert latents.shape == (2, 3, 8, 8) and latents.isfinite().all()


@pytest.mark.parametrize("changes, message", [
    (dict(in_size=9), "model.in_size=9 must be divisible by the patch size, 2 in DiT-S/2"),
    (dict(width=25), "model.width=25 must be divisible by model.num_heads=3"),
    (dict(width=30), "model.width=30 must be divisible by 4"),
    (dict(decoder_width=18, decoder_num_heads=4), "model.decoder_width=18 must be divisible by model.decoder_num_heads=4"),
])
def test_sizes_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        models.build_model(**{"model_type": "DiT-S/2", **TINY, **changes})


def test_mask_without_decoder_is_refused(batch):
    with pytest.raises(ValueError, match="use_decoder=True"):
        tiny_net(use_decoder=False)(*batch, models.random_mask(5, 16, 0.5))
