"""Raw images in class folders, one folder, a zip, an idx set or an npz, as uint8 squares.

Order: by name, classes in the order of their sorted folder names. A `dataset.json` beside the images, as EDM's dataset tool
writes it ({"labels": [[name, class], ...]}), goes before folder names.
"""

import hashlib
import io
import json
import os
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dataset.idx import FASHION_MNIST_CLASSES, read_idx
from utils.cli import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")


class CorruptImage(UserError):
    """An image that cannot be decoded; `image` is its name within the set at `path`."""

    def __init__(self, path, image, reason):
        super().__init__(f"{path}: {image} cannot be read: {reason}")
        self.path, self.image, self.reason = path, image, reason

    def __reduce__(self):
        return CorruptImage, (self.path, self.image, self.reason)


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


class ImageSet:
    """Images of one source as (3, resolution, resolution) uint8; sub-classes fill in `image` and the attributes.

    names: of the images, where they have any. labels: (N,) int64, zeros without classes; num_classes: 0 without classes;
    class_names: list, maybe empty.
    mirrored: sample i + num_images is image i mirrored. scale and shift are None: these are not latents.
    Objects can be pickled and survive a fork; `read` may be called from several threads.
    """

    scale = shift = None
    num_classes, class_names, names = 0, (), ()

    def __init__(self, path, resolution, labels, xflip=False):
        if resolution < 1:
            raise UserError(f"resolution={resolution} must be at least 1")
        self.path, self.name, self.resolution = Path(path), str(path), resolution
        self.labels, self.num_images, self.mirrored = labels, len(labels), xflip
        self.sample_shape = (3, resolution, resolution)
        if not self.num_images:
            raise UserError(f"{path}: no images; wanted files ending in {', '.join(SUFFIXES)}")

    def __len__(self):
        return self.num_images * (2 if self.mirrored else 1)

    def read(self, indices):
        """Images (n, 3, resolution, resolution) uint8 and labels (n,) int64. Raises CorruptImage naming the file."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.name} has samples 0..{len(self) - 1}, wanted {indices.min()}..{indices.max()}")
        images = np.empty((len(indices), *self.sample_shape), np.uint8)
        for row, index in zip(images, indices.tolist()):
            mirrored, index = divmod(index, self.num_images)
            row[:] = self.image(index)[:, :, ::-1] if mirrored else self.image(index)
        return images, self.labels[indices % self.num_images]

    def fingerprint(self):
        """Hexadecimal SHA-256 of what the set lists: names where it has them, and labels."""
        return hashlib.sha256("\n".join(self.names).encode() + self.labels.tobytes()).hexdigest()

    def image(self, index):
        """Image `index` as (3, resolution, resolution) uint8, not mirrored. Raises CorruptImage."""
        raise NotImplementedError


class ImageFiles(ImageSet):
    """Encoded images (JPEG, PNG, ...) by their names below a folder; `_open` gives the bytes."""

    def __init__(self, path, names, dataset_json, resolution, xflip=False):
        self.names = sorted(name for name in names if _is_image(PurePosixPath(name)))
        labels, self.num_classes, self.class_names = _labels_of(path, self.names, dataset_json)
        super().__init__(path, resolution, labels, xflip)

    def image(self, index):
        name = self.names[index]
        try:
            with Image.open(self._open(name)) as image:
                return centre_crop(image.convert("RGB"), self.resolution)
        except (OSError, ValueError, SyntaxError, EOFError, zipfile.BadZipFile, zlib.error,
                Image.DecompressionBombError) as error:  # what Pillow's decoders raise for damaged files
            raise CorruptImage(self.path, name, str(error) or type(error).__name__) from error

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
        self._opened = (None, None)
        self._lock = threading.Lock()
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                dataset_json = archive.read("dataset.json") if "dataset.json" in names else None
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is cut short or not a zip ({error}); fetch it again") from error
        super().__init__(path, names, dataset_json, resolution, xflip)

    def __getstate__(self):
        return {**self.__dict__, "_opened": (None, None), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _open(self, name):
        return io.BytesIO(self._archive().read(name))

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
                            f"wanted uint8 (N, H, W) or (N, H, W, 1 or 3)")
        if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(f"{path}: labels are {labels.dtype} of shape {labels.shape}, wanted integers {array.shape[:1]}")
        wanted = np.zeros(len(array), np.int64) if labels is None else labels.astype(np.int64)
        super().__init__(path, resolution, wanted, xflip)
        self.array, self.pad = array, pad
        self.num_classes = 0 if labels is None else max(int(labels.max()) + 1, len(class_names))
        self.class_names = list(class_names)

    def image(self, index):
        image = self.array[index]
        image = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))
        height, width = image.shape[:2]
        if self.pad and max(height, width) <= self.resolution < 2 * min(height, width):
            return _padded(image, self.resolution)
        return centre_crop(Image.fromarray(np.ascontiguousarray(image)), self.resolution)


def _padded(image, size):
    """(H, W, 3) -> (3, size, size) with an even black border."""
    top, left = (size - image.shape[0]) // 2, (size - image.shape[1]) // 2
    square = np.zeros((3, size, size), np.uint8)
    square[:, top:top + image.shape[0], left:left + image.shape[1]] = image.transpose(2, 0, 1)
    return square


def open_image_set(path, resolution, xflip=False):
    """The `ImageSet` at `path`: a folder, a .zip, a .npz, an idx images file, or a folder with one such file.

    Raises FileNotFoundError, or ValueError if there are no images or they do not fit together.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (images wanted)")
    if path.is_dir():
        idx_file = _idx_in(path)
        return _open_idx(idx_file, resolution, xflip) if idx_file else FolderImages(path, resolution, xflip)
    if path.suffix == ".zip":
        return ZipImages(path, resolution, xflip)
    if path.suffix == ".npz":
        return _open_npz(path, resolution, xflip)
    if "idx3-ubyte" in path.name:
        return _open_idx(path, resolution, xflip)
    raise UserError(f"{path}: wanted a folder of images, a .zip, a .npz with arr_0, or an idx3-ubyte file")


