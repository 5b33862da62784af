"""What sampling leaves in a folder: PNGs with labels.csv, or one .npz of images or latents, and settings.json.

A folder holds samples of one checkpoint with one set of settings. Other seeds with the same settings are added to it, in every
format; seeds that are there are not sampled again; other settings are refused.
"""

import csv
import heapq
import json
import math
import zipfile

import numpy as np

from sampling.load import checkpoint_digest
from sampling.sample import class_name
from utils.cli import UserError
from utils.config import to_dict
from utils.files import make_folder, write_whole
from utils.images import save_png

NPZ = {"npz": ("samples.npz", "arr_0"), "latents": ("latents.npz", "latents")}  # format -> file, name of its main array


def settings_of(config, ckpt_path, which, class_idx, decode):
    """What the samples of a Config depend on, for `claim_folder`. decode: see `image_decoder`; None: they are latents."""
    plain = to_dict(config)
    sample = {key: value for key, value in plain["sample"].items() if key not in ("batchsize", "compile")}
    settings = {"ckpt_path": str(ckpt_path), "checkpoint": {"sha256": checkpoint_digest(ckpt_path), "weights": which},
                "model": plain["model"], "sample": sample | {"class_idx": class_idx}}
    if decode is not None:
        settings["vae"] = {"digest": decode.digest, "amp": config.vae.amp}
    return json.loads(json.dumps(settings).replace("Infinity", '"inf"'))  # JSON has no infinity


def claim_folder(outdir, settings):
    """Make the folder for samples of these settings and note them in its settings.json. One process calls this.

    settings: see `settings_of`; the sections are compared with those of the samples that are there, ckpt_path is not.
    Returns the settings as they are noted. Raises UserError if the folder cannot be written, or holds samples of other settings
    or other files.
    """
    outdir = make_folder(outdir, "--outdir")
    note = outdir / "settings.json"
    if note.is_file():
        try:
            then = {name: values for name, values in json.loads(note.read_text()).items() if isinstance(values, dict)}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{note} is not readable; give another --outdir, or delete this folder") from error
        other = []
        for section in settings.keys() - {"ckpt_path"}:
            before = then.get(section, settings[section] if section == "vae" else {})  # latents do not depend on the autoencoder
            other += [f"{section}.{key} {before.get(key)} there, {value} now" for key, value in settings[section].items()
                      if before.get(key) != value]
        if other:
            raise UserError(f"{outdir} holds samples of other settings: {'; '.join(sorted(other))}. "
                            f"Give another --outdir, or delete this folder")
        settings = then | settings
    elif any(outdir.iterdir()):
        raise UserError(f"{outdir} holds other files; give another --outdir")
    with write_whole(note) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=1))
    return settings


class Output:
    """The samples in OUTDIR: images/000123.png for seed 123, or an .npz into which the files of a folder beside it are moved.

    The format "none" writes nothing.
    """

    def __init__(self, outdir, format):
        self.outdir, self.format = outdir, format
        filename, self.array_name = NPZ.get(format, (None, None))
        self.npz = outdir / filename if filename else None
        self.folder = outdir / (f"{filename}.parts" if filename else "images")
        self.suffix = ".npy" if filename else ".png"

    def seeds(self):
        """The seeds whose samples are there."""
        return self._in_folder() | set(self._in_npz())

    def write(self, batch):
        """Write the samples of a Batch that are finite, each whole or not at all; every process writes its own."""
        if self.format == "none":
            return
        values = batch.latents.cpu().numpy() if self.format == "latents" else batch.images
        self.folder.mkdir(exist_ok=True)
        for seed, value, finite in zip(batch.seeds, values, batch.finite):
            if finite:
                self._write_one(self._path(seed), value)

    def _write_one(self, path, value):
        unfinished = path.with_suffix(".tmp")
        try:
            with open(unfinished, "wb") as stream:
                np.save(stream, value) if self.npz else save_png(stream, value)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def finish(self, classes_of, class_names):
        """Pack the .npz, or write labels.csv; one process calls this at the end. classes_of(seeds): their classes, or None."""
        if self.npz:
            self._pack(classes_of)
        elif self.format == "png":
            self._write_labels(classes_of, class_names)

    def _path(self, seed):
        return self.folder / f"{seed:06d}{self.suffix}"

    def _in_folder(self):
        return {int(path.stem) for path in self.folder.glob(f"*{self.suffix}") if path.stem.isdigit()}

    def _in_npz(self):
        """The seeds in the .npz, in order."""
        if self.npz is None or not self.npz.is_file():
            return []
        try:
            with np.load(self.npz) as content:
                return content["seeds"].tolist()
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.npz} is damaged, or another program's; give another --outdir, or delete it") from error

    def _write_labels(self, classes_of, class_names):
        seeds, path = sorted(self._in_folder()), self.outdir / "labels.csv"
        classes = classes_of(seeds)
        if classes is None:
            return
        with write_whole(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(("file", "seed", "class", "name"))
            for seed, index in zip(seeds, classes):
                table.writerow((f"images/{self._path(seed).name}", seed, index, class_name(index, class_names)))

    def _pack(self, classes_of):
        """Move the files of the folder into the .npz: its main array, `seeds`, in order, and `labels` if there are classes."""
        new = sorted(self._in_folder() - set(self._in_npz()))
        if new:
            seeds = sorted([*new, *self._in_npz()])
            first, classes = np.load(self._path(new[0])), classes_of(seeds)
            rows = heapq.merge(self._rows_in_npz(), ((seed, np.load(self._path(seed)).tobytes()) for seed in new))
            with write_whole(self.npz) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
                with archive.open(f"{self.array_name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array_header_2_0(stream, {"descr": first.dtype.str, "fortran_order": False,
                                                                  "shape": (len(seeds), *first.shape)})
                    for _, row in rows:
                        stream.write(row)
                for name, array in (("seeds", seeds), ("labels", classes)):
                    if array is not None:
                        with archive.open(f"{name}.npy", "w") as stream:
                            np.save(stream, np.array(array))
        for seed in self._in_folder():
            self._path(seed).unlink()
        if self.folder.is_dir():
            self.folder.rmdir()

    def _rows_in_npz(self):
        """Yield (seed, sample as bytes) one after the other: all together may be more than memory holds."""
        seeds = self._in_npz()
        if not seeds:
            return
        with zipfile.ZipFile(self.npz) as archive, archive.open(f"{self.array_name}.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
            for seed in seeds:
                yield seed, stream.read(math.prod(shape[1:]) * dtype.itemsize)
