"""Train the small Fashion-MNIST classifier whose features give the demo its quality number, FD-classifier.

    OMP_NUM_THREADS=1 python scripts/train_demo_classifier.py --data FOLDER

Trains on the 60,000 images of the train file and writes assets/demo-classifier/model.safetensors. Prints its accuracy and
what real, noisy and blurred images score: the figures of the README there. About 4 minutes on one core.
"""

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


def main():
    args = parse_arguments(__doc__, "demo-classifier")
    from safetensors.torch import save_file

    from fid.embeddings import Classifier
    from fid.evaluate import Evaluator

    images, labels = load_fashion_mnist(args.data, "train")
    test_images, test_labels = load_fashion_mnist(args.data, "test")
    net = train(images, labels)
    args.dest.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, args.dest / "model.safetensors")
    classifier, n = Classifier(args.dest, "cpu"), NUM_DEMO_IMAGES
    seen = [classifier.classes(as_rgb(part)).numpy() for part in np.split(test_images, 10)]
    print(f"accuracy {(np.concatenate(seen) == test_labels).mean():.2%}, sha256 {file_sha256(args.dest / 'model.safetensors')}")
    evaluator = Evaluator(as_rgb(test_images[:n]), metrics=("fid",), embedding=classifier)
    print("| images | count | FD-classifier | FD / variance |\n|---|---|---|---|")
    for name, grey in examples(test_images[n:], test_labels[n:]):
        evaluator.reset()
        evaluator.add(as_rgb(grey), 0)
        distance, variance = evaluator.result()["numbers"]["FD-classifier"], evaluator.reference.gaussians["pool"][1].trace()
        print(f"| {name} | {len(grey)} | {distance:.3f} | {distance / variance:.4f} |")


if __name__ == "__main__":
    cli.run(main)
