"""What every set of samples offers, images and stored latents alike, and what their readers share."""

import contextlib
import io
import json
import math
import os
import threading
import zipfile

import numpy as np

from utils.cli import UserError

MOMENTS_CHANNELS = 8    # of the usual autoencoder with 4 latent channels
CERTAIN_LOGVAR = -30.0  # a standard deviation of 3e-7
NPY_MAGIC = b"\x93NUMPY"


class SampleSet:
    """Samples and their labels by number. Sub-classes have `_read_samples(indices, out)`, and `labels` or `_read_labels(images)`.

    name: the path, for messages. num_images: images without their mirrored copies.
    sample_shape, dtype: of one sample, as it is stored.
    num_classes: 0 for a set without labels, None where the format does not say. class_names: a list, maybe empty.
    mirrored: sample i + num_images is image i mirrored.

    Sets can be pickled and survive a fork. Several threads may read at once.
    """

    name = ""
    num_images = 0
    sample_shape = ()
    dtype = np.dtype(np.float32)
    num_classes = None
    class_names = ()
    mirrored = False

    def __len__(self):
        return self.num_images * (2 if self.mirrored else 1)

    def read(self, indices):
        """Samples (n, *sample_shape) and labels (n,) int64 of the samples `indices`.

        Raises IndexError for an index outside the set, UserError (file, key, found, wanted) for damaged data.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.name} has samples 0..{len(self) - 1}, wanted {indices.min()}..{indices.max()}")
        samples = np.empty((len(indices), *self.sample_shape), self.dtype)
        self._read_samples(indices, samples)
        return samples, self.read_labels(indices)

    def read_labels(self, indices):
        """Labels (n,) int64 alone. Raises UserError for a label outside 0..num_classes-1."""
        labels = self._read_labels(np.asarray(indices, np.int64) % self.num_images)
        if self.num_classes is not None and len(labels):
            top = max(self.num_classes - 1, 0)
            if not 0 <= labels.min() <= labels.max() <= top:
                wrong = int(np.flatnonzero((labels < 0) | (labels > top))[0])
                raise UserError(f"{self.name}: sample {int(indices[wrong])} has label {int(labels[wrong])}, "
                                f"wanted 0..{top}; is the number of classes right?")
        return labels

    def expect_classes(self, num_classes):
        """Check the number of classes that the model has (None or 0: no check). Returns the set."""
        if num_classes:
            if self.num_classes not in (None, num_classes):
                raise UserError(f"{self.name} has {self.num_classes} classes, wanted {num_classes}; "
                                f"set model.num_classes={self.num_classes}")
            self.num_classes = num_classes
        return self

    def _read_labels(self, images):
        return self.labels[images]


class LatentSet(SampleSet):
    """Stored latents of any format: samples are VAE moments (2C, H, W), mean then log-variance.

    Formats that keep one array for each image have `_array(image, mirrored)`, which gives it (C, H, W) and 'file: key' for messages,
    and call `_look_at_first`. An array that holds latents becomes moments with the
    lowest log-variance in use: drawing from them gives the latents back.

    scale, shift: latents = scale * (z - shift); numbers, or lists of one number per channel.
    says_scale: whether the files say so themselves. If not, these are what the format's own project uses.
    vae: the autoencoder's name. vae_digest: its identity (`Autoencoder.digest`). Both may be empty.
    holds_mirrored: whether mirrored copies are stored; `mirrored` says whether they are counted.
    """

    scale, shift, says_scale = 0.18215, 0.0, False
    vae, vae_digest = "", ""
    holds_mirrored = False
    always_moments = False  # else 8 channels are moments of a 4-channel VAE, and any other number is latents
    holds_latents = False

    @property
    def description(self):
        """How latents are made of the samples, as checkpoints keep it."""
        return {"scale": self.scale, "shift": self.shift, "vae": self.vae_digest}

    def use_scale(self, scale=None, shift=None):
        """Take the user's scale and shift (None: no wish). Raises UserError if the files say otherwise."""
        for name, wanted in (("scale", scale), ("shift", shift)):
            if wanted is None:
                continue
            wanted, said = per_channel(name, wanted, self.sample_shape[0] // 2), getattr(self, name)
            if self.says_scale and not np.allclose(wanted, said, rtol=1e-5):
                raise UserError(f"{name}={wanted} is asked for (data.{name}, or --{name} of dataset.convert), but {self.name} says "
                                f"{said}; leave it out")
            setattr(self, name, wanted)

    def _look_at_first(self):
        """Take over shape (C, H, W) and type of the first stored array."""
        array, where = self._array(0, False)
        shape = array.shape
        if len(shape) != 3 or shape[1] != shape[2] or array.dtype not in (np.float16, np.float32):
            raise UserError(f"{where}: {array.dtype} of shape {shape}, wanted float16 or float32 (channels, size, size)")
        self.holds_latents = not self.always_moments and shape[0] != MOMENTS_CHANNELS
        self.sample_shape = (shape[0] * (2 if self.holds_latents else 1), *shape[1:])
        self.dtype = array.dtype

    def _read_samples(self, indices, out):
        channels = self.sample_shape[0] // (2 if self.holds_latents else 1)
        out[:, channels:] = CERTAIN_LOGVAR
        for row, index in zip(out[:, :channels], indices.tolist()):
            mirrored, image = divmod(index, self.num_images)
            array, where = self._array(image, mirrored)
            if array.shape != row.shape or array.dtype != self.dtype:
                raise UserError(f"{where}: {array.dtype} of shape {array.shape}, wanted {self.dtype} of shape {row.shape} "
                                f"as the first sample")
            row[:] = array


def per_channel(name, value, channels):
    """A scale or shift as a float, or as a list of one float per channel. Raises UserError for anything else."""
    several, may_be_negative = isinstance(value, (list, tuple)), name.endswith("shift")
    numbers = list(value) if several else [value]
    sane = all(type(number) in (int, float) and math.isfinite(number) and (number > 0 or may_be_negative) for number in numbers)
    if not sane or len(numbers) != (channels if several else 1):
        raise UserError(f"{name}={value!r}, wanted a {'finite' if may_be_negative else 'positive'} number, or {channels} of them")
    return list(map(float, numbers)) if several else float(value)


class PerProcess:
    """Opens files, each once in a process: a forked child must not share the parent's handles, and a pickle carries none."""

    def __init__(self, opens):
        self.opens, self.process, self.handles, self.lock = opens, None, {}, threading.Lock()

    def __call__(self, file):
        with self.lock:
            if self.process != os.getpid():
                self.process, self.handles = os.getpid(), {}  # the parent's are closed here, not there
            if file not in self.handles:
                self.handles[file] = self.opens(file)
            return self.handles[file]

    def __reduce__(self):
        return PerProcess, (self.opens,)


@contextlib.contextmanager
def reading(where, error_type=UserError):
    """Turn what a damaged file leads to in the block into one line that names it.

    The block should be little more than a call of a library's reader: damaged bytes may make it raise anything.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        reason = getattr(error, "strerror", None) or reason or type(error).__name__
        if "allow_pickle" in reason or "weights_only" in reason:  # the libraries' advice would run whatever the file says
            reason = "it does not hold plain numbers"
        raise error_type(f"{where} cannot be read: {reason}; get or make it anew") from error


def read_npy(data, where):
    """The array in the bytes of a .npy file. Raises UserError if they are cut short or hold Python objects."""
    with reading(where):
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def read_label(data, where):
    """The class index in the bytes of a number in ascii, a .npy file, or JSON with a key `label` or `cls`."""
    text, label = bytes(data[:40]).strip(), None
    if data[:6] == NPY_MAGIC:
        array = read_npy(data, where)
        label = array.item() if array.size == 1 else array.tolist()
    elif text.startswith(b"{"):
        with reading(where):
            content = json.loads(data)
        label = content.get("label", content.get("cls"))
    elif text.removeprefix(b"-").isdigit() and len(text) <= 18:
        label = int(text)
    if type(label) is not int:
        raise UserError(f"{where} is {text if label is None else label!r}, wanted one whole number")
    return label


def check_not_cut(file, wanted):
    """Raise UserError if a file is gone or has fewer than `wanted` bytes.

    Touching a mapped page beyond the end of a file kills the process (SIGBUS), so readers ask this before each batch.
    """
    try:
        found = os.stat(file).st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; restore it or make the set again") from error
    if found < wanted:
        raise UserError(f"{file} is cut short: {found} bytes, wanted {wanted}; restore it or make the set again")


def open_npz(path):
    """np.load of an .npz file that never unpickles. Raises UserError if the file is missing or damaged."""
    with reading(path):
        file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: a single array, wanted an .npz; save it with np.savez(path, arr_0=images)")
    return file


def read_npz(path, file, key):
    """One array of an open .npz. Raises UserError if it is missing, damaged or holds Python objects."""
    if key not in file:
        raise UserError(f"{path}: no array {key}; found {', '.join(file.files) or 'none'}")
    with reading(f"{path}: {key}"):
        return file[key]


def map_npz(path, file, key):
    """An array of an open .npz: as a memory map if it is stored without compression (np.savez), else read as a whole."""
    if key in file:
        with reading(f"{path}: {key}"):
            info = file.zip.getinfo(f"{key}.npy")
            with file.zip.open(info) as entry:
                start = file.zip.fp.tell()  # opening has read the entry's own header: its content begins here
                version = np.lib.format.read_magic(entry)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                (shape, fortran_order, dtype), header_size = read_header(entry), entry.tell()
            if info.compress_type == zipfile.ZIP_STORED and not fortran_order and not dtype.hasobject:
                if header_size + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise ValueError("shape and size do not fit")
                return np.memmap(path, dtype, "r", start + header_size, shape)
    return read_npz(path, file, key)
