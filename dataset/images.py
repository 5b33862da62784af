"""Images in class folders, one folder, a zip, an npz or idx files: one reader for extraction, training and fid.

Order: by name, classes in the order of their sorted folder names. A `dataset.json` beside the images, as EDM's dataset tool
writes it ({"labels": [[name, class], ...]}), goes before folder names.
"""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dataset.base import PerProcess, SampleSet, map_npz, open_npz, read_npz, reading
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
            return np.stack([_eight_bits(np.asarray(image))] * 3, axis=2)
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
    """The picture opened with Pillow."""
    with reading(name, CorruptImage):
        try:
            image = Image.open(file)
        except UnidentifiedImageError:  # its text holds an object's address
            raise ValueError("cut short or no image") from None
        with image:
            yield image


def _eight_bits(values):
    """Grey values (H, W), 16-bit integers or floats in 0..1, as uint8."""
    top = 1 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also refuses NaN
        raise ValueError(f"{values.dtype} values from {values.min()} to {values.max()}, wanted 0 to {top}")
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
    """Images of one source. Sub-classes have picture(index): image `index` at its own size as (H, W, 3) uint8, not mirrored; and
    size(index): its (width, height), without decoding it. Both raise CorruptImage.

    resolution: samples are (3, resolution, resolution) uint8, centre-cropped. None: the images are there at their own size,
        by `picture` alone. names: of the images, where they have any. labels: (N,) int64, zeros without classes.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path, resolution, xflip, labels, num_classes=0, class_names=(), names=()):
        if resolution is not None and resolution < 1:
            raise UserError(f"resolution={resolution} must be at least 1")
        if not len(labels):
            raise UserError(f"{path}: no images; wanted files ending in {', '.join(SUFFIXES)}")
        self.path, self.name, self.resolution, self.mirrored = Path(path), str(path), resolution, xflip
        self.labels, self.num_images, self.num_classes = labels, len(labels), num_classes
        self.names, self.class_names = names, list(class_names)
        self.sample_shape = None if resolution is None else (3, resolution, resolution)

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


class FolderImages(ImageSet):
    """Encoded images (JPEG, PNG, ...) in class folders, or all in one folder.

    Without a resolution folders may lie any deep and say nothing about classes: such images are there to be measured.
    """

    def __init__(self, path, resolution, xflip=False):
        self.path = Path(path)
        found = self._list()
        names = sorted(filter(_is_image, found))
        labels = (np.zeros(len(names), np.int64), 0, [])
        if resolution is not None:
            listed = _listed_labels(path, self._content("dataset.json"), names) if "dataset.json" in found else None
            labels = listed or _labels_by_folder(path, names)
        super().__init__(path, resolution, xflip, *labels, names)

    def picture(self, index):
        return read_picture(*self._file(index))

    def size(self, index):
        return picture_size(*self._file(index))

    def _file(self, index):
        """A binary stream of an image, and what messages call it."""
        return io.BytesIO(self._content(self.names[index])), f"{self.path}: {self.names[index]}"

    def _list(self):
        """Names of all files below the folder, with forward slashes; links are followed."""
        def refuse(error):
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); remove or mend it")

        names = []
        for folder, folders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            below = Path(folder).relative_to(self.path)
            for name in folders:
                if os.path.islink(f"{folder}/{name}") and Path(folder).resolve().is_relative_to(Path(folder, name).resolve()):
                    raise UserError(f"{self.path}: {below / name} is a link to a folder that it lies in; remove it")
            names += [(below / name).as_posix() for name in files]
        return names

    def _content(self, name):
        """The bytes of a file of the set."""
        with reading(f"{self.path}: {name}", CorruptImage):
            return (self.path / name).read_bytes()


class ZipImages(FolderImages):
    """The same layouts inside a zip file."""

    def __init__(self, path, resolution, xflip=False):
        self.archive = PerProcess(zipfile.ZipFile)
        super().__init__(path, resolution, xflip)

    def _list(self):
        with reading(self.path):
            return self.archive(self.path).namelist()

    def _content(self, name):
        with reading(f"{self.path}: {name}", CorruptImage):
            return self.archive(self.path).read(name)


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
        num_classes = 0 if labels is None else max(int(labels.max(initial=0)) + 1, len(class_names))
        labels = np.zeros(len(array), np.int64) if labels is None else labels.astype(np.int64)
        super().__init__(path, resolution, xflip, labels, num_classes, class_names)
        self.array, self.pad = array, pad

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
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))  # also what Finder adds to zips
    return not hidden and PurePosixPath(name).suffix.lower() in SUFFIXES


def _labels_by_folder(path, names):
    """Labels (N,) int64, number of classes and class names, as the folders in the names say."""
    folders = [name.rpartition("/")[0] for name in names]
    classes, index = np.unique(folders, return_inverse=True) if names else ([""], [])
    classes = [str(folder) for folder in classes]
    deep = next((name for name, folder in zip(names, folders) if "/" in folder), None)
    if deep is not None:
        raise UserError(f"{path}: {deep} lies two folders deep, wanted CLASS/IMAGE; give the folder that holds the class folders")
    if classes[0] == "" and len(classes) > 1:
        raise UserError(f"{path}: {names[folders.index('')]} lies beside class folders ({classes[1]}, ...); "
                        f"wanted all images in class folders or none")
    return np.array(index, np.int64), *((0, []) if classes == [""] else (len(classes), classes))


def _listed_labels(path, dataset_json, names):
    """The same as the bytes of a dataset.json say, or None if it lists no labels."""
    with reading(f"{path}: dataset.json (wanted {{'labels': [[name, class], ...]}})"):
        listed = json.loads(dataset_json)["labels"]
        if listed is None:
            return None
        listed = {name: int(label) for name, label in listed}
    missing = next((name for name in names if name not in listed), None)
    if missing is not None:
        raise UserError(f"{path}: dataset.json has no label for {missing}")
    labels = np.array([listed[name] for name in names], np.int64)
    return labels, int(labels.max(initial=-1)) + 1, []
