"""Images in class folders, one folder, a zip, an npz or idx files: one reader for extraction, training and fid.

Order: by name, classes in the order of their sorted folder names. A `dataset.json` beside the images, as EDM's dataset tool
writes it ({"labels": [[name, class], ...]}), goes before folder names.
"""

import contextlib
import hashlib
import io
import json
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dataset.base import SampleSet, map_npz, open_npz, read_npz
from dataset.idx import read_idx_set
from utils.cli import UserError

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")


class CorruptImage(UserError):
    """An image that cannot be decoded."""


def read_picture(file, name):
    """Decode one picture, a path or a binary stream, to (H, W, 3) uint8. name: what messages call it.

    The rotation that EXIF states is applied. Transparent parts are laid on white. Grey becomes three equal channels.
    Of 16 bits per channel the upper 8 are kept. Float values must lie in 0..1 and become 0..255.
    Raises CorruptImage.
    """
    with _decoder(file, name) as image:
        image.load()
        turn = TURNS.get(_orientation(image))
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith(("I", "F")):
            grey = _eight_bits(np.asarray(image), name)
            return np.stack([grey, grey, grey], axis=2)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))


def picture_size(file, name):
    """(width, height) of a picture as `read_picture` gives it, as a rule from its header alone. Raises CorruptImage."""
    with _decoder(file, name) as image:
        return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def _orientation(image):
    """1 to 8 by EXIF. An EXIF that cannot be read says nothing: the picture itself may be whole."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow has no one error for it
        return 1


@contextlib.contextmanager
def _decoder(file, name):
    """The picture opened with Pillow. What Pillow raises for damaged files becomes a CorruptImage."""
    try:
        with Image.open(file) as image:
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise CorruptImage(f"{name} cannot be read: cut short or no image") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _eight_bits(values, name):
    """Grey values (H, W), 16-bit integers or floats in 0..1, as uint8."""
    top = 1 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also refuses NaN
        raise CorruptImage(f"{name} cannot be read: {values.dtype} values from {values.min()} to {values.max()}, wanted 0 to {top}")
    return (values * 255 + 0.5).astype(np.uint8) if top == 1 else (values >> 8).astype(np.uint8)


def centre_crop(image, size):
    """The centre square of an RGB PIL image as (3, size, size) uint8.

    While the shorter side is at least twice `size`, both are halved with a box filter; then a bicubic resize brings the
    shorter side to `size`, and the middle is cut out.
    Source: Dhariwal and Nichol 2021 (ADM), whose reference statistics are of images cropped so.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size].transpose(2, 0, 1)


class ImageSet(SampleSet):
    """Images of one source; sub-classes fill in `picture` and `size`.

    resolution: samples are (3, resolution, resolution) uint8, centre-cropped. None: the images are there at their own size,
        by `picture` alone. names: of the images, where they have any. labels: (N,) int64, zeros without classes.
    """

    dtype = np.dtype(np.uint8)
    num_classes = 0

    def __init__(self, path, resolution, labels, xflip=False, names=(), class_names=()):
        if resolution is not None and resolution < 1:
            raise UserError(f"resolution={resolution} must be at least 1")
        self.path, self.name, self.resolution = Path(path), str(path), resolution
        self.labels, self.num_images, self.mirrored = labels, len(labels), xflip
        self.names, self.class_names = names, list(class_names)
        self.sample_shape = None if resolution is None else (3, resolution, resolution)
        if not self.num_images:
            raise UserError(f"{path}: no images; wanted files ending in {', '.join(SUFFIXES)}")

    def picture(self, index):
        """Image `index` at its own size as (H, W, 3) uint8, not mirrored. Raises CorruptImage."""
        raise NotImplementedError

    def size(self, index):
        """(width, height) of image `index`, without decoding it. Raises CorruptImage."""
        raise NotImplementedError

    def image(self, index):
        """Image `index` as (3, resolution, resolution) uint8, not mirrored. Raises CorruptImage."""
        return centre_crop(Image.fromarray(self.picture(index)), self.resolution)

    def fingerprint(self):
        """Hexadecimal SHA-256 of what the set lists: names where it has them, and labels."""
        return hashlib.sha256("\n".join(self.names).encode() + self.labels.tobytes()).hexdigest()

    def _read_samples(self, indices, out):
        for row, index in zip(out, indices.tolist()):
            mirrored, index = divmod(index, self.num_images)
            row[:] = self.image(index)[:, :, ::-1] if mirrored else self.image(index)

    def _read_labels(self, image_indices):
        return self.labels[image_indices]


