"""fid.embeddings: what else can turn images into features, and the picture of nearest real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fid_helpers import TinyInception, random_images
from PIL import Image

from fid import embeddings, evaluate, metrics
from fid.sources import Source
from utils.cli import UserError

DEMO_CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "demo-classifier"


def test_pixels_are_area_means():
    images = random_images(2, 32, 48)
    found = embeddings.make_embedding("pixels", device="cpu")(images).view(2, 3, 16, 16)
    wanted = images.float().view(2, 16, 2, 16, 3, 3).mean((2, 4)).permute(0, 3, 1, 2) / 255
    assert torch.allclose(found, wanted, atol=1e-6)


def test_classifier_has_the_published_size():
    assert sum(p.numel() for p in embeddings.ClassifierNet().parameters()) == 70_330


def test_committed_classifier_knows_real_images():
    from dataset.idx import load_fashion_mnist
    grey, labels = load_fashion_mnist(DEMO_CLASSIFIER.parent / "fashion-mnist", "test")
    images = grey[:500, :, :, None].repeat(3, axis=3)
    classifier = embeddings.make_embedding("classifier", weights=DEMO_CLASSIFIER, device="cpu")
    assert (classifier.classes(images).numpy() == labels[:500]).mean() > 0.85  # about 0.9 on all 10,000
    assert classifier(images).shape == (500, embeddings.NUM_FEATURES) and classifier.name == "classifier"
    assert classifier.settings["weights_sha256"] in (DEMO_CLASSIFIER / "README.md").read_text()


def test_classifier_refuses_other_sizes_and_names_its_script():
    with pytest.raises(ValueError, match="images are 8x8, wanted 32x32"):
        embeddings.make_embedding(str(DEMO_CLASSIFIER), device="cpu")(random_images(1, 8, 8))
    with pytest.raises(ValueError, match="scripts/train_demo_classifier.py"):
        embeddings.make_embedding("classifier", weights="nowhere")


def test_timm_model_reads_a_local_checkpoint(tmp_path):
    import timm
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    embedding = embeddings.make_embedding("timm:test_resnet", weights=tmp_path / "model.pth", device="cpu")
    images = random_images(2, 40, 40)
    features = embedding(images)
    assert features.shape == (2, embedding.dims["pool"]) and embedding.name == "test_resnet"
    size = embedding.size
    x = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    wanted = model.forward_head(model.forward_features((x - mean) / std), pre_logits=True)
    assert torch.allclose(features, wanted, atol=1e-5)


def test_timm_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"something.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not the weights of this network: Missing key"):
        embeddings.make_embedding("test_resnet", weights=tmp_path / "other.pth")


def test_neighbours_put_a_copied_image_first(tmp_path):
    real, samples = random_images(40, 8, 8, seed=1).numpy(), random_images(12, 8, 8, seed=2).numpy()
    samples[7] = real[31]
    evaluator = evaluate.Evaluator(real, embedding=TinyInception(), keep_features=True)
    evaluator.add(samples, 0)
    evaluator.result()
    rows, indices, ratios = metrics.closest_pairs(evaluator.pool, evaluator.reference.pool, 3, 2)
    assert rows[0] == 7 and indices[0, 0] == 31 and ratios[0] == 0 and ratios[1] > 0.05
    evaluate.save_neighbours(tmp_path / "n.png", Source(samples), evaluator, 3, 2)
    picture = np.asarray(Image.open(tmp_path / "n.png"))
    assert picture.shape[0] >= 3 * 64 and picture.shape[1] >= 3 * 64  # three rows of a sample and two real images, magnified


def test_neighbours_of_other_sizes_are_drawn_at_the_size_of_the_samples(tmp_path):
    samples = random_images(3, 8, 8).numpy()
    evaluator = evaluate.Evaluator(random_images(5, 16, 12).numpy(), embedding=TinyInception(), metrics=("fid",), keep_features=True)
    evaluator.add(samples, 0)
    evaluator.result()
    evaluate.save_neighbours(tmp_path / "n.png", Source(samples), evaluator, 3, 2)
    assert Image.open(tmp_path / "n.png").size[0] >= 3 * 64


def test_neighbours_among_bare_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.raises(UserError, match="--neighbours needs reference images and .*ref.npz holds statistics only"):
        evaluate.Evaluator(tmp_path / "ref.npz", embedding=TinyInception(), keep_features=True)


def test_another_file_given_as_classifier_is_told(tmp_path):
    from safetensors.torch import save_file
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: not the weights of this network: Missing key"):
        embeddings.make_embedding("classifier", str(tmp_path))
