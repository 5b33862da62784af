"""Fixtures that several test files share."""

import pytest

LATE = {"test_commands.py", "test_extract_latent.py", "test_resume.py", "test_faults.py"}


def pytest_collection_modifyitems(items):
    """Files that start whole scripts come last: most of what can be broken is told within the first minutes."""
    items.sort(key=lambda item: item.path.name in LATE)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Folder of a random diffusers autoencoder: f = 4, 4 latent channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                  latent_channels=4, norm_num_groups=4, mid_block_add_attention=False, layers_per_block=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs():
    """Starts training runs, see training_runs.Runs."""
    from training_runs import Runs

    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_latents(tmp_path_factory):
    """Folder of 23 stored latents (8, 8, 8) of 5 classes."""
    from training_runs import write_latents

    return write_latents(tmp_path_factory.mktemp("latents") / "set")
