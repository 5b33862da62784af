"""Images to latents and back through a frozen KL autoencoder: diffusers folder or hub id, or the published .pth file."""

import hashlib
import json
import os
import re
import textwrap
from pathlib import Path

import torch
from torch import nn

from utils.cli import UserError

SCALE = 0.18215  # latents = SCALE * z, the factor of latent diffusion (Rombach et al. 2022)
FETCH = "`python3 download_assets.py --name vae` fetches the published one"


def sample_moments(moments, generator=None, scale=SCALE, shift=0.0):
    """Draw scaled latents from VAE posterior moments.

    moments: (B, 2C, H, W) float32, mean then log-variance (clamped to [-30, 20]).
    scale, shift: a number, or a sequence of one number per channel.
    Returns latents (B, C, H, W) float32, scale * (z - shift), unitless.
    Raises ValueError if the channel count is odd.
    Source: Rombach et al. 2022 (latent diffusion).
    """
    if moments.shape[1] % 2:
        raise ValueError(f"moments have {moments.shape[1]} channels, wanted an even number: means, then log-variances")
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
    return _per_channel(scale, z) * (z - _per_channel(shift, z))


def _per_channel(value, latents):
    """A number as it is; a sequence of one number per channel as a tensor (C, 1, 1) that multiplies latents."""
    if isinstance(value, (int, float)):
        return value
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).to(latents.device, non_blocking=True)


class Autoencoder(nn.Module):
    """A frozen diffusers AutoencoderKL with the one convention used here: latents = scale * (z - shift).

    scale, shift: numbers, or sequences of one number per channel. They may be replaced by those of a model's latents.
    latent_channels: C of the latents. downsample: image side / latent side.
    digest: 16 hex digits that name the weights, the same for every file format that they can be stored in.
    decode_batch: the largest batch decoded at once; starts unlimited and falls when the GPU runs out of memory.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)
        self.latent_channels = vae.config.latent_channels
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)
        self.decode_batch = None
        self.digest = _digest(vae)

    @torch.no_grad()
    def encode_moments(self, images):
        """images (B, 3, H, W) in [-1, 1] -> moments (B, 2C, H/f, W/f) float32: means, then unclamped log-variances.

        Raises UserError for sides that are not multiples of f = downsample.
        """
        if images.shape[2] % self.downsample or images.shape[3] % self.downsample:
            raise UserError(f"images are {images.shape[2]}x{images.shape[3]}; this autoencoder needs sides that are "
                            f"multiples of {self.downsample}: crop or resize them")
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.float()

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, C, h, w), scaled -> images (B, 3, h*f, w*f) float32, about [-1, 1] (not clipped).

        Decodes at most decode_batch at once. When the GPU runs out of memory, halves that and begins again.
        Raises torch.cuda.OutOfMemoryError if one image alone does not fit.
        """
        while True:
            size = min(self.decode_batch or len(latents), len(latents))
            try:
                return torch.cat([self._decode_at_once(part) for part in latents.split(size)])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                self.decode_batch = size // 2

    def _decode_at_once(self, latents):
        z = latents.float() / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


def _digest(vae):
    sha256 = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.float().cpu().contiguous().numpy())
    return sha256.hexdigest()[:16]


def load_autoencoder(path_or_id, device=None, dtype=torch.float32):
    """Load a frozen KL autoencoder in evaluation mode.

    path_or_id: a diffusers AutoencoderKL folder (or one with such a `vae/` inside), a state dict file in
        latent-diffusion naming such as the published `autoencoder_kl.pth`, or a Hugging Face id.
    Raises UserError if there is nothing at the path or id, or if it is no such autoencoder.
    """
    if os.path.isfile(path_or_id):
        vae = _load_latent_diffusion(Path(path_or_id))
    elif os.path.isdir(path_or_id):
        vae = _load_folder(Path(path_or_id))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) and not os.path.isdir(os.path.dirname(path_or_id)):
        vae = _load_folder(_fetch(str(path_or_id)))
    else:
        raise UserError(f"no autoencoder at {path_or_id}: wanted a diffusers folder or an autoencoder_kl.pth file; {FETCH}")
    return Autoencoder(vae).to(device=device, dtype=dtype)


