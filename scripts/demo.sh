#!/usr/bin/env bash
# From real images to samples in minutes: environment, latents, masked training, unmasking tuning, samples, a quality number.
# Started again it goes on where it was; what is done is not done again. Everything it makes is in results/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/env.sh)
SECONDS=0
out=results/demo
checkpoint=$out/fashion-mnist-tune/checkpoints/0002000.pt

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
run() {
    echo "\$ python3 $*"
    "$PYTHON" "$@" </dev/null
}

step "1/5 Encode 8,000 real images to latents; the other 2,000 are held out from everything"
run extract_latent.py assets/fashion-mnist/t10k-images-idx3-ubyte.gz $out/latents --vae assets/demo-vae --resolution 32 --num_images 8000

step "2/5 Train with half of the patches masked"
run train_latent.py --config configs/demo/fashion-mnist.yaml

step "3/5 Unmasking tuning: a short run on all patches"
run train_latent.py --config configs/demo/fashion-mnist-tune.yaml --use_ckpt_path False \
    --ckpt_path $out/fashion-mnist/checkpoints/0001500.pt

step "4/5 Sample 500 images, 50 of each class, with guidance"
run generate.py --ckpt_path $checkpoint --outdir $out/samples --seeds 0-499 --class_idx 0 1 2 3 4 5 6 7 8 9

step "5/5 How good are they? Frechet distance (lower is better) on a small classifier's features, and what real images score"
"$PYTHON" - <<END
import numpy as np
from dataset.idx import load_fashion_mnist
grey, _ = load_fashion_mnist("assets/fashion-mnist", "test")
images = np.repeat(grey[..., None], 3, axis=3)
np.savez_compressed("$out/training_images.npz", arr_0=images[:8000])
np.savez_compressed("$out/heldout_images.npz", arr_0=images[8000:])
END
for images in $out/heldout_images.npz $out/samples/images; do
    run -m fid calc --images $images --ref $out/training_images.npz --embedding classifier --metrics fid
done

cat <<END

== Done in $SECONDS s (the environment not counted). Look at:
  $out/samples/grid.png              samples, one row per class
  $out/samples/images/               all 500 of them, one file per seed
  $out/fashion-mnist/loss.png        loss of the masked training (metrics.jsonl has the numbers)
  $out/fashion-mnist/samples/        the grid as training went on
Try next:
  python3 generate.py --ckpt_path $checkpoint --class_idx sneaker --cfg_scale 3 --outdir $out/sneakers
  python3 train_latent.py --config configs/demo/fashion-mnist.yaml log.exp_name=unmasked train.mask_ratio=0
  your own images:   python3 extract_latent.py YOUR_IMAGES data/mine --vae assets/autoencoder_kl.pth --resolution 64
                     python3 train_latent.py --config configs/train/small.yaml data.root=data/mine model.num_classes=N
END
