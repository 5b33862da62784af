import io
import multiprocessing
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest

from latent_helpers import NUM_CLASSES, NUM_IMAGES, SHAPE, random_moments, tree, write_set
from dataset import convert as convert_latents
from dataset.formats import find_latents, open_latents
from dataset.store import LatentWriter, StoredLatents
from utils.cli import UserError

MOMENTS, MIRRORED, LABELS = random_moments()
LATENT_SHAPE = (4, 3, 3)
LATENTS, LATENTS_FLIP, _ = random_moments(shape=LATENT_SHAPE)


def write_lmdb(path, mirrored=True, length=NUM_IMAGES, samples=NUM_IMAGES):
    path.mkdir(parents=True)
    moments = np.concatenate([MOMENTS, MIRRORED]) if mirrored else MOMENTS
    environment = lmdb.open(str(path), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for i, sample in enumerate(moments[:2 * samples]):
            transaction.put(f"z-{i}".encode(), sample.tobytes())
            transaction.put(f"y-{i}".encode(), str(LABELS[i % NUM_IMAGES]).encode())
        if length is not None:
            transaction.put(b"length", str(length).encode())
    environment.close()
    return path


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a float: makes pax headers, as the webdataset package does
            tar.addfile(info, io.BytesIO(data))
    return path


def write_webdataset(path, style="npy"):
    """11 samples in shards of 4, members as `style` says; `pickle` is what the published converter writes."""
    encode = {"npy": ("latent.npy", npy), "pickle": ("latent", pickle.dumps)}[style]
    path.mkdir()
    for shard, start in enumerate(range(0, NUM_IMAGES, 4)):
        members = []
        for i in range(start, min(start + 4, NUM_IMAGES)):
            members.append((f"part/{i:06d}.{encode[0]}", encode[1](MOMENTS[i])))
            members.append((f"part/{i:06d}.cls", b"%d" % LABELS[i]))
            members.append((f"part/{i:06d}.json", b"{}"))  # others' shards hold more
        write_tar(path / f"train-{shard:04d}.tar", members)
    return path


def write_safetensors(path, moments=MOMENTS, flip=MIRRORED):
    from safetensors.numpy import save_file
    path.mkdir()
    for shard, part in enumerate(np.array_split(np.arange(NUM_IMAGES), 3)):
        tensors = {"latents": moments[part], "labels": LABELS[part]}
        if flip is not None:
            tensors["latents_flip"] = flip[part]
        save_file(tensors, path / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"note": "x"})
    return path


def write_features(path, samples=MOMENTS):
    features, labels = path / "imagenet256_features", path / "imagenet256_labels"
    features.mkdir(parents=True)
    labels.mkdir()
    for i in range(NUM_IMAGES):  # 10.npy sorts before 2.npy by name
        np.save(features / f"{i}.npy", samples[i][None])
        np.save(labels / f"{i}.npy", LABELS[i:i + 1])
    return path


CLASS_ORDER = np.argsort(LABELS, kind="stable")  # class folders list class 0 first


def write_class_folders(path, flip=True):
    for i in range(NUM_IMAGES):
        folder = path / f"n{LABELS[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"img_{i:03d}.JPEG.npz", moments=MOMENTS[i], **({"moments_flip": MIRRORED[i]} if flip else {}))
    return path


# name: (writer, order of the images, mirrored copies stored)
SETS = {
    "own": (write_set, None, True),
    "lmdb": (write_lmdb, None, True),
    "lmdb below train": (lambda path: write_lmdb(path / "train").parent, None, True),
    "lmdb without mirrored": (lambda path: write_lmdb(path, mirrored=False), None, False),
    "webdataset npy": (write_webdataset, None, False),
    "webdataset pickle": (lambda path: write_webdataset(path, "pickle"), None, False),
    "safetensors": (write_safetensors, None, True),
    "safetensors without mirrored": (lambda path: write_safetensors(path, flip=None), None, False),
    "features": (write_features, None, False),
    "class folders": (write_class_folders, CLASS_ORDER, True),
    "class folders without mirrored": (lambda path: write_class_folders(path, flip=False), CLASS_ORDER, False),
}


@pytest.fixture(params=SETS)
def written(request, tmp_path):
    """(path, moments of all samples, labels of all samples, stored mirrored?)."""
    write, order, mirrored = SETS[request.param]
    order = np.arange(NUM_IMAGES) if order is None else order
    moments = [MOMENTS[order], MIRRORED[order]] if mirrored else [MOMENTS[order]]
    return write(tmp_path / "set"), np.concatenate(moments), np.tile(LABELS[order], len(moments)), mirrored


