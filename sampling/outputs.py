"""What sampling leaves in a folder: PNGs with labels.csv, or one .npz of images or latents, and settings.json.

A folder holds samples of one checkpoint with one set of settings. Other seeds with the same settings are added to it, in every
format; seeds that are there are not sampled again; other settings are refused.
"""

import csv
import json
import shutil
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
    """What the samples of a Config depend on, {"sample.num_steps": 40, ...}. decode: see `image_decoder`; None: they are latents."""
    settings = {"ckpt_path": str(ckpt_path), "checkpoint.sha256": checkpoint_digest(ckpt_path), "which": which, "class_idx": class_idx}
    plain = to_dict(config)
    for section in ("model", "sample"):
        settings |= {f"{section}.{key}": value for key, value in plain[section].items() if key not in ("batchsize", "compile")}
    if decode is not None:
        settings |= {"vae.digest": decode.digest, "vae.amp": config.vae.amp}
    return json.loads(json.dumps(settings).replace("Infinity", '"inf"'))  # JSON has no infinity


def claim_folder(outdir, settings):
    """Make the folder for samples of these settings and note them in its settings.json. One process calls this.

    Raises UserError if it cannot be written, or holds other files or samples of other settings. The checkpoint's path may differ,
    and the autoencoder if all samples so far are latents.
    """
    outdir = make_folder(outdir, "--outdir")
    note = outdir / "settings.json"
    if note.is_file():
        try:
            then = json.loads(note.read_text())
            free = {"ckpt_path"} | ({"vae.digest", "vae.amp"} - then.keys())
        except (ValueError, AttributeError) as error:
            raise UserError(f"{note} is not readable; give another --outdir, or delete this folder") from error
        other = [f"{key} {then.get(key)} there, {value} now" for key, value in settings.items()
                 if key not in free and then.get(key) != value]
        if other:
            raise UserError(f"{outdir} holds samples of other settings: {'; '.join(sorted(other))}. "
                            f"Give another --outdir, or delete this folder")
        settings = then | settings
    elif any(outdir.iterdir()):
        raise UserError(f"{outdir} holds other files; give another --outdir")
    with write_whole(note) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=1))


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
        return self._in_folder() | set(self._in_npz("seeds"))

    def write(self, batch):
        """Write the finite samples of a Batch, each whole or not at all. Every process writes its own."""
        if self.format == "none":
            return
        values = batch.latents.cpu().numpy() if self.format == "latents" else batch.images
        self.folder.mkdir(exist_ok=True)
        for seed, value in zip(batch.seeds, values):
            if seed in batch.bad_seeds:
                continue
            unfinished = self._path(seed).with_suffix(".tmp")
            try:
                with open(unfinished, "wb") as stream:
                    np.save(stream, value) if self.npz else save_png(stream, value)
                unfinished.replace(self._path(seed))
            finally:
                unfinished.unlink(missing_ok=True)

    def finish(self, classes_of, class_names):
        """Pack the .npz, or write labels.csv; one process calls this at the end. classes_of(seeds): their classes, or None."""
        if self.npz:
            self._pack(classes_of)
        elif self.format == "png" and classes_of([]) is not None:
            self._write_labels(classes_of, class_names)

    def _path(self, seed):
        return self.folder / f"{seed:06d}{self.suffix}"

    def _in_folder(self):
        return {int(path.stem) for path in self.folder.glob(f"*{self.suffix}") if path.stem.isdigit()}

    def _in_npz(self, name):
        """An array of the .npz as a list of its rows, in order of seeds; empty if there is no file."""
        if self.npz is None or not self.npz.is_file():
            return []
        try:
            with np.load(self.npz) as content:
                return list(content[name])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.npz} is damaged, or another program's; give another --outdir, or delete it") from error

    def _write_labels(self, classes_of, class_names):
        seeds = sorted(self._in_folder())
        with write_whole(self.outdir / "labels.csv") as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(("file", "seed", "class", "name"))
            for seed, index in zip(seeds, classes_of(seeds)):
                table.writerow((f"images/{self._path(seed).name}", seed, index, class_name(index, class_names)))

    def _pack(self, classes_of):
        """Move the files of the folder into the .npz: its main array, `seeds`, in order, and `labels` if there are classes."""
        new = self._in_folder()
        if new:
            old = dict(zip(self._in_npz("seeds"), self._in_npz(self.array_name)))
            seeds = sorted(new | old.keys())
            first = np.load(self._path(min(new)))
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(seeds), *first.shape)}
            with write_whole(self.npz) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
                with archive.open(f"{self.array_name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array_header_2_0(stream, header)
                    for seed in seeds:  # one by one: new samples may be more than memory holds
                        stream.write((np.load(self._path(seed)) if seed in new else old[seed]).tobytes())
                for name, array in (("seeds", seeds), ("labels", classes_of(seeds))):
                    if array is not None:
                        with archive.open(f"{name}.npy", "w") as stream:
                            np.save(stream, np.array(array))
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
