"""The plain path: MaskDiT as the method is usually written, which the fast path is measured against and tested equal to.

Eager; labels one-hot and multiplied with the class table; every patch embedded before the removed ones are dropped; tokens
back in image order before the decoder; losses over whole images, weighted by masks; AdamW and EMA as loops over tensors.
Parameter names are those of `models`, so that one state dict fits both. Written from the papers (MaskDiT, DiT, EDM).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.precision import autocast, effective_amp


# ---- network

class PlainAttention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        batch_size, num_tokens, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch_size, num_tokens, width))


class PlainMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens):
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


def plain_modulate(tokens, shift, scale):
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    def __init__(self, width, num_heads, cond_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 6 * width))

    def forward(self, tokens, c):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        tokens = tokens + gate_attn.unsqueeze(1) * self.attn(plain_modulate(self.norm1(tokens), shift_attn, scale_attn))
        return tokens + gate_mlp.unsqueeze(1) * self.mlp(plain_modulate(self.norm2(tokens), shift_mlp, scale_mlp))


class PlainModulatedLinear(nn.Module):
    def __init__(self, width, cond_width, out_features):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 2 * width))

    def forward(self, tokens, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(plain_modulate(self.norm(tokens), shift, scale))


class PlainMaskDiT(nn.Module):
    """The network of a `models.MaskDiT` (class-conditional, with decoder), with its sizes and none of its shortcuts."""

    def __init__(self, fast):
        super().__init__()
        width, decoder_width = fast.pos_embed.shape[2], fast.decoder_pos_embed.shape[2]
        heads, decoder_heads = fast.blocks[0].attn.num_heads, fast.decoder_blocks[0].attn.num_heads
        patch_size, channels = fast.patch_size, fast.in_channels
        self.patch_size, self.channels, self.grid = patch_size, channels, fast.in_size // patch_size
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch_size, stride=patch_size)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Linear(fast.num_classes, width, bias=False)})
        self.pos_embed = nn.Parameter(torch.zeros_like(fast.pos_embed), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, width) for _ in fast.blocks)
        self.decoder_layer = PlainModulatedLinear(width, width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros_like(fast.mask_token))
        self.decoder_pos_embed = nn.Parameter(torch.zeros_like(fast.decoder_pos_embed), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(PlainBlock(decoder_width, decoder_heads, width) for _ in fast.decoder_blocks)
        self.final_layer = PlainModulatedLinear(decoder_width, width, patch_size**2 * channels)

    def forward(self, x, c_noise, one_hot, ids_keep=None, ids_restore=None):
        """x: (B, C, H, W). c_noise: (B,). one_hot: (B, num_classes). ids_keep (B, K), ids_restore (B, L): or None. Returns like x."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angles = c_noise[:, None] * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1)) + self.y_embedder["embedding_table"](one_hot)
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if ids_keep is not None:
            tokens = torch.gather(tokens, 1, ids_keep.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens, c)
        tokens = self.decoder_layer(tokens, c)
        if ids_keep is not None:
            missing = ids_restore.shape[1] - tokens.shape[1]
            tokens = torch.cat([tokens, self.mask_token.to(tokens.dtype).repeat(len(x), missing, 1)], dim=1)
            tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens, c).reshape(len(x), self.grid, self.grid, self.patch_size, self.patch_size, self.channels)
        return torch.einsum("brcpqk->bkrpcq", patches).reshape(x.shape)


class PlainDenoiser(nn.Module):
    """D(x; sigma) of a `models.EDMPrecond`, with a copy of its weights."""

    sigma_data = 0.5

    def __init__(self, net):
        super().__init__()
        self.num_classes = net.num_classes
        self.model = PlainMaskDiT(net.model).to(net.model.mask_token.device)
        self.load_state_dict(net.state_dict())

    def forward(self, x, sigma, one_hot, ids_keep=None, ids_restore=None):
        """x: (B, C, H, W). sigma: (B,). one_hot: (B, num_classes), zeros for unconditional. Returns (B, C, H, W) float32."""
        sigma = sigma.reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        output = self.model(c_in * x, sigma.flatten().log() / 4, one_hot, ids_keep, ids_restore)
        return c_skip * x + c_out * output.float()