def test_samples_equal_what_was_written(written):
    path, moments, labels, mirrored = written
    latents = open_latents(path, xflip=mirrored)
    assert latents.holds_mirrored == mirrored and latents.sample_shape == SHAPE and latents.dtype == np.float32
    assert len(latents) == len(moments)
    order = np.random.default_rng(1).permutation(len(moments))
    found, found_labels = latents.read(order)
    np.testing.assert_array_equal(found, moments[order])
    np.testing.assert_array_equal(found_labels, labels[order])


def test_mirrored_copies_are_left_out_unless_asked_for(written):
    path, moments, _, _ = written
    latents = open_latents(path)
    assert len(latents) == NUM_IMAGES and not latents.mirrored
    np.testing.assert_array_equal(latents.read(range(NUM_IMAGES))[0], moments[:NUM_IMAGES])


def test_scale_is_stable_diffusions_unless_the_format_says_otherwise(written):
    latents = open_latents(written[0])
    wanted = (0.25, 0.5) if isinstance(latents, StoredLatents) else (0.18215, 0.0)
    assert (latents.scale, latents.shift) == wanted


def test_set_survives_pickling_and_threads(written):
    path, moments, _, mirrored = written
    latents = open_latents(path, xflip=mirrored)
    latents.read([0])
    latents = pickle.loads(pickle.dumps(latents))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: latents.read([i])[0][0], range(len(moments))))
    np.testing.assert_array_equal(parts, moments)


def _read_in_child(sets, results):
    results.put([latents.read([NUM_IMAGES - 1])[0][0] for latents in sets])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_open_sets_work_in_children(tmp_path, method):
    sets = [open_latents(write(tmp_path / name)) for name, (write, _, _) in SETS.items()]
    in_parent = [latents.read([NUM_IMAGES - 1])[0][0] for latents in sets]  # so the files are open when the child starts
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(sets, results))
    child.start()
    np.testing.assert_array_equal(results.get(timeout=100), in_parent)
    child.join()
    assert child.exitcode == 0
    np.testing.assert_array_equal([latents.read([NUM_IMAGES - 1])[0][0] for latents in sets], in_parent)


def test_two_readers_of_one_set_live_side_by_side(written):
    first, second = open_latents(written[0]), open_latents(written[0])
    np.testing.assert_array_equal(first.read([3])[0], second.read([3])[0])


def test_index_outside_the_set_is_refused(written):
    latents = open_latents(written[0])
    for index in (-1, NUM_IMAGES):
        with pytest.raises(IndexError, match="samples 0..10"):
            latents.read([index])


# ---- latents instead of moments

@pytest.mark.parametrize("name", ["safetensors", "features"])
def test_latents_become_moments_that_give_them_back(tmp_path, name):
    from models import sample_moments
    import torch

    path = {"safetensors": lambda path: write_safetensors(path, LATENTS, LATENTS_FLIP),
            "features": lambda path: write_features(path, LATENTS)}[name](tmp_path / "set")
    latents = open_latents(path)
    moments, _ = latents.read(range(NUM_IMAGES))
    assert latents.sample_shape == SHAPE
    np.testing.assert_array_equal(moments[:, :4], LATENTS)
    assert (moments[:, 4:] == -30).all()
    drawn = sample_moments(torch.from_numpy(moments), scale=latents.scale, shift=latents.shift)
    # noise of standard deviation exp(-15) = 3e-7: 6 of it, and float32 rounding of values up to 4
    np.testing.assert_allclose(drawn / latents.scale, LATENTS, atol=6 * 3.1e-7 + 5e-7)


def test_scaled_latents_of_fast_dit_are_not_scaled_again(tmp_path):
    assert open_latents(write_features(tmp_path / "a", LATENTS)).scale == 1.0
    assert open_latents(write_features(tmp_path / "b", MOMENTS)).scale == 0.18215


# ---- scale and shift

def write_statistics(path, mean, std):
    import torch
    torch.save({"mean": torch.tensor(mean).reshape(1, -1, 1, 1), "std": torch.tensor(std).reshape(1, -1, 1, 1)}, path / "latents_stats.pt")


