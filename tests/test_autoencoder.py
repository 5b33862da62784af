"""The autoencoder's three forms. The latent-diffusion form is compared with a slow forward pass written here."""

import collections
import json
import time

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from models import autoencoder as module
from models import load_autoencoder, sample_moments
from utils.cli import UserError

LATENT_CHANNELS = 5


def latent_diffusion_state(width=32, multiples=(1, 2), blocks=1, z=LATENT_CHANNELS, device="cpu"):
    """Random tensors under latent-diffusion names, as its paper's autoencoder has them; seeded."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    state = {}

    def put(name, *shape):
        if device == "meta":
            state[name] = torch.empty(shape, device="meta")
        else:
            state[name] = torch.randn(shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5

    def conv(name, out, into, kernel):
        put(f"{name}.weight", out, into, kernel, kernel)
        put(f"{name}.bias", out)

    def norm(name, channels):
        put(f"{name}.weight", channels)
        put(f"{name}.bias", channels)

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name, channels):
        block(f"{name}.block_1", channels, channels)
        norm(f"{name}.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", channels, channels, 1)
        block(f"{name}.block_2", channels, channels)

    widths = [width * multiple for multiple in multiples]
    conv("encoder.conv_in", widths[0], 3, 3)
    channels = widths[0]
    for level, out in enumerate(widths):
        for index in range(blocks):
            block(f"encoder.down.{level}.block.{index}", channels, out)
            channels = out
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", out, out, 3)
    middle("encoder.mid", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", 2 * z, channels, 3)
    conv("quant_conv", 2 * z, 2 * z, 1)
    conv("post_quant_conv", z, z, 1)
    conv("decoder.conv_in", channels, z, 3)
    middle("decoder.mid", channels)
    for level, out in reversed(list(enumerate(widths))):
        for index in range(blocks + 1):
            block(f"decoder.up.{level}.block.{index}", channels, out)
            channels = out
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", out, out, 3)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", 3, channels, 3)
    return state


class SlowReference:
    """Encode and decode straight from the names: groups of 32 channels, eps 1e-6, one attention head."""

    def __init__(self, state):
        self.state = state
        self.levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))

    def conv(self, name, x, **kwargs):
        weight = self.state[f"{name}.weight"]
        kwargs.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **kwargs)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def blocks(self, name, x):
        index = 0
        while f"{name}.block.{index}.conv1.weight" in self.state:
            x = self.block(f"{name}.block.{index}", x)
            index += 1
        return x

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")              # (B, C, hw)
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=-1)           # (B, hw, hw)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def middle(self, name, x):
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def encode(self, images):
        x = self.conv("encoder.conv_in", images)
        for level in range(self.levels):
            x = self.blocks(f"encoder.down.{level}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.middle("encoder.mid", x)
        return self.conv("quant_conv", self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x))))

    def decode(self, z):
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for level in reversed(range(self.levels)):
            x = self.blocks(f"decoder.up.{level}", x)
            if level > 0:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


def small_vae(**changes):
    torch.manual_seed(2)
    arguments = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=LATENT_CHANNELS,
                     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                     mid_block_add_attention=False)
    return AutoencoderKL(**{**arguments, **changes})


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def small(tmp_path):
    small_vae().save_pretrained(tmp_path / "small")
    return load_autoencoder(tmp_path / "small")


@pytest.mark.parametrize("layout", [dict(), dict(multiples=(1, 2, 2), blocks=2)])
def test_latent_diffusion_file_equals_slow_reference(tmp_path, images, layout):
    state = latent_diffusion_state(**layout)
    torch.save(state, tmp_path / "autoencoder_kl.pth")
    autoencoder = load_autoencoder(tmp_path / "autoencoder_kl.pth")
    reference = SlowReference(state)
    moments = reference.encode(images)
    # float32 sums in another order; values are of order 1
    torch.testing.assert_close(autoencoder.encode_moments(images), moments, atol=2e-5, rtol=2e-5)
    z = moments[:, :LATENT_CHANNELS]
    torch.testing.assert_close(autoencoder.decode(0.18215 * z), reference.decode(z), atol=2e-5, rtol=2e-5)
    assert (autoencoder.scale, autoencoder.shift) == (0.18215, 0.0)
    assert autoencoder.latent_channels == LATENT_CHANNELS
    assert autoencoder.downsample == images.shape[-1] // moments.shape[-1]


def test_stable_diffusion_layout_has_248_tensors_and_every_one_is_mapped():
    state = latent_diffusion_state(width=128, multiples=(1, 2, 4, 4), blocks=2, z=4, device="meta")
    assert len(state) == 248
    architecture = module._architecture("file", state)
    with torch.device("meta"):
        wanted = AutoencoderKL(**architecture).state_dict()
    converted = convert_ldm_vae_checkpoint(state, architecture)
    assert {name: value.shape for name, value in converted.items()} == {name: value.shape for name, value in wanted.items()}
    assert sum(value.numel() for value in wanted.values()) == 83_653_863  # the size of Stable Diffusion's autoencoder


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "global_step": 7},
    lambda state: {f"first_stage_model.{key}": value for key, value in state.items()} | {"model.x": torch.ones(1)},
    lambda state: state | {"loss.logvar": torch.ones(())},
])
def test_wrapped_state_dicts_load_alike(tmp_path, images, wrap):
    state = latent_diffusion_state()
    torch.save(state, tmp_path / "bare.pth")
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    bare, wrapped = (load_autoencoder(tmp_path / name) for name in ("bare.pth", "wrapped.pth"))
    assert torch.equal(wrapped.encode_moments(images), bare.encode_moments(images))


@pytest.mark.parametrize("folder", ["", "vae"])
@pytest.mark.parametrize("shift", [None, 0.25])
def test_diffusers_folder_equals_the_model_that_was_saved(tmp_path, images, folder, shift):
    vae = small_vae(scaling_factor=0.5, shift_factor=shift)
    vae.save_pretrained(tmp_path / folder)
    autoencoder = load_autoencoder(tmp_path)
    with torch.no_grad():
        moments = vae.encode(images).latent_dist.parameters
        z = moments[:, :LATENT_CHANNELS]
        decoded = vae.decode(z).sample
    assert torch.equal(autoencoder.encode_moments(images), moments)
    # scaling and its inverse round once each
    latents = autoencoder.scale * (z - autoencoder.shift)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    assert (autoencoder.scale, autoencoder.shift) == (0.5, shift or 0.0)


def test_half_precision_folder_loads_in_float32_frozen_and_silent(tmp_path, images, capfd):
    small_vae().half().save_pretrained(tmp_path)
    capfd.readouterr()
    autoencoder = load_autoencoder(tmp_path)
    assert "".join(capfd.readouterr()) == ""
    assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert not autoencoder.vae.training
    assert load_autoencoder(tmp_path, dtype=torch.bfloat16).encode_moments(images).dtype == torch.float32


def test_sample_moments_has_the_posterior_mean_and_std():
    moments = torch.tensor([1.0, -2.0, 0.0, -200.0]).view(1, 4, 1, 1).expand(3, 4, 100, 100)
    latents = sample_moments(moments, torch.Generator().manual_seed(0), scale=0.5, shift=0.25)
    assert latents.shape == (3, 2, 100, 100) and latents.dtype == torch.float32
    # 30,000 draws of N(0.375, 0.5^2): standard error of the mean 0.003, of the std 0.002; five of them
    assert abs(latents[:, 0].mean() - 0.5 * (1 - 0.25)) < 0.015
    assert abs(latents[:, 0].std() - 0.5) < 0.01
    # log-variance -200 is clamped to -30: std 0.5 * exp(-15) = 1.5e-7
    assert 0 < (latents[:, 1] - 0.5 * (-2 - 0.25)).abs().max() < 1e-6
    assert torch.equal(latents, sample_moments(moments, torch.Generator().manual_seed(0), scale=0.5, shift=0.25))
    # log-variance 200 is clamped to 20: std 0.5 * exp(10) = 11013; 30,000 draws, five standard errors are 2 %
    wide = sample_moments(torch.tensor([0.0, 200.0]).view(1, 2, 1, 1).expand(3, 2, 100, 100), torch.Generator().manual_seed(0), scale=0.5)
    assert wide.std().item() == pytest.approx(0.5 * 2.718281828**10, rel=0.03)


def test_scale_and_shift_may_differ_by_channel(small):
    moments = torch.tensor([1.0, -2.0, -200.0, -200.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3)  # standard deviations of 1.5e-7
    latents = sample_moments(moments, scale=[0.5, 2.0], shift=(0.25, -1.0))
    torch.testing.assert_close(latents[0, :, 1, 1], torch.tensor([0.5 * (1 - 0.25), 2.0 * (-2 + 1)]), atol=1e-5, rtol=0)
    torch.testing.assert_close(sample_moments(moments, scale=[0.5, 2.0]), sample_moments(moments, scale=torch.tensor([0.5, 2.0])), atol=1e-5, rtol=0)
    z = torch.randn(2, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(5))
    small.scale, small.shift = 1.0, 0.0
    images = small.decode(z)
    small.scale, small.shift = [0.5, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    columns = torch.tensor([small.scale, small.shift]).view(2, 1, LATENT_CHANNELS, 1, 1)
    torch.testing.assert_close(small.decode(columns[0] * (z - columns[1])), images, atol=1e-4, rtol=1e-4)


def test_the_digest_names_the_weights_in_every_format(tmp_path):
    state = latent_diffusion_state()
    torch.save(state, tmp_path / "vae.pth")
    torch.save({"state_dict": dict(reversed(state.items()))}, tmp_path / "wrapped.pth")
    autoencoder = load_autoencoder(tmp_path / "vae.pth")
    autoencoder.vae.save_pretrained(tmp_path / "folder")
    digests = {load_autoencoder(tmp_path / name).digest for name in ("vae.pth", "wrapped.pth", "folder")}
    assert digests == {autoencoder.digest} == {load_autoencoder(tmp_path / "folder", dtype=torch.bfloat16).digest}
    assert len(autoencoder.digest) == 16 and set(autoencoder.digest) <= set("0123456789abcdef")
    state["quant_conv.bias"][0] += 1e-6
    torch.save(state, tmp_path / "other.pth")
    assert load_autoencoder(tmp_path / "other.pth").digest != autoencoder.digest


def test_the_same_numbers_under_other_names_have_another_digest():
    one, other = (torch.nn.ModuleDict({name: torch.nn.Linear(2, 3)}) for name in ("conv1", "conv2"))
    other["conv2"].load_state_dict(one["conv1"].state_dict())
    assert module._digest(one) != module._digest(other)


def test_sample_moments_refuses_an_odd_channel_count():
    with pytest.raises(ValueError, match="3 channels"):
        sample_moments(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("fits", [1, 2, 5])
def test_decode_falls_back_to_batches_that_fit(small, monkeypatch, fits):
    latents = torch.randn(7, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(4))
    whole = small.decode(latents)
    at_once = small._decode_at_once

    def with_little_memory(part):
        if len(part) > fits:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return at_once(part)

    monkeypatch.setattr(small, "_decode_at_once", with_little_memory)
    torch.testing.assert_close(small.decode(latents), whole, atol=1e-5, rtol=1e-5)  # batch size changes the sums' order
    assert 1 <= small.decode_batch <= fits


def test_decode_stops_when_one_image_does_not_fit(small, monkeypatch):
    sizes = []

    def no_memory(part):
        sizes.append(len(part))
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(small, "_decode_at_once", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        small.decode(torch.zeros(7, LATENT_CHANNELS, 4, 4))
    assert sizes == [7, 3, 1]


def test_images_that_do_not_fit_are_refused(small):
    with pytest.raises(UserError, match="multiples of 2"):
        small.encode_moments(torch.zeros(2, 3, 16, 17))


@pytest.mark.parametrize("spoil, message", [
    (lambda state: state.pop("decoder.norm_out.bias"), 'Missing key.*"decoder.conv_norm_out.bias"'),
    (lambda state: state.update({"encoder.down.1.attn.0.q.weight": torch.ones(1)}), 'Unexpected key.*"encoder.down.1.attn.0.q.weight"'),
    (lambda state: state.update({"quant_conv.bias": torch.ones(3)}), "size mismatch for quant_conv.bias"),
    (lambda state: state.pop("encoder.conv_in.weight"), "no autoencoder in latent-diffusion naming"),
    (lambda state: state.clear(), "it has nothing"),
    (lambda state: state.update(quant_conv=[1, 2]), "no state dict"),
])
def test_wrong_keys_are_named(tmp_path, spoil, message):
    state = latent_diffusion_state()
    spoil(state)
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=message) as error:
        load_autoencoder(tmp_path / "vae.pth")
    assert str(tmp_path / "vae.pth") in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_with_another_class_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"quant_conv.weight": torch.ones(1), "trap": Trap()}, tmp_path / "vae.pth")
    torch.save(latent_diffusion_state() | {"counts": collections.Counter()}, tmp_path / "counter.pth")
    for name in ("vae.pth", "counter.pth"):
        with pytest.raises(UserError, match="no file of plain weights|no state dict") as error:
            load_autoencoder(tmp_path / name)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)  # torch's advice is to trust the file
    assert not (tmp_path / "executed").exists()


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(latent_diffusion_state(), tmp_path / "vae.pth")
    data = (tmp_path / "vae.pth").read_bytes()
    (tmp_path / "vae.pth").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_autoencoder(tmp_path / "vae.pth")


@pytest.mark.parametrize("name", ["nothing.pth", "nothing", "/nothing/here/at/all", "./a/b", "x" * 300])
def test_a_missing_path_says_how_to_get_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="download_assets.py --name vae"):
        load_autoencoder(name)


@pytest.fixture
def hub_out_of_reach(tmp_path, monkeypatch):
    """The cache folder of a Hugging Face hub that nobody answers for."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_out_of_reach_is_one_line_without_delay(hub_out_of_reach, capfd):
    started = time.monotonic()
    with pytest.raises(UserError, match="no autoencoder at someone/some-vae: .*Connection refused.*download_assets.py --name vae") as error:
        load_autoencoder("someone/some-vae")
    assert time.monotonic() - started < 10  # without the five retries of a download, which take half a minute
    assert "\n" not in str(error.value) and "Retrying" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("folder", ["", "vae"])  # a pipeline keeps its autoencoder in vae/
def test_what_the_cache_holds_is_loaded_without_the_hub(hub_out_of_reach, images, folder):
    repository = hub_out_of_reach / "models--someone--some-vae"
    vae = small_vae()
    vae.save_pretrained(repository / "snapshots" / ("0" * 40) / folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with torch.no_grad():
        moments = vae.encode(images).latent_dist.parameters
    assert torch.equal(load_autoencoder("someone/some-vae").encode_moments(images), moments)


def test_folders_that_hold_no_autoencoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither config.json nor vae/config.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="UNet2DModel, wanted AutoencoderKL"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_autoencoder(tmp_path)


def test_a_damaged_weights_file_in_a_folder_is_refused(tmp_path):
    small_vae().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_its_weights_is_refused(tmp_path):
    small_vae().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_autoencoder(tmp_path)


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    small_vae().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["quant_conv.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing_keys: quant_conv.bias"):
        load_autoencoder(tmp_path)
