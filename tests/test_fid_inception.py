"""fid.inception and the embedding around it: parity with public ports on one random state dict, the resize, settings that stay put."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from fid_helpers import random_images, random_inception

from fid import embeddings, inception
from utils.cli import UserError


@pytest.fixture(scope="module")
def state():
    return random_inception()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return embeddings.Inception(weights, "cpu")


@pytest.fixture(scope="module")
def images():
    return random_images(3, 40, 56)


@pytest.fixture(scope="module")
def taps(extractor, images):
    return tuple(extractor.taps(images).values())


def slow_resize(image, size):
    """TensorFlow 1's bilinear resize of one (H, W, C) image, one output pixel after another, in float32."""
    height, width, channels = image.shape
    out = np.zeros((size, size, channels), np.float32)
    scale_y, scale_x = np.float32(height / size), np.float32(width / size)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * scale_y, np.float32(j) * scale_x
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            wy, wx = y - np.float32(y0), x - np.float32(x0)
            a, b, c, d = (image[r, s].astype(np.float32) for r, s in ((y0, x0), (y0, x1), (y1, x0), (y1, x1)))
            top, bottom = a + (b - a) * wx, c + (d - c) * wx
            out[i, j] = top + (bottom - top) * wy
    return out


@pytest.mark.parametrize("height, width, size", [(5, 7, 29), (64, 48, 29), (29, 29, 29), (1, 3, 4)])
def test_resize_equals_a_slow_loop(height, width, size):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = inception.resize_tf1(torch.from_numpy(image)[None], size)[0].numpy()
    np.testing.assert_allclose(found, slow_resize(image, size), atol=5e-5)  # a fused multiply-add rounds once less


@pytest.mark.parametrize("side", [64, 256, 512])
def test_resize_equals_torch_fidelity(side):
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = random_images(1, side, side)
    wanted = peer.interpolate_bilinear_2d_like_tensorflow1x(images.permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False)
    assert (inception.resize_tf1(images).permute(0, 3, 1, 2) - wanted).abs().max() < 1e-4  # grey levels of 0..255


def test_pool_features_equal_torch_fidelity(state, weights, images, taps):
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with torch.random.fork_rng():  # it initialises its layers before it loads them
        net = peer.FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"],
                                               feature_extractor_weights_path=str(weights))
    pool, logits = net(images.permute(0, 3, 1, 2))
    assert (taps[0] - pool).abs().max() < 4e-5
    assert taps[0].std(0).mean() > 1e-3  # else every image had the same features, and the line above proved nothing
    ours = taps[0] @ state["fc.weight"].T
    assert (ours - logits).abs().max() < 1e-3  # logits of size 1 from 2048 products


def test_both_taps_equal_pytorch_fid(state, images, taps, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **kwargs: dict(state))  # no download
    with torch.random.fork_rng():
        net = peer.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    seen = []
    blocks = [module for module in net.modules() if type(module).__name__ == "FIDInceptionC"]  # Mixed_6b, c, d, e
    blocks[2].branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = (inception.resize_tf1(images).permute(0, 3, 1, 2) - 128) / 128
    with torch.no_grad():
        pool = net(x)[0][:, :, 0, 0]
    assert (taps[0] - pool).abs().max() < 4e-5
    wanted = seen[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), 17 * 17 * 7)  # H, W, C as TensorFlow lays it out
    assert (taps[1] - wanted).abs().max() < 4e-5


def test_shapes_and_types(taps):
    assert taps[0].shape == (3, 2048) and taps[1].shape == (3, 2023)
    assert taps[0].dtype == taps[1].dtype == torch.float32


def test_numpy_and_single_images_give_the_same_features(extractor, images, taps):
    pool, spatial = extractor.taps(images[1:2].numpy()).values()
    assert (pool - taps[0][1:2]).abs().max() < 2e-5 and (spatial - taps[1][1:2]).abs().max() < 2e-5


def test_more_images_than_are_taken_at_a_time_give_the_same_features(extractor, images, taps, monkeypatch):
    monkeypatch.setattr(embeddings, "CPU_CHUNK", 2)
    for found, wanted in zip(extractor.taps(images).values(), taps):
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 2e-5


def test_a_call_gives_the_pooled_features_of_the_file_that_it_names(extractor, weights, images, taps):
    assert torch.equal(extractor(images), taps[0])
    assert extractor.settings["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_network_has_the_published_names_and_takes_no_weights_of_its_own():
    net = inception.make_network()
    names = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == 472 and {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var", "fc.bias"} <= set(names)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"} and not net.training


def precision_settings():
    """What a caller may have set."""
    backends = torch.backends
    return [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark,
            torch.is_autocast_enabled(), torch.is_grad_enabled()]


def test_callers_precision_changes_nothing_and_is_put_back(extractor, images, taps):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # TF32 on GPUs, bfloat16 matmuls on CPUs
        settings = precision_settings()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(extractor(images), taps[0])
            assert torch.is_autocast_enabled("cpu")
        assert precision_settings() == settings
    finally:
        torch.set_float32_matmul_precision(before)


def test_building_and_extracting_draw_no_random_numbers(weights, images):
    torch_before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    embeddings.Inception(weights, "cpu")(images[:1])
    assert torch.equal(torch.get_rng_state(), torch_before) and pickle.dumps(np.random.get_state()) == numpy_before


@pytest.mark.parametrize("images, message", [
    (torch.zeros(2, 8, 8, 3), "float32 .*floor..x . 1. . 127.5."),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "layout is NCHW"),
    (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), "repeat a grey channel"),
    (np.zeros((8, 8, 3), np.uint8), "batch axis"),
    (np.zeros((2, 0, 8, 3), np.uint8), "got uint8 .2, 0, 8, 3., wanted"),
])
def test_wrong_layout_or_dtype_is_told(extractor, images, message):
    with pytest.raises(ValueError, match=message):
        extractor(images)


def test_missing_weights_name_the_download_command(tmp_path):
    with pytest.raises(ValueError, match=r"python3 download_assets.py --name inception`, or name it as eval.weights \(fid: --weights"):
        embeddings.Inception(tmp_path / "nothing.pth", "cpu")


@pytest.mark.parametrize("change, message", [
    ({"Mixed_7c.branch_pool.bn.running_var": None}, "Missing key.* \"Mixed_7c.branch_pool.bn.running_var\""),
    ({"fc.weight": torch.zeros(1000, 2048)}, "size mismatch for fc.weight: .*1000, 2048.*1008, 2048.*FID Inception file"),
    ({"AuxLogits.fc.bias": torch.zeros(1)}, "Unexpected key.* \"AuxLogits.fc.bias\""),
])
def test_another_network_is_refused(state, tmp_path, change, message):
    torch.save({name: tensor for name, tensor in (state | change).items() if tensor is not None}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        embeddings.Inception(tmp_path / "weights.pth", "cpu")


@pytest.mark.parametrize("content", [b"hi", b"", b"no weights", [1, 2], {"fc.weight": "text"}, {"state_dict": {"a": torch.zeros(1)}}])
def test_other_files_given_as_weights_are_told(tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="weights.pth: not a plain state dict, tensors by name"):
        embeddings.Inception(path, "cpu")


class Payload:
    def __reduce__(self):
        return open, ("payload-was-run", "w")


def test_a_pickled_network_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="network.pkl: not a plain state dict"):
        embeddings.Inception(tmp_path / "network.pkl", "cpu")
    assert not (tmp_path / "payload-was-run").exists()