def test_lightningdits_statistics_give_latents_of_mean_0_and_std_half(tmp_path):
    """sigma_data = 0.5 supposes latents of standard deviation 0.5; the file says the stored ones' mean and deviation by channel."""
    from models import sample_moments
    import torch

    mean, std = LATENTS.mean((0, 2, 3)), LATENTS.std((0, 2, 3))
    path = write_safetensors(tmp_path / "set", LATENTS * 3 + 1, None)
    write_statistics(path, mean * 3 + 1, std * 3)
    latents = open_latents(path)
    drawn = sample_moments(torch.from_numpy(latents.read(range(NUM_IMAGES))[0]), scale=latents.scale, shift=latents.shift)
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), 0, atol=1e-5)  # float32 sums of 99 values
    np.testing.assert_allclose(drawn.std((0, 2, 3), correction=0), 0.5, rtol=1e-5)
    np.testing.assert_allclose(drawn, (LATENTS - mean[:, None, None]) / std[:, None, None] * 0.5, atol=1e-5)
    with pytest.raises(UserError, match="shift=0.0 is asked for .*says"):
        open_latents(path, shift=0.0)


@pytest.mark.parametrize("mean, std", [([0.0] * 4, [1.0, 1.0, 0.0, 1.0]), ([0.0] * 4, [1.0, np.nan, 1.0, 1.0]), ([0.0] * 3, [1.0] * 3),
                                       ([np.inf] * 4, [1.0] * 4)])
def test_impossible_statistics_are_told(tmp_path, mean, std):
    path = write_safetensors(tmp_path / "set", LATENTS, None)
    write_statistics(path, mean, std)
    with pytest.raises(UserError, match="latents_stats.pt: (scale|shift)=.*wanted a (positive|finite) number, or 4 of them"):
        open_latents(path)


def test_damaged_or_hostile_statistics_are_told(tmp_path):
    import torch
    path = write_safetensors(tmp_path / "set", LATENTS, None)
    file = path / "latents_stats.pt"
    torch.save({"mean": torch.zeros(4)}, file)
    whole = file.read_bytes()
    for content in (whole, whole[:100], b"", pickle.dumps(print)):
        file.write_bytes(content)
        with pytest.raises(UserError, match="latents_stats.pt cannot be read: ") as caught:
            open_latents(path)
        assert "weights_only" not in str(caught.value)


def test_a_set_that_does_not_say_its_scale_takes_the_users(written):
    if isinstance(find_latents(written[0]), StoredLatents):
        pytest.skip("says its scale")
    latents = open_latents(written[0], scale=0.5, shift=[1, 2, 3, 4])
    assert latents.description == {"scale": 0.5, "shift": [1.0, 2.0, 3.0, 4.0], "vae": ""}


@pytest.mark.parametrize("wish", [{"scale": 0}, {"scale": -1.0}, {"scale": float("nan")}, {"shift": float("inf")},
                                  {"scale": [1, 2]}, {"scale": "x"}])
def test_impossible_scales_are_told(tmp_path, wish):
    with pytest.raises(UserError, match="wanted a (positive|finite) number, or 4 of them"):
        open_latents(write_features(tmp_path / "set"), **wish)


def test_wider_moments_of_mar_are_moments(tmp_path):
    wide = np.random.default_rng(3).standard_normal((32, 3, 3), np.float32)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "0.npz", moments=wide, moments_flip=wide)
    latents = open_latents(tmp_path)
    assert latents.sample_shape == (32, 3, 3) and latents.scale == 0.2325
    assert latents.num_classes == 2 and latents.class_names == ["a", "b"]
    np.testing.assert_array_equal(latents.read([1])[0][0], wide)


