"""What every set of samples offers, images and stored latents alike, and what their readers share."""

import io
import math
import os
import struct
import zipfile
import zlib

import numpy as np

from utils.cli import UserError

MOMENTS_CHANNELS = 8    # of the usual autoencoder with 4 latent channels
CERTAIN_LOGVAR = -30.0  # a standard deviation of 3e-7
NPZ_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError)  # from a file cut or changed


class SampleSet:
    """Samples and their labels by number. Sub-classes fill in `_read_samples` and `_read_labels`.

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

    def _read_samples(self, indices, out):
        raise NotImplementedError

    def _read_labels(self, image_indices):
        raise NotImplementedError


class LatentSet(SampleSet):
    """Stored latents of any format: samples are VAE moments (2C, H, W), mean then log-variance.

    scale, shift: latents = scale * (z - shift); numbers, or lists of one number per channel.
    says_scale: whether the files say so themselves. If not, these are what the format's own project uses.
    vae: the autoencoder's name. vae_digest: its identity (`Autoencoder.digest`). Both may be empty.
    holds_mirrored: whether mirrored copies are stored; `mirrored` says whether they are counted.
    """

    scale, shift, says_scale = 0.18215, 0.0, False
    vae, vae_digest = "", ""
    holds_mirrored = False

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


def per_channel(name, value, channels):
    """A scale or shift as a float, or as a list of one float per channel. Raises UserError for anything else."""
    several, may_be_negative = isinstance(value, (list, tuple)), name.endswith("shift")
    numbers = list(value) if several else [value]
    sane = all(type(number) in (int, float) and math.isfinite(number) and (number > 0 or may_be_negative) for number in numbers)
    if not sane or len(numbers) != (channels if several else 1):
        raise UserError(f"{name}={value!r}, wanted a {'finite' if may_be_negative else 'positive'} number, or {channels} of them")
    return list(map(float, numbers)) if several else float(value)


class FormatSet(LatentSet):
    """A `LatentSet` whose files hold moments or latents, one array per image; sub-classes fill in `_array`.

    Latents (C, H, W) become moments whose log-variance is the lowest that is used: drawing from them gives the latents back.
    """

    always_moments = False  # else 8 channels are moments of a 4-channel VAE, and any other number is latents
    holds_latents = False

    def _set_shape(self, shape, where, dtype):
        """Take over the shape (C, H, W) and type of one stored array."""
        if len(shape) != 3 or shape[1] != shape[2] or np.dtype(dtype) not in (np.float16, np.float32):
            raise UserError(f"{where}: {np.dtype(dtype)} of shape {tuple(shape)}, wanted float16 or float32 (channels, size, size)")
        self.holds_latents = not self.always_moments and shape[0] != MOMENTS_CHANNELS
        self.sample_shape = (shape[0] * (2 if self.holds_latents else 1), *shape[1:])
        self.dtype = np.dtype(dtype)

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

    def _array(self, image, mirrored):
        """The stored array (C, H, W) of an image (or its mirrored copy), and 'file: key' for messages."""
        raise NotImplementedError


def whole_number(data, where):
    """The whole number in the bytes of an ascii text."""
    text = bytes(data[:40]).strip()
    if not text.removeprefix(b"-").isdigit() or len(text) > 18:
        raise UserError(f"{where} is {text!r}, wanted a whole number in ascii")
    return int(text)


def one_integer(array, where):
    """The number in an integer array of one element."""
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{where}: {array.dtype} of shape {array.shape}, wanted one integer")
    return int(array.reshape(()))


def read_npy(data, where):
    """The array in the bytes of a .npy file. Raises UserError if they are cut short or hold Python objects."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError):
        raise UserError(f"{where}: {len(data)} bytes are not a whole .npy array of numbers") from None


def check_not_cut(file, wanted, sample):
    """Raise UserError if a mapped file is gone or has fewer than `wanted` bytes by now.

    Touching a mapped page beyond the end of a file kills the process (SIGBUS), so readers ask this first.
    """
    try:
        found = os.stat(file).st_size
    except OSError as error:
        raise UserError(f"{file}: sample {sample} cannot be read ({error.strerror}); is the disk still there?") from error
    if found < wanted:
        raise UserError(f"{file}: sample {sample} cannot be read, the file was cut to {found} bytes since it was opened, "
                        f"it should have {wanted}; restore it or make the set again")


def open_npz(path):
    """np.load of an .npz file that never unpickles. Raises UserError if the file is missing or damaged."""
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except NPZ_DAMAGE:  # numpy's own texts advise allow_pickle=True, which would run whatever the file says
        raise UserError(f"{path}: not a readable .npz; is it cut short or a file of another kind?") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: a single array, wanted an .npz; save it with np.savez(path, arr_0=images)")
    return file


def read_npz(path, file, key):
    """One array of an open .npz. Raises UserError if it is missing, damaged or holds Python objects."""
    if key not in file:
        raise UserError(f"{path}: no array {key}; found {', '.join(file.files) or 'none'}")
    try:
        return file[key]
    except NPZ_DAMAGE:
        raise UserError(f"{path}: {key} is damaged or not a plain array of numbers (Python objects are not read); "
                        f"get or make the file anew") from None


def map_npz(path, file, key):
    """An array of an open .npz: as a memory map if it is stored without compression (np.savez), else read as a whole."""
    place = _plain_place(path, file, key) if key in file else None
    return read_npz(path, file, key) if place is None else np.memmap(path, mode="r", **place)


def _plain_place(path, file, key):
    """Where the numbers of an array lie in the file: arguments for np.memmap. None if they are compressed or in Fortran's order."""
    try:
        info = file.zip.getinfo(f"{key}.npy")
        with file.zip.open(info) as entry:
            version = np.lib.format.read_magic(entry)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            (shape, fortran_order, dtype), start = read_header(entry), entry.tell()
        if info.compress_type != zipfile.ZIP_STORED or fortran_order or dtype.hasobject:
            return None
        if start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError("shape and size do not fit")
        with open(path, "rb") as stream:
            stream.seek(info.header_offset + 26)  # of the entry's own header: the lengths of its name and of its extra field
            lengths = struct.unpack("<HH", stream.read(4))
    except (*NPZ_DAMAGE, KeyError, struct.error):
        raise UserError(f"{path}: {key} is damaged; get or make the file anew") from None
    return {"dtype": dtype, "shape": shape, "offset": info.header_offset + 30 + sum(lengths) + start}
