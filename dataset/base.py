"""What every set of samples offers, images and stored latents alike, and what their readers share."""

import bisect
import contextlib
import io
import math
import os
import re
import threading
import zipfile

import numpy as np

from utils.cli import UserError

MOMENTS_CHANNELS = 8    # of the usual autoencoder with 4 latent channels
CERTAIN_LOGVAR = -30.0
NPY_MAGIC = b"\x93NUMPY"


class SampleSet:
    """Samples and their labels by number. Sets can be pickled and survive a fork; several threads may read at once.

    name: the path, for messages. num_images: without mirrored copies. sample_shape, dtype: of one sample.
    num_classes: 0 for a set without labels, None where the format does not say. class_names: a list, maybe empty.
    mirrored: sample i + num_images is image i mirrored.
    A sub-class has `_samples(numbers)`, where a number is (image, mirrored), and `labels` or `_labels(images)`.
    """

    num_classes, class_names, mirrored = None, (), False

    def __len__(self):
        return self.num_images * (2 if self.mirrored else 1)

    def read(self, indices):
        """Samples (n, *sample_shape) and labels (n,) int64. Raises UserError (file, key, found, wanted) for damaged data."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.name} has samples 0..{len(self) - 1}, wanted {indices.min()}..{indices.max()}")
        samples = np.empty((len(indices), *self.sample_shape), self.dtype)
        numbers = [(index % self.num_images, index >= self.num_images) for index in indices.tolist()]
        for row, sample in zip(samples, self._samples(numbers)):
            row[:] = sample
        return samples, self.read_labels(indices)

    def read_labels(self, indices):
        """Labels (n,) int64 alone. Raises UserError for a label outside 0..num_classes-1."""
        labels = np.asarray(self._labels(np.asarray(indices, np.int64) % self.num_images), np.int64)
        if self.num_classes is not None:
            top = max(self.num_classes - 1, 0)
            wrong = np.flatnonzero((labels < 0) | (labels > top))
            if len(wrong):
                raise UserError(f"{self.name}: sample {indices[wrong[0]]} has label {labels[wrong[0]]}, wanted 0..{top}; "
                                f"is the number of classes right?")
        return labels

    def _labels(self, images):
        return self.labels[images]

    def expect_classes(self, num_classes):
        """Check the number of classes that the model has (None or 0: no check). Returns the set."""
        if num_classes:
            if self.num_classes not in (None, num_classes):
                raise UserError(f"{self.name} has {self.num_classes} classes, wanted {num_classes}; "
                                f"set model.num_classes={self.num_classes}")
            self.num_classes = num_classes
        return self


class LatentSet(SampleSet):
    """Stored latents of any format: samples are VAE moments (2C, H, W), mean then log-variance.

    A sub-class has `_array(image, mirrored)`: what is stored, and its 'file: key' for messages. Stored latents (C, H, W) become
    moments with the lowest log-variance in use, -30: drawing from them gives the latents back (standard deviation 3e-7).

    scale, shift: latents = scale * (z - shift); numbers, or lists of one number per channel.
    says_scale: whether the files say so themselves. If not, these are what the format's own project uses.
    vae: the autoencoder's name. vae_digest: its identity (`Autoencoder.digest`). Both may be empty.
    holds_mirrored: whether mirrored copies are stored; `mirrored` says whether they are counted.
    """

    scale, shift, says_scale = 0.18215, 0.0, False
    vae, vae_digest = "", ""
    holds_mirrored = holds_latents = False

    @property
    def description(self):
        """How latents are made of the samples, as checkpoints keep it."""
        return {"scale": self.scale, "shift": self.shift, "vae": self.vae_digest}

    def use_scale(self, scale=None, shift=None):
        """Take the user's scale and shift (None: no wish). Raises UserError if the files say otherwise."""
        for name, wish in (("scale", scale), ("shift", shift)):
            if wish is not None:
                wish, said = per_channel(name, wish, self.sample_shape[0] // 2), getattr(self, name)
                if self.says_scale and not np.allclose(wish, said, rtol=1e-5):
                    raise UserError(f"{name}={wish} is asked for (data.{name}, or --{name} of dataset.convert), but {self.name} "
                                    f"says {said}; leave it out")
                setattr(self, name, wish)

    def _look_at_first(self, always_moments=False):
        """Take over shape and type of the first stored array. 8 channels are moments; others only if always_moments."""
        if self.num_images < 1:
            raise UserError(f"{self.name} holds no samples")
        array, where = self._array(0, False)
        shape = array.shape
        if len(shape) != 3 or shape[1] != shape[2] or array.dtype not in (np.float16, np.float32):
            raise UserError(f"{where}: {array.dtype} of shape {shape}, wanted float16 or float32 (channels, size, size)")
        self.holds_latents = not always_moments and shape[0] != MOMENTS_CHANNELS
        self.sample_shape = (shape[0] * (2 if self.holds_latents else 1), *shape[1:])
        self.dtype = array.dtype

    def _samples(self, numbers):
        channels, *size = self.sample_shape
        wanted = (channels // 2 if self.holds_latents else channels, *size)
        for image, mirrored in numbers:
            array, where = self._array(image, mirrored)
            if array.shape != wanted or array.dtype != self.dtype:
                raise UserError(f"{where}: {array.dtype} of shape {array.shape}, the first one is {self.dtype} of shape {wanted}")
            yield np.concatenate([array, np.full_like(array, CERTAIN_LOGVAR)]) if self.holds_latents else array


def per_channel(name, value, channels):
    """A scale or shift as a float, or as a list of one float per channel. Raises UserError for anything else."""
    several, may_be_negative = isinstance(value, (list, tuple)), name.endswith("shift")
    numbers = list(value) if several else [value]
    sane = all(type(number) in (int, float) and math.isfinite(number) and (number > 0 or may_be_negative) for number in numbers)
    if not sane or len(numbers) != (channels if several else 1):
        raise UserError(f"{name}={value!r}, wanted a {'finite' if may_be_negative else 'positive'} number, or {channels} of them")
    return list(map(float, numbers)) if several else float(value)


def locate(ends, image):
    """(shard, row in it) of an image. ends: how many images there are up to the end of each shard."""
    shard = bisect.bisect_right(ends, image)
    return shard, image - (ends[shard - 1] if shard else 0)


class PerProcess:
    """Opens files, each once in a process: a forked child must not share the parent's handles, and a pickle carries none."""

    def __init__(self, opens):
        self.opens, self.process, self.handles, self.lock = opens, None, {}, threading.Lock()

    def __call__(self, file):
        with self.lock:
            if self.process != os.getpid():
                self.process, self.handles = os.getpid(), {}  # the parent's are closed here, not there
            if file not in self.handles:
                with reading(file):
                    self.handles[file] = self.opens(file)
            return self.handles[file]

    def __reduce__(self):
        return PerProcess, (self.opens,)


@contextlib.contextmanager
def reading(where, error_type=UserError):
    """Turn what a damaged file makes a library's reader raise, which may be anything, into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        reason = getattr(error, "strerror", None) or reason or type(error).__name__
        if "allow_pickle" in reason or "weights_only" in reason:  # the libraries' advice would run whatever the file says
            reason = "it does not hold plain numbers"
        reason = re.sub(r" <[^>]* at 0x\w+>", "", reason)  # Pillow's holds an object's address
        raise error_type(f"{where} cannot be read: {reason}; get or make it anew") from error


def read_npy(data, where):
    """The array in the bytes of a .npy file. Raises UserError if they are cut short or hold Python objects."""
    with reading(where):
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def read_label(data, where):
    """The class index in the bytes of a number in ascii or of a .npy file."""
    with reading(where):
        label = read_npy(data, where).item() if data.startswith(NPY_MAGIC) else int(data)
    if type(label) is not int or not 0 <= label < 2 ** 31:
        raise UserError(f"{where} is {label!r}, wanted one whole number from 0")
    return label


def check_not_cut(file, wanted):
    """Raise UserError if a file is gone or has fewer than `wanted` bytes.

    Touching a mapped page beyond the end of a file kills the process (SIGBUS), so readers ask this before each sample.
    """
    with reading(file):
        found = os.stat(file).st_size
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
    info = file.zip.NameToInfo.get(f"{key}.npy")
    if info is not None and info.compress_type == zipfile.ZIP_STORED:
        with reading(f"{path}: {key}"), file.zip.open(info) as entry:
            start = file.zip.fp.tell()  # opening has read the entry's own header: its content begins here
            if np.lib.format.read_magic(entry) == (1, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(entry)
                if not fortran_order and not dtype.hasobject:
                    if entry.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                        raise ValueError("shape and size do not fit")
                    return np.memmap(path, dtype, "r", start + entry.tell(), shape)
    return read_npz(path, file, key)
