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
from PIL import ExifTags, Image

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
    with reading(name, CorruptImage), Image.open(file) as image:
        image.load()
        with contextlib.suppress(Exception):  # there is no one error for a broken EXIF; the picture itself may be whole
            image = image.transpose(TURNS[image.getexif()[ExifTags.Base.Orientation]])
        if image.mode.startswith(("I", "F")):
            return np.stack([_eight_bits(np.asarray(image))] * 3, axis=2)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))


def _eight_bits(values):
    """Grey values (H, W), 16-bit integers or floats in 0..1, as uint8."""
    top = 1 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also refuses NaN
        raise ValueError(f"{values.dtype} values from {values.min()} to {values.max()}, wanted 0 to {top}")
    return (values * 255 + 0.5).astype(np.uint8) if top == 1 else (values >> 8).astype(np.uint8)


def centre_crop(image, size):
    """The centre square of an RGB PIL image as (3, size, size) uint8.

    Sides are halved with a box filter while both are at least twice `size`; a bicubic resize brings the shorter to `size`.
    Source: Dhariwal and Nichol 2021 (ADM), whose reference statistics are of images cropped so.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size].transpose(2, 0, 1)


class ImageSet(SampleSet):
    """Images of one source. A sub-class has picture(index): one at its own size, (H, W, 3) uint8; it may raise CorruptImage.

    resolution: samples are (3, resolution, resolution) uint8, centre-cropped. None: there are no samples, only pictures.
    names: of the images, where they have any. labels: one per image; None without classes.
    """

    dtype, names = np.dtype(np.uint8), ()

    def __init__(self, path, num_images, resolution, xflip, labels, class_names=()):
        if not num_images:
            raise UserError(f"{path}: no images; wanted files ending in {', '.join(SUFFIXES)}")
        self.path, self.name, self.num_images, self.mirrored = Path(path), str(path), num_images, xflip
        self.resolution, self.sample_shape = resolution, (3, resolution, resolution)
        self.labels = np.zeros(num_images, np.int64) if labels is None else np.asarray(labels, np.int64)
        self.num_classes = 0 if labels is None else max(int(self.labels.max()) + 1, len(class_names))
        self.class_names = list(class_names)

    def image(self, index):
        """Image `index` as (3, resolution, resolution) uint8, not mirrored. Raises CorruptImage."""
        return centre_crop(Image.fromarray(self.picture(index)), self.resolution)

    def fingerprint(self):
        """Hexadecimal SHA-256 of what the set lists: names where it has them, and labels."""
        return hashlib.sha256("\n".join(self.names).encode() + self.labels.tobytes()).hexdigest()

    def _samples(self, numbers):
        return (self.image(image)[:, :, ::-1 if mirrored else 1] for image, mirrored in numbers)


class FileImages(ImageSet):
    """Encoded images (JPEG, PNG, ...) in class folders, or all in one folder; the same inside a zip file.

    Without a resolution folders may lie any deep and say nothing about classes: such images are there to be measured.
    """

    def __init__(self, path, resolution, xflip=False):
        self.path, self.archive = path, None if path.is_dir() else PerProcess(zipfile.ZipFile)
        found = self._list()
        self.names = sorted(filter(_is_image, found))
        labels, class_names = self._listed_labels() if "dataset.json" in found and resolution else None, ()
        if resolution and not labels:
            labels, class_names = self._labels_by_folder()
        super().__init__(path, len(self.names), resolution, xflip, labels, class_names)

    def picture(self, index):
        name = self.names[index]
        return read_picture(io.BytesIO(self._content(name)), f"{self.path}: {name}")

    def _content(self, name):
        """The bytes of a file of the set."""
        with reading(f"{self.path}: {name}", CorruptImage):
            return self.archive(self.path).read(name) if self.archive else (self.path / name).read_bytes()

    def _list(self):
        """Names of all files below the folder, with forward slashes; links are followed."""
        if self.archive:
            return self.archive(self.path).namelist()

        def refuse(error):
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); remove or mend it")

        names = []
        for folder, folders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            below, real = Path(folder).relative_to(self.path), Path(folder).resolve()
            for name in folders:
                if real.is_relative_to((real / name).resolve()):
                    raise UserError(f"{self.path}: {below / name} is a link to a folder that it lies in; remove it")
            names += [(below / name).as_posix() for name in files]
        return names

    def _labels_by_folder(self):
        """Labels and class names as the folders in the names say, or None."""
        by_depth = {name.count("/"): name for name in self.names}
        if by_depth.keys() <= {0}:
            return None, ()
        if by_depth.keys() != {1}:
            raise UserError(f"{self.path}: found {' and '.join(by_depth.values())}, wanted all images as CLASS/IMAGE "
                            f"or none in a folder; give the folder that holds the class folders")
        folders = [name.split("/")[0] for name in self.names]
        classes = sorted(set(folders))
        number = {name: i for i, name in enumerate(classes)}
        return [number[folder] for folder in folders], classes

    def _listed_labels(self):
        """Labels as dataset.json says, or None if it lists none."""
        content = self._content("dataset.json")
        with reading(f"{self.path}: dataset.json (wanted {{'labels': [[name, class], ...]}} with every image)"):
            listed = dict(json.loads(content)["labels"] or ())
            return [int(listed[name]) for name in self.names] if listed else None


class ArrayImages(ImageSet):
    """Images of one array (N, H, W) or (N, H, W, 1 or 3) uint8. Grey ones are repeated to three channels."""

    def __init__(self, path, array, labels, resolution, xflip=False, class_names=()):
        shape = (*array.shape, 1)[:4]
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or shape[3] not in (1, 3):
            raise UserError(f"{path}: images are {array.dtype} of shape {array.shape}, wanted uint8 (N, H, W) or (N, H, W, 1 or 3); "
                            f"if the layout is NCHW, use images.transpose(0, 2, 3, 1), for values in [-1, 1] floor((x + 1) * 127.5)")
        if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(f"{path}: labels are {labels.dtype} of shape {labels.shape}, wanted integers {array.shape[:1]}")
        super().__init__(path, len(array), resolution, xflip, labels, class_names)
        self.array = array.reshape(shape)

    def picture(self, index):
        return np.array(np.broadcast_to(self.array[index], (*self.array.shape[1:3], 3)))


def open_images(path, resolution=None, xflip=False, num_classes=None):
    """The `ImageSet` at `path`: a folder, a .zip, a .npz, an idx images file, or a folder with one such file.

    resolution: pixels of a side after the centre crop. None: images at their own size, of files without labels.
    xflip: sample i + N is image i mirrored. num_classes: what the model expects (None or 0: not checked).
    Raises UserError if there are no images or they do not fit together.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (images wanted)")
    idx_files = sorted(path.glob("*idx3-ubyte*")) if path.is_dir() else [path] if "idx3-ubyte" in path.name else []
    if len(idx_files) > 1:
        raise UserError(f"{path} holds several idx sets ({', '.join(file.name for file in idx_files)}); name one of the files")
    if idx_files:
        array, labels, class_names = read_idx_set(idx_files[0], resolution)
        images = ArrayImages(idx_files[0], array, labels, resolution, xflip, class_names)
    elif path.is_dir() or path.suffix == ".zip":
        images = FileImages(path, resolution, xflip)
    elif path.suffix == ".npz":
        with open_npz(path) as file:  # arr_0: images, mapped into memory where they are stored plainly
            array = map_npz(path, file, "arr_0")
            labels = next((read_npz(path, file, key) for key in ("labels", "label", "arr_1") if key in file), None)
        images = ArrayImages(path, array, labels, resolution, xflip)
    else:
        raise UserError(f"{path}: wanted a folder of images, a .zip, a .npz with arr_0, or an idx3-ubyte file")
    return images.expect_classes(num_classes)


def _is_image(name):
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))  # also what Finder adds to zips
    return not hidden and PurePosixPath(name).suffix.lower() in SUFFIXES
