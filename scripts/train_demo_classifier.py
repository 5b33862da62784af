"""Train the small Fashion-MNIST classifier whose features give the demo its quality number, FD-classifier.

    OMP_NUM_THREADS=1 python scripts/train_demo_classifier.py --data FOLDER

Trains on the 60,000 images of the train file and writes assets/demo-classifier/: model.safetensors and a README with the
accuracy and what real, noisy and blurred images score, so that the demo's numbers can be read. About 4 minutes on one core.
"""

import datetime
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.idx import load_fashion_mnist
from scripts.train_demo_vae import fit, parse_arguments
from utils import cli
from utils.files import file_sha256

STEPS, BATCH, PEAK_LR = 2808, 128, 4e-3  # six epochs
NUM_DEMO_IMAGES = 8000  # of the t10k file: what the demo's MaskDiT trains on; the rest is held out from everything


def train(images, labels):
    """Return a ClassifierNet trained on images (N, 32, 32) uint8 with labels (N,) int64, half of them mirrored at each visit."""
    import torch
    from torch.nn import functional as F

    from fid.embeddings import ClassifierNet
    from utils.distributed import device

    torch.manual_seed(0)
    net = ClassifierNet().to(device(), memory_format=torch.channels_last)
    images, labels = torch.from_numpy(images).to(device()), torch.from_numpy(labels).to(device())

    def loss_of(rows):
        grey = images[rows].float()[:, None] / 255
        mirrored = torch.where(torch.rand(BATCH, 1, 1, 1, device=grey.device) < 0.5, grey.flip(3), grey)
        return F.cross_entropy(net(mirrored).float(), labels[rows], label_smoothing=0.05)

    fit(net, len(images), loss_of, STEPS, BATCH, PEAK_LR, weight_decay=0.05)
    return net.eval()


def as_rgb(grey):
    """(N, 32, 32) uint8 -> (N, 32, 32, 3) uint8."""
    return grey[..., None].repeat(3, axis=3)


def examples(held_out, labels):
    """Yield (name, (N, 32, 32) uint8): the held-out images, and ways in which they can be bad samples."""
    from scipy.ndimage import uniform_filter

    rng = np.random.default_rng(0)
    yield "held-out real images", held_out
    for level in (5, 15, 40):
        noisy = held_out + level * rng.standard_normal(held_out.shape)
        yield f"with noise of {level} grey levels", noisy.round().clip(0, 255).astype(np.uint8)
    for width in (3, 5):
        blurred = uniform_filter(held_out.astype(np.float64), (0, width, width), mode="nearest")
        yield f"blurred {width}x{width}", blurred.round().astype(np.uint8)
    yield "three of ten classes missing", held_out[labels >= 3]
    yield "one class only", held_out[labels == 0]


def scores(classifier, real, held_out, held_out_labels):
    """Yield (name, number of images, FD, FD / total variance of the reference) against the demo's training images."""
    from fid.evaluate import Evaluator

    evaluator = Evaluator(as_rgb(real), metrics=("fid",), embedding=classifier)
    for name, grey in examples(held_out, held_out_labels):
        evaluator.reset()
        evaluator.add(as_rgb(grey), 0)
        distance = evaluator.result()["numbers"]["FD-classifier"]
        yield name, len(grey), distance, distance / evaluator.reference.gaussians["pool"][1].trace()


def write_readme(folder, found_accuracy, rows):
    table = "\n".join(f"| {name} | {count} | {distance:.3f} | {share:.4f} |" for name, count, distance, share in rows)
    (folder / "README.md").write_text(f"""# Demo classifier

`model.safetensors`: a Fashion-MNIST classifier of five 3x3 convolutions (70,330 parameters, float32). Its 64 pooled features
are the embedding behind the demo's quality number, **FD-classifier**: the Frechet distance of FID on these features. It is
not FID and compares with no published table.

- Made by `python scripts/train_demo_classifier.py --data FOLDER` on {datetime.date.today()} from the 60,000 images of
  Fashion-MNIST's train file (MIT licence), padded to 32x32.
- Accuracy on the 10,000 images of the t10k file: {100 * found_accuracy:.2f} %.
- sha256 {file_sha256(folder / "model.safetensors")}
- Input: RGB uint8 images (B, 32, 32, 3); the three channels are averaged to grey.

## How to read FD-classifier

Lower is better. Reference: the {NUM_DEMO_IMAGES:,} images that the demo trains on (the first of t10k); compared: the last 2,000 of t10k,
which no training has seen, as they are and spoiled in known ways. The last column is the distance divided by the reference
features' total variance (the trace of their covariance), for orientation only: the number reported everywhere is FD itself.

| images | count | FD-classifier | FD / variance |
|---|---|---|---|
{table}
""")


def main():
    args = parse_arguments(__doc__, "demo-classifier")
    from safetensors.torch import save_file

    from fid.embeddings import Classifier

    images, labels = load_fashion_mnist(args.data, "train")
    test_images, test_labels = load_fashion_mnist(args.data, "test")
    net = train(images, labels)
    args.dest.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, args.dest / "model.safetensors")
    classifier, n = Classifier(args.dest, "cpu"), NUM_DEMO_IMAGES
    rows = scores(classifier, test_images[:n], test_images[n:], test_labels[n:])
    seen = [classifier.classes(as_rgb(part)).numpy() for part in np.split(test_images, 10)]
    write_readme(args.dest, (np.concatenate(seen) == test_labels).mean(), rows)
    print((args.dest / "README.md").read_text())


if __name__ == "__main__":
    cli.run(main)
