"""The plain path: MaskDiT as the method is usually written. Benchmarks compare the fast path with it, and tests hold both equal.

Functions over the weights of a `models.EDMPrecond`; of its parts they call torch's own layers only. Eager; labels one-hot, multiplied
with the class table; every patch embedded before the removed ones are dropped; tokens back in image order before the decoder; losses over
whole images, weighted by masks; AdamW and EMA as loops over tensors. Written from the papers (MaskDiT, DiT, EDM).
"""

import copy
import math

import torch
import torch.nn.functional as F

from utils.precision import autocast, effective_amp

SIGMA_DATA = 0.5


# ---- network

def plain_norm(tokens, shift, scale):
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def plain_attention(attn, tokens):
    batch_size, num_tokens, width = tokens.shape
    qkv = attn.qkv(tokens).reshape(batch_size, num_tokens, 3, attn.num_heads, width // attn.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch_size, num_tokens, width))


def plain_block(block, tokens, c):
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    tokens = tokens + gate_attn.unsqueeze(1) * plain_attention(block.attn, plain_norm(tokens, shift_attn, scale_attn))
    hidden = F.gelu(block.mlp.fc1(plain_norm(tokens, shift_mlp, scale_mlp)), approximate="tanh")
    return tokens + gate_mlp.unsqueeze(1) * block.mlp.fc2(hidden)


def plain_network(net, x, c_noise, one_hot, ids_keep=None, ids_restore=None):
    """net: a `models.MaskDiT` with classes and decoder. one_hot: (B, num_classes). ids_keep: (B, K). ids_restore: (B, L)."""
    angles = c_noise[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
    c = net.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) + net.y_embedder.embedding_table(one_hot)
    tokens = net.x_embedder.proj(x).flatten(2).transpose(1, 2) + net.pos_embed
    if ids_keep is not None:
        tokens = torch.gather(tokens, 1, ids_keep.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))
    for block in net.blocks:
        tokens = plain_block(block, tokens, c)
    tokens = net.decoder_layer.linear(plain_norm(tokens, *net.decoder_layer.adaLN_modulation(c).chunk(2, dim=1)))
    if ids_keep is not None:
        missing = ids_restore.shape[1] - tokens.shape[1]
        tokens = torch.cat([tokens, net.mask_token.to(tokens.dtype).repeat(len(x), missing, 1)], dim=1)
        tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))
    tokens = tokens + net.decoder_pos_embed
    for block in net.decoder_blocks:
        tokens = plain_block(block, tokens, c)
    patches = net.final_layer.linear(plain_norm(tokens, *net.final_layer.adaLN_modulation(c).chunk(2, dim=1)))
    grid, size = x.shape[2] // net.patch_size, net.patch_size
    return torch.einsum("brcpqk->bkrpcq", patches.reshape(len(x), grid, grid, size, size, -1)).reshape(x.shape)


def plain_denoiser(net, x, sigma, one_hot, ids_keep=None, ids_restore=None):
    """D(x; sigma) of a `models.EDMPrecond`. sigma: (B,). one_hot: zeros for unconditional. Returns (B, C, H, W) float32."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
    output = plain_network(net.model, c_in * x, sigma.flatten().log() / 4, one_hot, ids_keep, ids_restore)
    return c_skip * x + c_out * output.float()


def plain_guided(net, cfg_scale):
    """model(x, sigma, class_labels) for the samplers: guidance by one batch of conditional and unconditional copies."""
    def model(x, sigma, class_labels):
        one_hot = F.one_hot(class_labels, net.num_classes).float()
        if cfg_scale == 1:
            return plain_denoiser(net, x, torch.full((len(x),), float(sigma), device=x.device), one_hot)
        one_hot = torch.cat([one_hot, torch.zeros_like(one_hot)])
        sigma = torch.full((2 * len(x),), float(sigma), device=x.device)
        conditional, unconditional = plain_denoiser(net, torch.cat([x, x]), sigma, one_hot).chunk(2)
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
    device, patch_size = latents.device, net.patch_size
    sigma = (torch.randn(len(latents), generator=generator, device=device) * P_std + P_mean).exp()
    noised = latents + torch.randn(latents.shape, generator=generator, device=device) * sigma.reshape(-1, 1, 1, 1)
    weight = ((sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2).reshape(-1, 1, 1, 1)
    num_tokens = (latents.shape[2] // patch_size) ** 2
    num_keep = max(1, int(num_tokens * (1 - mask_ratio)))
    if num_keep == num_tokens:
        return (weight * (plain_denoiser(net, noised, sigma, one_hot) - latents) ** 2).mean(dim=(1, 2, 3))
    ids_keep, ids_restore, mask = plain_mask(len(latents), num_tokens, num_keep, generator, device)
    denoised = plain_denoiser(net, noised, sigma, one_hot, ids_keep, ids_restore)
    error = F.avg_pool2d((weight * (denoised - latents) ** 2).mean(dim=1), patch_size).flatten(1)
    target = plain_patches(noised, patch_size)
    target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    mae = ((plain_patches(denoised, patch_size) - target) ** 2).mean(dim=-1)
    return (error * (1 - mask)).sum(dim=1) / (1 - mask).sum(dim=1) + mae_loss_coef * (mae * mask).sum(dim=1) / mask.sum(dim=1)


# ---- training

class PlainTraining:
    """Weights (a copy of net's), AdamW and EMA of a run on one process; `step` is one optimizer step."""

    def __init__(self, net, train_config, device):
        self.net, self.train, self.device = copy.deepcopy(net), train_config, device
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
