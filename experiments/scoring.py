"""What the arms of an experiment learn from, and how good their samples are."""

import dataclasses
from pathlib import Path

from utils.cli import PROJECT_ROOT


class Latents:
    """Latents of the demo's VAE, encoded once; `encode` draws them, `decode` makes images of them."""

    def __init__(self, images, config, work, device):
        from models import load_autoencoder
        from dataset.formats import open_latents
        from dataset.extract import extract, make_plan
        from sampling.sample import image_decoder

        folder = work / "latents"
        vae = load_autoencoder(PROJECT_ROOT / config.vae.path, device)
        extract(images, vae, folder, make_plan(images, vae, Path(config.vae.path).name, "float32", 0, images.num_images, batch_size=64,
                                               dtype="float16", shard_size=4096))  # what is there already stays
        self.dataset = open_latents(folder, num_classes=config.model.num_classes)
        vae_config = dataclasses.replace(config.vae, path=str(PROJECT_ROOT / config.vae.path))
        self.decode = image_decoder(vae_config, config.model.in_channels, device)

    def encode(self, moments, generator):
        from models import sample_moments

        return sample_moments(moments, generator, self.dataset.scale, self.dataset.shift)


class Pixels:
    """Pixels in [-1, 1] times 0.5: about EDM's sigma_data. Nothing is encoded or decoded."""

    def __init__(self, images, config, work, device):
        self.dataset = images

    def decode(self, latents):
        from sampling.sample import finite_rows
        from utils.images import to_uint8

        return to_uint8(latents / 0.5).cpu().numpy(), finite_rows(latents)

    def encode(self, images, generator):
        return 0.5 * (images.float() / 127.5 - 1)


class Scores:
    """FD-classifier against the 10,000 held-out images, and how often the classifier names the class that was asked for."""

    def __init__(self, device):
        from fid.embeddings import Classifier
        from fid.evaluate import Evaluator
        from dataset.idx import load_fashion_mnist

        self.embedding = Classifier(PROJECT_ROOT / "assets" / "demo-classifier", device)
        grey, _ = load_fashion_mnist(PROJECT_ROOT / "assets" / "fashion-mnist", "test")
        self.evaluator = Evaluator(grey[..., None].repeat(3, axis=3), metrics=("fid",), embedding=self.embedding)

    def score(self, batches):
        """batches: of (images (B, 32, 32, 3) uint8, labels (B,)). Returns {"fd", "accuracy"}."""
        self.evaluator.reset()
        right = count = 0
        for index, (images, labels) in enumerate(batches):
            self.evaluator.add(images, index)
            right += int((self.embedding.classes(images).cpu() == labels.cpu()).sum())
            count += len(images)
        return {"fd": self.evaluator.result()["numbers"]["FD-classifier"], "accuracy": right / count}


class Sampler:
    """Samples of a run's EMA weights, from a copy of its network that is made ready for sampling once and takes the weights anew."""

    def __init__(self, config, data, device):
        from models import build_model
        from sampling.load import prepare_network
        from utils.config import model_arguments

        self.config, self.data, self.device = config, data, device
        self.net = build_model(**model_arguments(config)).to(device).eval().requires_grad_(False)
        prepare_network(self.net, config.sample, device)

    def draw(self, net, count, cfg_scale=1.0, class_idx=()):
        """Batches (images (B, H, W, 3) uint8, class_labels (B,)) of seeds 0 to count - 1 with the weights of `net`."""
        from sampling.sample import generate

        self.net.load_state_dict(net.state_dict())
        sample = dataclasses.replace(self.config.sample, cfg_scale=cfg_scale)
        for batch in generate(self.net, self.data.decode, list(range(count)), sample, self.device, class_idx):
            yield batch.images, batch.class_labels


def score_real(setting, data, images, scores):
    """Scores of as many real training images as there are samples: as they are, and through what the models learn from."""
    return [{"images": count} | {name: scores.score(_real_batches(setting, data, images, count, name == "decoded"))
                                 for name in ("real", "decoded")} for count in (setting.samples, setting.final_samples)]


def _real_batches(setting, data, images, count, decoded):
    import torch

    from dataset.stream import stream_indices

    size = setting.config["sample"]["batchsize"]
    generator = torch.Generator()
    for start in range(0, count, size):
        indices = stream_indices(images.num_images, 0, start, min(size, count - start))
        pixels, labels = map(torch.from_numpy, images.read(indices))
        if decoded:
            yield data.decode(data.encode(torch.from_numpy(data.dataset.read(indices)[0]), generator))[0], labels
        else:
            yield pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels
