"""WebDataset tar shards of latents: tarfile finds the members once, then they are read at their offsets."""

import contextlib
import io
import pickle
import tarfile

import numpy as np

from dataset.base import NPY_MAGIC, LatentSet, check_not_cut, read_label, read_npy, reading
from utils.cli import UserError
from utils.files import write_whole
from utils.logging import say

INDEX_FILE = ".tar-index.npz"
MOMENTS = ("moments.npy", "latents.npy", "latent.npy", "npy", "moments", "latents", "latent")
LABELS = ("cls", "label", "cls.txt", "label.txt", "cls.npy", "label.npy")
PICKLE_NAMES = {  # all that a pickled array needs, as numpy 1 and 2 call it
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce_ex__(4)[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.zeros(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # protocol 2 stores bytes as text
}


class WebDatasetLatents(LatentSet):
    """WebDataset tar shards. Members of a sample share the name up to the first dot; what follows it tells what they are.

    One of MOMENTS is the moments or latents: a .npy file or, as the published converter writes it, a pickled numpy array.
    One of LABELS is the class: a number in ascii or a .npy file.
    """

    def __init__(self, path, files):
        self.name, self.files = str(path), files
        self.index = self._load_index()
        self.labels, self.num_images = self.index[:, 3], len(self.index)
        self._look_at_first()

    def _load_index(self):
        """(N, 4) int64: file, offset and size of the moments, label.

        A hidden file beside the shards keeps it, since tarfile takes a minute for a million samples.
        """
        stats = [(file.name, file.stat()) for file in self.files]
        key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        kept = self.files[0].with_name(INDEX_FILE)
        with contextlib.suppress(Exception), np.load(kept, allow_pickle=False) as arrays:  # none yet, or damaged
            if str(arrays["key"]) == key:
                return arrays["index"]
        say(f"{self.name}: looking through {len(self.files)} tar files; {INDEX_FILE} beside them keeps what is found")
        index = np.array([(i, *row) for i, file in enumerate(self.files) for row in _members(file)], np.int64).reshape(-1, 4)
        with contextlib.suppress(OSError), write_whole(kept) as temporary, open(temporary, "wb") as file:  # read-only is fine
            np.savez(file, key=key, index=index)
        return index

    def _array(self, image, mirrored):
        number, offset, size, _ = self.index[image].tolist()
        check_not_cut(self.files[number], offset + size)
        with open(self.files[number], "rb") as file:
            file.seek(offset - 512)
            header, data = file.read(512), file.read(size)
        where = f"{self.files[number]}: {header[:100].rstrip(bytes(1)).decode(errors='replace')}"
        return (read_npy if data.startswith(NPY_MAGIC) else read_pickle)(data, where), where


def _members(file):
    """Yield (offset and size of the moments, label) of each sample of a tar. Raises UserError if it is damaged or cut short."""
    samples = {}
    with reading(file), tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isreg() and member.size:
                folder, slash, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                samples.setdefault(folder + slash + key, {})[kind] = member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):  # tarfile itself takes a cut or bad header for the end
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}, it is cut short or no uncompressed tar")
        for key, members in samples.items():
            moments, label = (next((members[kind] for kind in kinds if kind in members), None) for kinds in (MOMENTS, LABELS))
            if moments is None or label is None:
                raise UserError(f"{file}: sample {key} has {', '.join(sorted(members))} with content, wanted moments (one of "
                                f"{', '.join(MOMENTS)}) and a label ({', '.join(LABELS)})")
            yield moments.offset_data, moments.size, read_label(tar.extractfile(label).read(), f"{file}: {label.name}")


class ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else: every other name that a pickle asks for is refused before it is looked up."""

    def find_class(self, module, name):
        if (module, name) not in PICKLE_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return PICKLE_NAMES[module, name]


def read_pickle(data, where):
    """The array in the bytes of a pickled numpy array. Raises UserError for anything else."""
    with reading(f"{where}: {len(data)} bytes, neither a .npy file nor a pickled numpy array alone,"):
        array = ArrayUnpickler(io.BytesIO(data)).load()
    if type(array) is not np.ndarray:
        raise UserError(f"{where}: a pickled {type(array).__name__}, wanted a numpy array")
    return array