def test_half_precision_and_bfloat16_are_read_exactly(tmp_path):
    import torch
    from safetensors.torch import save_file

    halves = torch.from_numpy(MOMENTS).half()
    brains = torch.from_numpy(MOMENTS).bfloat16()
    for name, tensor in (("half", halves), ("brain", brains)):
        (tmp_path / name).mkdir()
        save_file({"latents": tensor, "labels": torch.from_numpy(LABELS)}, tmp_path / name / "0.safetensors")
    half, brain = open_latents(tmp_path / "half"), open_latents(tmp_path / "brain")
    assert half.dtype == np.float16 and brain.dtype == np.float32
    np.testing.assert_array_equal(half.read(range(NUM_IMAGES))[0], halves.numpy())
    np.testing.assert_array_equal(brain.read(range(NUM_IMAGES))[0], brains.float().numpy())


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_member_names_do_not_disturb_their_neighbours(tmp_path, tar_format):
    long = "deep/" + "x" * (90 if tar_format == tarfile.USTAR_FORMAT else 180)
    members = [(f"{long}{i}.{kind}", data) for i in range(3)
               for kind, data in (("npy", npy(MOMENTS[i])), ("cls", str(LABELS[i]).encode()))]
    write_tar(tmp_path / "0.tar", members, format=tar_format)
    moments, labels = open_latents(tmp_path).read([0, 1, 2])
    np.testing.assert_array_equal(moments, MOMENTS[:3])
    np.testing.assert_array_equal(labels, LABELS[:3])


# ---- damage

def damaged(path, message):
    """Opening, or else reading everything, fails with this message."""
    with pytest.raises(ValueError, match=message):
        latents = find_latents(path)
        latents.mirrored = latents.holds_mirrored
        latents.read(range(len(latents)))


def cut(file, by=1):
    os.truncate(file, file.stat().st_size - by)


def test_lmdb_cut_short_is_told_before_it_kills_the_process(tmp_path):
    path = write_lmdb(tmp_path / "set")
    file = path / "data.mdb"
    cut(file, by=3 * 4096)
    damaged(path, r"data.mdb is cut short: \d+ bytes, wanted \d+")


def test_lmdb_faults_name_file_and_key(tmp_path):
    damaged(write_lmdb(tmp_path / "a", length=None), "data.mdb: no key length")
    damaged(write_lmdb(tmp_path / "b", mirrored=False, length=12), "data.mdb: no key z-11")
    damaged(write_lmdb(tmp_path / "c", length=0), "data.mdb holds no samples")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data.mdb").write_bytes(b"not a database" * 1000)
    damaged(tmp_path / "d", "data.mdb cannot be read: ")
    path = write_lmdb(tmp_path / "e")
    environment = lmdb.open(str(path))
    with environment.begin(write=True) as transaction:
        transaction.put(b"z-5", MOMENTS[5].tobytes()[:-4])
        transaction.put(b"y-6", b"cat")
    environment.close()
    damaged(path, "data.mdb: z-5 cannot be read: cannot reshape array of size 71 into shape ")
    with pytest.raises(ValueError, match="data.mdb: y-6 cannot be read: invalid literal .* b'cat'"):
        open_latents(path).read([6])


def test_tar_faults_name_file_and_member(tmp_path):
    path = write_webdataset(tmp_path / "a")
    cut(path / "train-0001.tar", by=10240)
    damaged(path, "train-0001.tar cannot be read: ")
    for name, members, message in (
            ("b", [("a.cls", b"1")], "0.tar: sample a has cls with content, wanted moments .one of moments.npy"),
            ("c", [("a.pyd", pickle.dumps(MOMENTS[0])), ("a.cls", b"1")], "sample a has cls, pyd with content"),
            ("d", [("a.npy", npy(MOMENTS[0])), ("a.cls", b"")], "sample a has npy with content, wanted moments .* and a label .cls, "),
            ("e", [("a.npy", npy(MOMENTS[0])[:-1]), ("a.cls", b"1")], "0.tar: a.npy cannot be read: "),
            ("f", [("a.latent", MOMENTS[0].tobytes()), ("a.cls", b"1")], "a.latent: 288 bytes, neither a .npy file nor a pickled numpy"),
            ("g", [("a.npy", npy(MOMENTS[0])), ("a.cls", b"cat")], "a.cls cannot be read: invalid literal .* b'cat'"),
            ("h", [("a.npy", npy(MOMENTS[0])), ("a.cls", b"-3")], "a.cls is -3, wanted one whole number from 0"),
            ("i", [("a.npy", npy(MOMENTS[0][:, :2])), ("a.cls", b"1")],
             r"shape \(8, 2, 3\), wanted float16 or float32 \(channels, size, size\)"),
            ("j", [("a.npy", npy(np.array([{}]))), ("a.cls", b"1")], "a.npy cannot be read: it does not hold plain numbers"),
            ("k", [], "k holds no samples")):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", members)
        with pytest.raises(ValueError, match=message):
            open_latents(tmp_path / name).read([0])