class ImageFiles(ImageSet):
    """Encoded images (JPEG, PNG, ...) by their names below a folder or in a zip; `_open` gives the file.

    Without a resolution folders may lie any deep and say nothing about classes: such images are there to be measured.
    """

    def __init__(self, path, names, dataset_json, resolution, xflip=False):
        names = sorted(name for name in names if _is_image(PurePosixPath(name)))
        labels, num_classes, class_names = np.zeros(len(names), np.int64), 0, []
        if resolution is not None:
            labels, num_classes, class_names = _labels_of(path, names, dataset_json)
        super().__init__(path, resolution, labels, xflip, names, class_names)
        self.num_classes = num_classes

    def picture(self, index):
        return read_picture(self._open(self.names[index]), f"{self.path}: {self.names[index]}")

    def size(self, index):
        return picture_size(self._open(self.names[index]), f"{self.path}: {self.names[index]}")

    def _open(self, name):
        raise NotImplementedError


class FolderImages(ImageFiles):
    """Images in class folders, or all in one folder."""

    def __init__(self, path, resolution, xflip=False):
        json_file = Path(path) / "dataset.json"
        super().__init__(path, _walk(path), json_file.read_bytes() if json_file.is_file() else None, resolution, xflip)

    def _open(self, name):
        return self.path / name


class ZipImages(ImageFiles):
    """The same layouts inside a zip file."""

    def __init__(self, path, resolution, xflip=False):
        self.path, self._opened, self._lock = Path(path), (None, None), threading.Lock()
        try:
            names = self._archive().namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} is cut short or not a zip ({error}); fetch it again") from error
        dataset_json = self._open("dataset.json").read() if "dataset.json" in names else None
        super().__init__(path, names, dataset_json, resolution, xflip)

    def __getstate__(self):
        return {**self.__dict__, "_opened": (None, None), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _open(self, name):
        try:
            return io.BytesIO(self._archive().read(name))
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            # RuntimeError: encrypted. NotImplementedError: a compression that Python lacks.
            raise CorruptImage(f"{self.path}: {name} cannot be read: {error or 'damaged in the zip'}") from error

    def _archive(self):
        """This process's own handle: a forked child must not share the parent's file position."""
        with self._lock:
            process, archive = self._opened
            if process != os.getpid():
                archive = zipfile.ZipFile(self.path)
                self._opened = (os.getpid(), archive)
            return archive


class ArrayImages(ImageSet):
    """Images of one array (N, H, W) or (N, H, W, 1 or 3) uint8. Grey ones are repeated to three channels.

    pad: images smaller than the resolution, but not by half, get a black border instead of being enlarged.
    """

    def __init__(self, path, array, labels, resolution, xflip=False, pad=False, class_names=()):
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
            raise UserError(f"{path}: images are {array.dtype} of shape {array.shape}, "
                            f"wanted uint8 (N, H, W) or (N, H, W, 1 or 3); if the layout is NCHW, use images.transpose(0, 2, 3, 1), "
                            f"for values in [-1, 1] floor((x + 1) * 127.5)")
        if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(f"{path}: labels are {labels.dtype} of shape {labels.shape}, wanted integers {array.shape[:1]}")
        wanted = np.zeros(len(array), np.int64) if labels is None else labels.astype(np.int64)
        super().__init__(path, resolution, wanted, xflip, class_names=class_names)
        self.array, self.pad = array, pad
        self.num_classes = 0 if labels is None else max(int(labels.max()) + 1, len(class_names))

    def picture(self, index):
        image = np.asarray(self.array[index])
        return np.ascontiguousarray(np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3)))

    def size(self, index):
        return self.array.shape[2], self.array.shape[1]

    def image(self, index):
        height, width = self.array.shape[1:3]
        if not self.pad or not max(height, width) <= self.resolution < 2 * min(height, width):
            return super().image(index)
        top, left = (self.resolution - height) // 2, (self.resolution - width) // 2
        square = np.zeros((3, self.resolution, self.resolution), np.uint8)
        square[:, top:top + height, left:left + width] = self.picture(index).transpose(2, 0, 1)
        return square


