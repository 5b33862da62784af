"""Write the demo's real images as two image sets: the 8,000 that it trains on, and the 2,000 that are held out from everything.

    python3 scripts/demo_real_images.py results/demo/real
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import run  # noqa: E402  (the project's root has to be on the path first)

NUM_TRAINING = 8000  # the same first images that demo.sh encodes


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    import numpy as np

    from dataset.idx import load_fashion_mnist

    images, labels = load_fashion_mnist(ROOT / "assets" / "fashion-mnist", "test")
    images = np.repeat(images[..., None], 3, axis=3)  # grey (N, 32, 32) -> RGB (N, 32, 32, 3)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("training.npz", slice(NUM_TRAINING)), ("heldout.npz", slice(NUM_TRAINING, None))):
        np.savez_compressed(folder / name, arr_0=images[part], labels=labels[part])
        print(f"{folder / name}: {len(images[part]):,} images")
    return 0


if __name__ == "__main__":
    run(main)