@pytest.mark.parametrize("content, message", [(b"", "empty file"), (b"\x1f\x8b" + b"z" * 1000, "0.tar cannot be read: ")])
def test_other_files_named_tar_are_told(tmp_path, content, message):
    (tmp_path / "0.tar").write_bytes(content)
    damaged(tmp_path, message)


def test_every_way_to_cut_a_tar_is_told(tmp_path):
    """A tar cut at any block boundary, also between two samples, is refused: the end mark is missing."""
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.{kind}", data) for i in range(2) for kind, data in
                                               (("npy", npy(MOMENTS[i])), ("cls", b"1"))]).read_bytes()
    used = len(whole.rstrip(b"\0"))
    for end in range(512, used, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        damaged(tmp_path / "cut.tar", "cut.tar cannot be read: ")


def test_sample_of_another_shape_is_told(tmp_path):
    path = write_features(tmp_path / "a")
    np.save(path / "imagenet256_features" / "7.npy", np.zeros((1, 8, 4, 4), np.float32))
    damaged(path, r"7.npy: float32 of shape \(8, 4, 4\), the first one is float32 of shape \(8, 3, 3\)")
    np.save(path / "imagenet256_features" / "7.npy", MOMENTS[:1].astype(np.float64))
    damaged(path, r"7.npy: float64 of shape \(8, 3, 3\), the first one is float32")
    np.save(path / "imagenet256_features" / "0.npy", MOMENTS[:1].astype(np.float64))
    damaged(path, r"0.npy: float64 of shape \(8, 3, 3\), wanted float16 or float32")


def test_safetensors_faults_name_file_and_tensor(tmp_path):
    from safetensors.numpy import save_file
    path = write_safetensors(tmp_path / "a")
    cut(path / "latents_rank00_shard001.safetensors")
    damaged(path, "shard001.safetensors cannot be read: ")
    for name, tensors, message in (
            ("b", {"latents": MOMENTS}, ".*File does not contain tensor labels"),
            ("c", {"latents": MOMENTS, "labels": LABELS[:5]}, r".*'latents': \[11, 8, 3, 3\].* with int64 labels \(5,\)"),
            ("g", {"latents": MOMENTS, "latents_flip": MIRRORED[:5], "labels": LABELS}, r".*'latents_flip': \[5, 8, 3, 3\]"),
            ("h", {"moments": MOMENTS, "labels": LABELS}, "{} with int64 labels .11,., wanted latents"),
            ("d", {"latents": MOMENTS.astype(np.float64), "labels": LABELS}, "latents: float64 of shape .*, wanted float16 or float32"),
            ("f", {"latents": MOMENTS, "labels": LABELS.astype(np.float32)}, ".*with float32 labels .11,., wanted .* whole numbers")):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "0.safetensors")
        damaged(tmp_path / name, f"0.safetensors.*{message}")
    (tmp_path / "e").mkdir()
    for content in (b"\xff" * 100, b"\x04" + bytes(7) + b"{{{{", b""):
        (tmp_path / "e" / "0.safetensors").write_bytes(content)
        damaged(tmp_path / "e", "0.safetensors cannot be read: ")


def test_feature_folder_faults_name_the_file(tmp_path):
    path = write_features(tmp_path / "a")
    (path / "imagenet256_labels" / "4.npy").unlink()
    damaged(path, "11 and 10 .npy files, 1 of them in only one folder, first 4.npy")
    np.save(path / "imagenet256_labels" / "4.npy", np.array([1.5]))
    damaged(path, r"4.npy is 1.5, wanted one whole number")
    cut(path / "imagenet256_features" / "5.npy")
    damaged(path, "5.npy cannot be read: ")


def test_class_folder_faults_name_file_and_key(tmp_path):
    path = write_class_folders(tmp_path / "a")
    file = path / "n0" / "img_004.JPEG.npz"
    np.savez(file, moments=MOMENTS[4])
    damaged(path, "img_004.JPEG.npz: no array moments_flip; found moments")
    cut(file, by=100)
    damaged(path, "img_004.JPEG.npz cannot be read: ")


def test_nothing_known_at_the_path_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        open_latents(tmp_path / "nowhere")
    (tmp_path / "cat.jpg").write_bytes(b"")
    for path in (tmp_path, tmp_path / "cat.jpg"):
        with pytest.raises(ValueError, match="no stored latents found.*manifest.json, data.mdb, "):
            open_latents(path)