def open_images(path, resolution=None, xflip=False, num_classes=None):
    """The `ImageSet` at `path`: a folder, a .zip, a .npz, an idx images file, or a folder with one such file.

    resolution: pixels of a side after the centre crop. None: images at their own size, of files without labels.
    xflip: sample i + N is image i mirrored. num_classes: what the model expects (None or 0: not checked).
    Raises UserError if there are no images or they do not fit together.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (images wanted)")
    if path.is_dir():
        idx_files = sorted(path.glob("*idx3-ubyte*"))
        if len(idx_files) > 1:
            raise UserError(f"{path} holds several idx sets ({', '.join(file.name for file in idx_files)}); name one of the files")
        opens, path = (_open_idx, idx_files[0]) if idx_files else (FolderImages, path)
    elif "idx3-ubyte" in path.name:
        opens = _open_idx
    elif path.suffix in (".zip", ".npz"):
        opens = {".zip": ZipImages, ".npz": _open_npz}[path.suffix]
    else:
        raise UserError(f"{path}: wanted a folder of images, a .zip, a .npz with arr_0, or an idx3-ubyte file")
    return opens(path, resolution, xflip).expect_classes(num_classes)


def _open_idx(path, resolution, xflip):
    images, labels, class_names = read_idx_set(path)
    return ArrayImages(path, images, labels, resolution, xflip, pad=True, class_names=class_names)


def _open_npz(path, resolution, xflip):
    """arr_0: images, mapped into memory where they are stored plainly. Labels, if any: `labels`, `label` or `arr_1`."""
    with open_npz(path) as file:
        images = map_npz(path, file, "arr_0")
        key = next((key for key in ("labels", "label", "arr_1") if key in file), None)
        return ArrayImages(path, images, None if key is None else read_npz(path, file, key), resolution, xflip)


def _is_image(name):
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)  # also what Finder adds to zips
    return name.suffix.lower() in SUFFIXES and not hidden


def _walk(root, below="", above=()):
    """Names of all files below `root`, with forward slashes; links are followed. above: the folders around, to see a loop."""
    folder = os.path.realpath(Path(root, below))
    if folder in above:
        raise UserError(f"{root}: {below} is a link to a folder that it lies in; remove it")
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}); remove or mend it") from error
    for name, is_folder in found:
        if is_folder:
            yield from _walk(root, f"{below}{name}/", (*above, folder))
        else:
            yield f"{below}{name}"


def _labels_of(path, names, dataset_json):
    """Labels (N,) int64, number of classes and class names, from `dataset_json` (bytes or None) or the folders in the names."""
    if dataset_json is not None:
        listed = _listed_labels(path, dataset_json)
        if listed is not None:
            missing = next((name for name in names if name not in listed), None)
            if missing is not None:
                raise UserError(f"{path}: dataset.json has no label for {missing}")
            labels = np.array([listed[name] for name in names], np.int64)
            return labels, int(labels.max(initial=-1)) + 1, []
    folders = [name.rpartition("/")[0] for name in names]
    deep = next((name for name, folder in zip(names, folders) if "/" in folder), None)
    if deep is not None:
        raise UserError(f"{path}: {deep} lies two folders deep, wanted CLASS/IMAGE; "
                        f"give the folder that holds the class folders")
    classes = sorted(set(folders))
    if "" in classes and len(classes) > 1:
        loose = names[folders.index("")]
        raise UserError(f"{path}: {loose} lies beside class folders ({classes[1]}, ...); "
                        f"wanted all images in class folders or none")
    if classes in ([], [""]):
        return np.zeros(len(names), np.int64), 0, []
    index = {name: label for label, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], np.int64), len(classes), classes


def _listed_labels(path, dataset_json):
    """{name: class index} of a dataset.json, or None if it lists no labels."""
    try:
        labels = json.loads(dataset_json)["labels"]
        return None if labels is None else {name: int(label) for name, label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: dataset.json is not {{'labels': [[name, class], ...]}} ({error!r})") from error
