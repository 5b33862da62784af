"""fid.sources and fid.statistics: every format that can be read, and what is said of those that cannot."""

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from fid import statistics
from fid.sources import Source, batches
from utils.cli import UserError


@pytest.fixture()
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def write_folder(folder, images):
    """a/0.png, a/2.png, ..., b/1.png, ...: sorted by path the order is 0, 2, 4, 6, 1, 3, 5."""
    for i, image in enumerate(images):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images[[0, 2, 4, 6, 1, 3, 5]]


def everything(source):
    return source.read(np.arange(len(source)))


def test_folder_is_read_recursively_in_sorted_order(tmp_path, images):
    wanted = write_folder(tmp_path, images)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._0.png").write_bytes(b"what some systems leave beside files")
    assert np.array_equal(everything(Source(tmp_path)), wanted)


def test_zip_equals_folder(tmp_path, images):
    wanted = write_folder(tmp_path / "images", images)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(tmp_path / "images"))
        archive.writestr("dataset.json", "{}")
    assert np.array_equal(everything(Source(tmp_path / "images.zip")), wanted)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_its_order(tmp_path, images, save):
    save(tmp_path / "samples.npz", arr_0=images, labels=np.arange(7))
    source = Source(tmp_path / "samples.npz")
    assert np.array_equal(everything(source), images)
    assert isinstance(source.images.array, np.memmap) == (save is np.savez)  # 50,000 images need not fit into memory


def test_grey_and_16_bit_images_are_read_as_everywhere_else(tmp_path):
    """dataset.images.read_picture is the one decoder: 16 bits are scaled, not clipped to white."""
    for number, grey in enumerate((np.full((4, 4), 9, np.uint8), np.full((4, 4), 9 * 256 + 255, np.uint16))):
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    source = Source(tmp_path)
    assert (everything(source) == 9).all() and len(source) == 2


def test_a_random_subset_keeps_file_order_and_depends_on_the_seed(images):
    many = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    found = [everything(Source(many, 10, seed))[:, 0, 0, 0].tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0] == sorted(set(found[0])) and len(found[0]) == 10
    with pytest.raises(ValueError, match="--keep asks for 101 images, it has 100; give 1 to 100"):
        Source(many, 101, option="--keep")


def test_batches_of_positions_hold_every_image_once(images):
    found = list(batches(Source(images), 3, positions=np.array([0, 2, 3, 5])))
    assert [(index, len(batch)) for index, batch in found] == [(0, 3), (1, 1)]
    assert np.array_equal(np.concatenate([batch for _, batch in found]), images[[0, 2, 3, 5]])


def test_mixed_sizes_are_told_before_any_work(tmp_path, images):
    write_folder(tmp_path, images)
    Image.fromarray(images[0, :4]).save(tmp_path / "b" / "9.png")
    with pytest.raises(ValueError, match="mixed sizes, .*0.png is 5x6 and .*9.png is 5x4; give a folder of the samples alone"):
        Source(tmp_path)


def test_unreadable_inputs_are_told(tmp_path, images):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        Source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images; wanted files"):
        Source(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        Source(tmp_path)
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="short.npz cannot be read: "):
        Source(tmp_path / "short.npz")
    (tmp_path / "samples.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="samples.tar: wanted a folder of images, a .zip, a .npz"):
        Source(tmp_path / "samples.tar")


@pytest.mark.parametrize("array, message", [
    (np.zeros((2, 4, 4, 3), np.float32), "float32 of shape .2, 4, 4, 3., wanted uint8"),
    (np.zeros((2, 3, 4, 4), np.uint8), "layout is NCHW"),
])
def test_wrong_arrays_in_npz_are_told_before_they_are_read(tmp_path, array, message):
    np.savez(tmp_path / "samples.npz", arr_0=array)
    with pytest.raises(ValueError, match=message):
        Source(tmp_path / "samples.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["mu", "sigma", "arr_0"])
def test_changed_bytes_in_npz_are_told(tmp_path, images, save, key):
    """Every 7th byte of one array's entry is changed in turn; what is read at all must be as it was, or refused in words."""
    arrays = {"mu": np.ones(3), "sigma": np.eye(3), "arr_0": images[:2]}
    save(tmp_path / "whole.npz", **arrays)
    whole = (tmp_path / "whole.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        info = archive.getinfo(f"{key}.npy")
    first = info.header_offset + 30 + len(f"{key}.npy")
    refused = 0
    for place in range(first, first + info.compress_size, 7):
        (tmp_path / "ref.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
        try:
            statistics.load_statistics(tmp_path / "ref.npz")
            Source(tmp_path / "ref.npz")
        except ValueError as error:
            refused += 1
            assert "ref.npz" in str(error)
    assert refused  # plainly stored images are mapped, so a changed pixel there is not noticed


def test_single_array_named_npz_is_told(tmp_path, images):
    with open(tmp_path / "images.npz", "wb") as file:
        np.save(file, images)
    with pytest.raises(ValueError, match="images.npz: a single array, wanted an .npz"):
        Source(tmp_path / "images.npz")


def test_statistics_given_as_images_are_told(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="no arr_0; it holds statistics only, which can be the reference but not the images"):
        Source(tmp_path / "ref.npz")


def test_objects_in_npz_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1), allow_pickle=True)
    with pytest.raises(UserError, match="mu cannot be read: it does not hold plain numbers") as caught:
        statistics.load_statistics(tmp_path / "evil.npz")
    assert "allow_pickle" not in str(caught.value)  # numpy's advice, which would run whatever the file says
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps({"mu": 1}))
    with pytest.raises(ValueError, match=".npz cannot be read: "):
        statistics.load_statistics(tmp_path / "pickled.npz")


def gaussian(dim):
    return np.arange(dim, dtype=np.float64), np.eye(dim) * 2


def test_own_statistics_survive_the_file(tmp_path, images):
    settings = {"embedding": "inception", "weights_sha256": "12ab", "resize": "tf1-bilinear-299", "num_images": 70,
                "conversion": "as stored", "software": "x"}
    statistics.save_statistics(tmp_path / "ref.npz", {"pool": gaussian(4), "spatial": gaussian(3)}, settings, images)
    gaussians, found = statistics.load_statistics(tmp_path / "ref.npz")
    assert found == settings
    for tap, dim in (("pool", 4), ("spatial", 3)):
        assert all(map(np.array_equal, gaussians[tap], gaussian(dim)))
    assert np.array_equal(everything(Source(tmp_path / "ref.npz")), images)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adm_and_edm_files_are_read(tmp_path, dtype):
    np.savez(tmp_path / "adm.npz", mu=np.ones(3, dtype), sigma=np.eye(3, dtype=dtype), mu_s=np.zeros(2, dtype),
             sigma_s=np.eye(2, dtype=dtype))
    np.savez(tmp_path / "edm.npz", mu=np.ones(3, dtype), sigma=np.eye(3, dtype=dtype))
    (adm, settings), (edm, _) = (statistics.load_statistics(tmp_path / name) for name in ("adm.npz", "edm.npz"))
    assert adm["pool"][0].dtype == np.float64 and adm["spatial"][0].shape == (2,) and settings == {}
    assert set(edm) == {"pool"}


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(3), np.eye(2), "wanted floats .d,. and .d, d."),
    (np.zeros(2), np.full((2, 2), np.nan), "wanted floats .* without NaN"),
])
def test_broken_statistics_are_told(tmp_path, mu, sigma, message):
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=message):
        statistics.load_statistics(tmp_path / "ref.npz")
