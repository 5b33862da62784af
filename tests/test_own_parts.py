"""README's promise: a network, a loss term and a sampler from a file outside the tree train and sample through the project's scripts."""

import json
import subprocess
import sys

import numpy as np
from training_runs import ROOT, command_line

OWN = '''
import sys

import torch
from torch import nn

import generate
import train_latent
from models import LOSSES, MODELS, SAMPLERS, EDMLoss
from utils.cli import run


class TwoConvolutions(nn.Module):
    """The smallest network: it knows noise level and class by a shift each, and takes no mask."""

    def __init__(self, in_size, in_channels, num_classes, hidden, **unused):
        super().__init__()
        self.in_size, self.in_channels, self.num_classes = in_size, in_channels, num_classes
        self.patch_size, self.num_tokens = 2, (in_size // 2) ** 2
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.noise = nn.Linear(1, hidden)
        self.label = nn.Embedding(num_classes + 1, hidden)
        self.last = nn.Conv2d(hidden, in_channels, 3, padding=1)

    def forward(self, x, c_noise, class_labels, mask):
        if class_labels is None:
            class_labels = torch.full((len(x),), self.num_classes, device=x.device)
        shift = self.noise(c_noise[:, None]) + self.label(class_labels)
        return self.last(torch.relu(self.first(x) + shift[:, :, None, None]))


class BrightnessLoss(EDMLoss):
    """EDM's loss, and that the mean of the image be right."""

    def terms(self, latents, noised, denoised, sigma, mask):
        brightness = (denoised - latents).mean(dim=(1, 2, 3)).square()
        return {**super().terms(latents, noised, denoised, sigma, mask), "brightness": brightness}


def one_step(model, noise, class_labels=None, *, num_steps, sigma=80.0, randn_like=None, progress=None):
    """Denoise once from pure noise."""
    return model((noise * sigma).float(), sigma, class_labels).double()


MODELS["Conv"], LOSSES["brightness"], SAMPLERS["one_step"] = TwoConvolutions, BrightnessLoss, one_step
script = {"train": train_latent, "generate": generate}[sys.argv[1]]
del sys.argv[1]

if __name__ == "__main__":
    run(script.main)
'''


def run_own(script, *arguments):
    result = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_own_network_loss_and_sampler_train_and_sample(tmp_path, tiny_latents):
    script = tmp_path / "own.py"
    script.write_text(OWN)
    settings = {"model__model_type": "Conv", "model__options__hidden": 6, "train__mask_ratio": 0, "train__loss": "brightness",
                "sample__sampler": "one_step", "train__max_num_steps": 4}
    run_own(script, "train", *command_line(tiny_latents, tmp_path, **settings), "log.log_every=1")
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:  # a name without a weight counts 1
        total = line["loss_denoising"] + 0.1 * line["loss_mae"] + line["loss_brightness"]
        assert line["loss_brightness"] > 0 and abs(line["loss"] - total) < 1e-5 * total

    checkpoint = folder / "checkpoints" / "0000004.pt"
    run_own(script, "generate", "--ckpt_path", checkpoint, "--seeds", "0-2", "--format", "latents", "--outdir", tmp_path / "out",
            "sample.options.sigma=70.0")
    latents_file = next((tmp_path / "out").glob("*.npz"))
    with np.load(latents_file) as content:
        made = next(content[key] for key in content.files if content[key].ndim == 4)
    assert made.shape == (3, 4, 8, 8) and np.isfinite(made).all() and made.std() > 0