def _idx_in(folder):
    files = sorted(folder.glob("*idx3-ubyte*"))
    if len(files) > 1:
        raise UserError(f"{folder} holds several idx sets ({', '.join(file.name for file in files)}); name one of the files")
    return files[0] if files else None


def _open_idx(path, resolution, xflip):
    """An idx images file; its labels lie beside it, named `labels-idx1` in place of `images-idx3`, gzip or plain."""
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels_path = next((path.with_name(name) for name in (f"{stem}.gz", stem) if path.with_name(name).is_file()), None)
    if labels_path is None:
        raise UserError(f"neither {stem}.gz nor {stem} is in {path.parent}; {path.name} needs its labels")
    class_names = FASHION_MNIST_CLASSES if "fashion" in path.resolve().parent.name.lower() else ()
    return ArrayImages(path, read_idx(path), read_idx(labels_path), resolution, xflip, pad=True, class_names=class_names)


def _open_npz(path, resolution, xflip):
    """arr_0: images; labels, if any, under `labels`, `label` or `arr_1`."""
    try:
        with np.load(path, allow_pickle=False) as members:
            arrays = {key: members[key] for key in ("arr_0", "labels", "label", "arr_1") if key in members.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut short or not an npz of numbers ({error})") from error
    if "arr_0" not in arrays:
        raise UserError(f"{path}: no images under arr_0")
    images = arrays.pop("arr_0")
    return ArrayImages(path, images, next(iter(arrays.values()), None), resolution, xflip)


def _is_image(name):
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)  # also what Finder adds to zips
    return name.suffix.lower() in SUFFIXES and not hidden


def _walk(root, below=""):
    """Names of all files below `root`, with forward slashes."""
    with os.scandir(Path(root, below)) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(root, f"{below}{entry.name}/")
            else:
                yield f"{below}{entry.name}"


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