def plain_guided(net, cfg_scale):
    """model(x, sigma, class_labels) for the samplers: guidance by one batch of conditional and unconditional copies."""
    def model(x, sigma, class_labels):
        one_hot = F.one_hot(class_labels, net.num_classes).float()
        if cfg_scale == 1:
            return net(x, torch.full((len(x),), float(sigma), device=x.device), one_hot)
        one_hot = torch.cat([one_hot, torch.zeros_like(one_hot)])
        sigma = torch.full((2 * len(x),), float(sigma), device=x.device)
        conditional, unconditional = net(torch.cat([x, x]), sigma, one_hot).chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)

    return model


# ---- loss

def plain_mask(batch_size, num_tokens, num_keep, generator, device):
    """Random ids_keep (B, K), ids_restore (B, L) and mask (B, L; 1 = removed), by sorting noise twice."""
    ids_shuffle = torch.argsort(torch.rand(batch_size, num_tokens, generator=generator, device=device), dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones(batch_size, num_tokens, device=device)
    mask[:, :num_keep] = 0
    return ids_shuffle[:, :num_keep], ids_restore, torch.gather(mask, 1, ids_restore)


def plain_patches(images, patch_size):
    """(B, C, H, W) -> (B, L, p*p*C)."""
    grid = images.shape[2] // patch_size
    images = images.reshape(len(images), -1, grid, patch_size, grid, patch_size)
    return torch.einsum("bkrpcq->brcpqk", images).reshape(len(images), grid**2, -1)


def plain_loss(net, latents, one_hot, mask_ratio, generator, mae_loss_coef=0.1, P_mean=-1.2, P_std=1.2):
    """Per-sample loss (B,); draws sigma, noise and mask in that order from `generator`, as `models.EDMLoss` does."""
    device, patch_size = latents.device, net.model.patch_size
    sigma = (torch.randn(len(latents), generator=generator, device=device) * P_std + P_mean).exp()
    noised = latents + torch.randn(latents.shape, generator=generator, device=device) * sigma.reshape(-1, 1, 1, 1)
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    num_tokens = net.model.grid**2
    num_keep = max(1, int(num_tokens * (1 - mask_ratio)))
    if num_keep == num_tokens:
        error = weight.reshape(-1, 1, 1, 1) * (net(noised, sigma, one_hot) - latents) ** 2
        return error.mean(dim=(1, 2, 3))
    ids_keep, ids_restore, mask = plain_mask(len(latents), num_tokens, num_keep, generator, device)
    denoised = net(noised, sigma, one_hot, ids_keep, ids_restore)
    error = weight.reshape(-1, 1, 1, 1) * (denoised - latents) ** 2
    error = F.avg_pool2d(error.mean(dim=1), patch_size).flatten(1)
    target = plain_patches(noised, patch_size)
    target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    mae = ((plain_patches(denoised, patch_size) - target) ** 2).mean(dim=-1)
    return (error * (1 - mask)).sum(dim=1) / (1 - mask).sum(dim=1) + mae_loss_coef * (mae * mask).sum(dim=1) / mask.sum(dim=1)


# ---- training

class PlainTraining:
    """Weights, AdamW and EMA of a run on one process; `step` is one optimizer step."""

    def __init__(self, net, train_config, device):
        self.net, self.train, self.device = PlainDenoiser(net), train_config, device
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=train_config.lr,
                                           betas=train_config.betas, weight_decay=train_config.weight_decay, foreach=False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=effective_amp(train_config.amp, device) == "fp16")

    def step(self, latents, class_labels, generator):
        """latents: (B, C, H, W). class_labels: (B,) int64. Returns the mean loss, on the device."""
        one_hot = F.one_hot(class_labels, self.net.num_classes).float()
        kept = torch.rand(len(one_hot), generator=generator, device=self.device) >= self.train.class_dropout_prob
        with autocast(self.train.amp, self.device):
            loss = plain_loss(self.net, latents, one_hot * kept.unsqueeze(1), self.train.mask_ratio, generator,
                              self.train.mae_loss_coef, self.train.P_mean, self.train.P_std).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_ema()
        return loss.detach()

    @torch.no_grad()
    def update_ema(self):
        for average, weight in zip(self.ema.parameters(), self.net.parameters()):
            average.mul_(self.train.ema_decay).add_(weight, alpha=1 - self.train.ema_decay)