def test_interrupted_extraction_is_not_taken_for_another_format(tmp_path):
    (tmp_path / ".partial").mkdir()
    with pytest.raises(ValueError, match="interrupted"):
        open_latents(tmp_path)


def test_labels_beyond_the_number_of_classes_are_told(tmp_path):
    latents = open_latents(write_lmdb(tmp_path / "set"))
    latents.num_classes = 2
    with pytest.raises(ValueError, match="data.mdb: sample 5 has label 2, wanted 0..1"):
        latents.read([1, 5, 2])


# ---- conversion

@pytest.fixture
def convert(monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["convert_latents", *map(str, args)])
        convert_latents.main()
    return run


@pytest.mark.parametrize("store, dtype", [("keep", np.float32), ("fp16", np.float16)])
def test_any_format_converts_to_the_same_samples(written, tmp_path, convert, store, dtype):
    path, moments, labels, mirrored = written
    convert(path, tmp_path / "own", "--shard_size", 4, "--store", store)
    latents = open_latents(tmp_path / "own", xflip=mirrored)
    found, found_labels = latents.read(range(len(latents)))
    assert latents.num_classes == NUM_CLASSES and latents.holds_mirrored == mirrored
    np.testing.assert_array_equal(found, moments.astype(dtype))
    np.testing.assert_array_equal(found_labels, labels)
    assert (latents.scale, latents.shift) == (open_latents(path).scale, open_latents(path).shift)


def test_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path, convert, monkeypatch):
    path = write_lmdb(tmp_path / "lmdb")
    convert(path, tmp_path / "straight", "--shard_size", 4)
    real, written_shards = LatentWriter.write, []

    def interrupted(self, shard, *content):
        if shard == 2:
            raise KeyboardInterrupt
        real(self, shard, *content)

    def counted(self, shard, *content):
        written_shards.append(shard)
        real(self, shard, *content)

    monkeypatch.setattr(LatentWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "broken", "--shard_size", 4)
    monkeypatch.setattr(LatentWriter, "write", counted)
    convert(path, tmp_path / "broken", "--shard_size", 4)
    assert written_shards == [2] and tree(tmp_path / "broken") == tree(tmp_path / "straight")


def test_conversion_takes_scale_and_reports_a_wrong_number_of_classes(tmp_path, convert):
    path = write_lmdb(tmp_path / "lmdb")
    with pytest.raises(ValueError, match="has label 2, wanted 0..1"):
        convert(path, tmp_path / "own", "--num_classes", 2)
    convert(path, tmp_path / "other", "--num_classes", 5, "--scale", 0.3, "--shift", 0.1, "--vae", "mine")
    latents = StoredLatents(tmp_path / "other")
    assert (latents.num_classes, latents.scale, latents.shift, latents.vae) == (5, 0.3, 0.1, "mine")
    with pytest.raises(UserError, match="scale=0.3 is asked for .* but .*other says 0.3|scale=0.4 is asked for"):
        convert(tmp_path / "other", tmp_path / "third", "--scale", 0.4)
    assert not (tmp_path / "third").exists()


def test_statistics_and_digest_survive_conversion(tmp_path, convert):
    path = write_safetensors(tmp_path / "set", LATENTS, None)
    write_statistics(path, [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 5.0])
    convert(path, tmp_path / "own")
    assert StoredLatents(tmp_path / "own").description == {"scale": [0.5, 0.25, 0.125, 0.1], "shift": [0.0, 1.0, 2.0, 3.0], "vae": ""}
    convert(write_set(tmp_path / "first"), tmp_path / "second", "--store", "fp16")
    assert StoredLatents(tmp_path / "second").vae_digest == "0123456789abcdef"


@pytest.mark.parametrize("dest, message", [("lmdb/data.mdb", "is a file; give a folder"), ("x" * 300, "File name too long"),
                                           ("/proc/set", "/proc/set cannot be written"), ("lmdb", "is not empty .data.mdb")])
def test_a_destination_that_cannot_be_is_told(tmp_path, convert, dest, message):
    path = write_lmdb(tmp_path / "lmdb")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / dest)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("options", [("--shard_size", 0), ("--num_classes", 1), ("--scale", 0), ("--shift", "nan")])
def test_refused_options_leave_no_folder(tmp_path, convert, options):
    with pytest.raises(UserError):
        convert(write_lmdb(tmp_path / "lmdb"), tmp_path / "own", *options)
    assert not (tmp_path / "own").exists()
