import pytest
import torch

import models
from models import EDMPrecond


class Recorder(torch.nn.Module):
    """Stands for the network: returns 3 + 2 x and remembers what it was given."""
    in_size, in_channels, patch_size, num_tokens, num_classes = 4, 3, 2, 4, 5

    def forward(self, x, c_noise, class_labels=None, mask=None):
        self.x, self.c_noise, self.class_labels = x, c_noise, class_labels
        return 3 + 2 * x


@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.tensor([0.7, 0.7]), torch.tensor(0.7, dtype=torch.float64)])
def test_scalings_are_those_of_edm(sigma):
    net = EDMPrecond(Recorder())
    x = torch.randn(2, 3, 4, 4)
    denoised = net(x, sigma)
    variance = 0.7**2 + 0.5**2
    torch.testing.assert_close(net.model.x, x / variance**0.5)
    torch.testing.assert_close(net.model.c_noise, torch.full_like(net.model.c_noise, -0.3566749439 / 4))
    expected = 0.25 / variance * x + 0.7 * 0.5 / variance**0.5 * (3 + 2 * x / variance**0.5)
    torch.testing.assert_close(denoised, expected)


def test_result_and_network_input_are_float32():
    net = EDMPrecond(Recorder())
    assert net(torch.randn(2, 3, 4, 4, dtype=torch.float64), 1.0).dtype == torch.float32
    assert net.model.x.dtype == net.model.c_noise.dtype == torch.float32


def test_one_sigma_for_all_equals_the_same_sigma_for_each():
    torch.manual_seed(0)
    net = models.build_model("DiT-S/2", in_size=4, in_channels=3, num_classes=5, depth=1, width=24, num_heads=3, decoder_depth=1, decoder_width=16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(6, 3, 4, 4)
    for class_labels in (None, torch.tensor([0, 1, 2, 3, 4, 5])):
        # float32: a matrix product of one row and of six may round differently
        torch.testing.assert_close(net(x, 1.3, class_labels), net(x, torch.full((6,), 1.3), class_labels),
                                   rtol=1e-5, atol=1e-5)


def test_label_num_classes_and_no_label_are_the_same():
    net = models.build_model("DiT-S/2", in_size=4, in_channels=3, num_classes=5, depth=1, width=24, num_heads=3, decoder_depth=1, decoder_width=16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 3.0])
    assert torch.equal(net(x, sigma, torch.tensor([5, 5])), net(x, sigma))


@pytest.mark.parametrize("class_labels, message", [
    (torch.tensor([0, 6]), "want 0 to 4, or 5 for unconditional"),
    (torch.tensor([-1, 0]), "out of range"),
    (torch.eye(5)[:2], "not one-hot"),
    (torch.tensor([1]), "of shape \\(2,\\)"),
])
def test_bad_labels_are_refused(class_labels, message):
    with pytest.raises(ValueError, match=message):
        EDMPrecond(Recorder())(torch.randn(2, 3, 4, 4), 1.0, class_labels)


def test_labels_for_an_unconditional_model_are_refused():
    net = models.build_model("DiT-S/2", in_size=4, in_channels=3, num_classes=0, depth=1, width=24, num_heads=3)
    with pytest.raises(ValueError, match="num_classes=0"):
        net(torch.randn(2, 3, 4, 4), 1.0, torch.tensor([0, 1]))


def test_other_shapes_are_refused():
    net = EDMPrecond(Recorder())
    with pytest.raises(ValueError, match="takes \\(batch, 3, 4, 4\\)"):
        net(torch.randn(2, 3, 8, 8), 1.0)
    with pytest.raises(ValueError, match="sigma has 3 values"):
        net(torch.randn(2, 3, 4, 4), torch.ones(3))
    with pytest.raises(ValueError, match="mask is for"):
        net(torch.randn(2, 3, 4, 4), 1.0, mask=models.random_mask(2, 16, 0.5))
