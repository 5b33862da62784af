"""dataset.webdataset: pickled arrays as the published converter writes them, and nothing else that a pickle could do."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataset import webdataset
from dataset.formats import open_latents
from dataset.webdataset import read_pickle
from utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = np.random.default_rng(0).standard_normal((8, 4, 4), np.float32)


def with_names_of_numpy(data, major):
    """The same pickle with the module names of numpy 1 (numpy.core) or 2 (numpy._core)."""
    assert data[0] == 0x80
    if data[2] == 0x95:  # FRAME: without it, no length has to be right
        data = data[:2] + data[11:]
    wanted = {1: "numpy.core", 2: "numpy._core"}[major]
    for module in ("multiarray", "numeric"):
        new = f"{wanted}.{module}".encode()
        for old in (f"numpy.core.{module}".encode(), f"numpy._core.{module}".encode()):
            data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)  # protocols 4 and 5
            data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")                                # protocols 2 and 3
    assert wanted.encode() in data
    return data


def write_shard(path, samples):
    """A tar as the published converter writes it: {i:07d}.latent a pickle, {i:07d}.cls the ascii class."""
    with tarfile.open(path, "w") as tar:
        for i, (latent, label) in enumerate(samples):
            for kind, data in (("latent", latent), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{i:07d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("major", [1, 2])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", [MOMENTS, MOMENTS.astype(np.float16), MOMENTS.astype(">f4"), np.asfortranarray(MOMENTS)],
                         ids=["float32", "float16", "big-endian", "Fortran"])
def test_pickled_arrays_are_read_bit_for_bit(array, protocol, major):
    found = read_pickle(with_names_of_numpy(pickle.dumps(array, protocol=protocol), major), "x")
    assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda target: Call(os.system, f"touch {target}"),
    "open": lambda target: Call(open, str(target), "w"),
    "eval": lambda target: Call(eval, f"open({str(target)!r}, 'w')"),
    "subprocess": lambda target: Call(subprocess.call, ["touch", str(target)]),
    "numpy's own": lambda target: Call(np.save, str(target), MOMENTS),
    "inside an array": lambda target: np.array([Call(os.system, f"touch {target}")], object),
    "beside an array": lambda target: (MOMENTS, Call(os.system, f"touch {target}")),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", HOSTILE)
def test_every_other_name_is_refused_before_it_runs(tmp_path, kind, protocol):
    target = tmp_path / "target.npy"
    data = pickle.dumps(HOSTILE[kind](target), protocol=protocol)
    path = write_shard(tmp_path / "0.tar", [(data, 0)])
    with pytest.raises(UserError, match=r"0.tar: 0000000.latent: \d+ bytes, neither .*it asks for "):
        open_latents(path)
    assert not target.exists()
    pickle.loads(data)
    assert target.exists()  # so the test would see it


def test_names_cannot_be_reached_by_dots_or_by_other_modules():
    for module, name in (("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile"), ("numpy", "load"), ("_codecs", "decode")):
        data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        with pytest.raises(UserError, match=f"it asks for {module}.{name}"):
            read_pickle(data, "x")


@pytest.mark.parametrize("value", [{"a": 1}, [1.0], "text", 5, None, MOMENTS.tobytes()])
def test_pickles_of_other_things_are_told(value):
    with pytest.raises(UserError, match="x: a pickled .*, wanted a numpy array"):
        read_pickle(pickle.dumps(value), "x")


def test_arrays_of_objects_are_told(tmp_path):
    path = write_shard(tmp_path / "0.tar", [(pickle.dumps(np.full((8, 4, 4), None)), 0)])
    with pytest.raises(UserError, match="0000000.latent: object of shape .8, 4, 4., wanted float16 or float32"):
        open_latents(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_cut_anywhere_is_told(protocol):
    data = pickle.dumps(MOMENTS, protocol=protocol)
    for end in range(len(data)):
        with pytest.raises(UserError, match=f"x: {end} bytes, neither"):
            read_pickle(data[:end], "x")


def test_a_pickle_that_wants_all_memory_is_told():
    huge = pickle.dumps(Call(np.ndarray, (1 << 50,)), protocol=4)
    with pytest.raises(UserError, match="neither a .npy file nor a pickled numpy array"):
        read_pickle(huge, "x")


# ---- the index beside the shards

@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [(pickle.dumps(MOMENTS + i), i) for i in range(3)])
    return tmp_path


def test_a_second_opening_reads_no_tar(shards, monkeypatch, capsys):
    first = open_latents(shards)
    assert "looking through 2 tar files; .tar-index.npz beside them keeps what is found" in capsys.readouterr().out
    monkeypatch.setattr(tarfile, "open", None)
    second = open_latents(shards)
    for one, other in zip(first.read(range(6)), second.read(range(6))):
        np.testing.assert_array_equal(one, other)
    assert capsys.readouterr().out == ""


def test_a_changed_shard_is_looked_through_again(shards):
    open_latents(shards)
    write_shard(shards / "1.tar", [(pickle.dumps(MOMENTS), 7)])
    assert open_latents(shards).read_labels(range(4)).tolist() == [0, 1, 2, 7]


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"hello"])
def test_a_damaged_index_is_made_anew(shards, content):
    (shards / ".tar-index.npz").write_bytes(content)
    assert len(open_latents(shards)) == 6


def test_a_place_that_cannot_be_written_is_fine(shards, monkeypatch):
    def refuse(path):
        raise PermissionError("read-only")
    monkeypatch.setattr(webdataset, "write_whole", refuse)
    assert len(open_latents(shards)) == 6


def test_a_shard_cut_while_it_is_read_is_told(shards):
    latents = open_latents(shards)
    os.truncate(shards / "1.tar", 700)
    with pytest.raises(UserError, match="1.tar is cut short: 700 bytes, wanted "):
        latents.read([5])


# ---- the published 512 px set

def test_the_512_config_trains_on_shards_of_the_published_converter(tmp_path):
    """What train_latent.py refused: pickled [8, 64, 64] arrays of 131,236 bytes. The config's own settings, but for the
    model's size and the grids, which need the autoencoder."""
    rng = np.random.default_rng(1)
    shards = tmp_path / "latents"
    shards.mkdir()
    for number, protocol in enumerate((4, 2)):
        samples = [(pickle.dumps(rng.standard_normal((8, 64, 64), np.float32), protocol=protocol), i) for i in range(3)]
        write_shard(shards / f"latent_imagenet_512_train-{number:04d}.tar", samples)
    small = [f"model.{key}=1" for key in ("depth", "decoder_depth")] + [f"model.{key}=16" for key in ("width", "decoder_width")]
    small += [f"model.{key}=2" for key in ("num_heads", "decoder_num_heads")] + ["train.batchsize=2", "train.max_num_steps=3"]
    done = subprocess.run([sys.executable, ROOT / "train_latent.py", "--config", ROOT / "configs/train/maskdit-512-latent-imagenet.yaml",
                           f"data.root={shards}", f"log.results_dir={tmp_path / 'results'}", "log.sample_every=0", *small],
                          capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "results").glob("*/checkpoints/0000003.pt"))