def _load_folder(folder):
    """A diffusers AutoencoderKL from folder/ or folder/vae/."""
    from diffusers import AutoencoderKL

    homes = [home for home in (folder, folder / "vae") if (home / "config.json").is_file()]
    if not homes:
        raise UserError(f"{folder} holds no autoencoder: neither config.json nor vae/config.json is there; {FETCH}")
    try:
        kind = json.loads((homes[0] / "config.json").read_text()).get("_class_name")
        if kind != "AutoencoderKL":
            raise UserError(f"its config.json describes {kind}, wanted AutoencoderKL")
        # low_cpu_mem_usage=False: no need of accelerate, and no notice about it
        vae, info = AutoencoderKL.from_pretrained(homes[0], low_cpu_mem_usage=False, output_loading_info=True)
        misfits = [f"{name}: {', '.join(sorted(info[name]))}" for name in ("missing_keys", "unexpected_keys") if info[name]]
        if misfits:
            raise UserError(f"its weights do not fit its config.json; {'; '.join(misfits)}")
    except Exception as error:  # json, diffusers and safetensors each have kinds of their own
        raise UserError(f"{homes[0]} cannot be loaded: {_shortened(error)}") from error
    return vae


def _fetch(hub_id):
    """The folder of a Hugging Face id's autoencoder (a pipeline's is in its vae/) in the local cache, downloaded if need be."""
    from huggingface_hub import HfApi, snapshot_download

    files = ("config.json", "diffusion_pytorch_model.safetensors")
    unreachable = None
    try:
        HfApi().model_info(hub_id, timeout=5)  # asked first, because a download tries again for minutes
    except Exception as error:  # of the HTTP library that this version of huggingface_hub uses
        unreachable = error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*files, *(f"vae/{name}" for name in files)],
                                      local_files_only=unreachable is not None))
    except Exception as error:
        raise UserError(f"no autoencoder at {hub_id}: no such file or folder here, and fetching it from Hugging Face failed "
                        f"({_shortened(unreachable or error)}); {FETCH}") from error


def _load_latent_diffusion(path):
    """A diffusers AutoencoderKL holding the weights of a state dict file in latent-diffusion naming."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = _read_state(path)
    architecture = _architecture(path, state)
    vae = AutoencoderKL(**architecture)
    try:
        vae.load_state_dict(convert_ldm_vae_checkpoint(state, architecture))
    except RuntimeError as error:  # it names the tensors that are missing, unexpected or of another shape
        raise UserError(f"{path} does not fit its architecture: {_shortened(error)}") from error
    return vae


def _read_state(path):
    """The autoencoder's tensors of a file: bare, under `state_dict`, or inside a whole latent diffusion model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds (pickle, zip, end of file, runtime), and torch's advice is to trust the file
        raise UserError(f"{path} is damaged, or no file of plain weights (tensors by name), which is all that is read from one; "
                        f"nothing in it was run; {FETCH}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{path} holds no state dict: wanted tensors by name")
    whole_model = "first_stage_model."
    if any(key.startswith(whole_model) for key in state):
        state = {key.removeprefix(whole_model): value for key, value in state.items() if key.startswith(whole_model)}
    return {key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}  # of its own training


def _architecture(path, state):
    """AutoencoderKL arguments, read off tensor shapes; the number of groups, 32, is diffusers' default too."""
    levels, blocks = ([key for key in sorted(state) if re.fullmatch(pattern, key)] for pattern in (
        r"encoder\.down\.\d\.block\.0\.conv1\.weight", r"encoder\.down\.0\.block\.\d\.conv1\.weight"))
    firsts = [state[key] for key in levels]
    ends = [state.get(key) for key in ("encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")]
    if not firsts or any(weight is None or weight.ndim != 4 for weight in ends + firsts) or len(firsts[0]) % 32:
        raise UserError(f"{path} is no autoencoder in latent-diffusion naming: wanted encoder.conv_in.weight, "
                        f"encoder.down.0.block.0.conv1.weight, ..., post_quant_conv.weight, with channels in groups of 32; "
                        f"it has {_shortened(', '.join(sorted(state))) or 'nothing'}")
    return dict(
        in_channels=ends[0].shape[1], out_channels=ends[1].shape[0], latent_channels=ends[2].shape[1],
        block_out_channels=tuple(weight.shape[0] for weight in firsts), layers_per_block=len(blocks),
        down_block_types=("DownEncoderBlock2D",) * len(firsts), up_block_types=("UpDecoderBlock2D",) * len(firsts),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in state, scaling_factor=SCALE,
    )


def _shortened(error):
    """The words of an exception, or another text, on one line that is not too long."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")
