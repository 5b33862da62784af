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

INDEX_FILE = ".tar-offsets.npz"
PICKLE_NAMES = {  # all that a pickled array needs, as numpy 1 and 2 call it
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce_ex__(4)[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.zeros(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # protocol 2 stores bytes as text
}


class WebDatasetLatents(LatentSet):
    """WebDataset tar shards. Members of a sample share the name up to the first dot; what follows it tells what they are.

    Moments or latents: `latent`, `latents`, `moments`, each also with `.npy`, or `npy`. The content is a .npy file or, as the
    published converter writes it, a pickled numpy array. Mirrored copies: `latent_flip`, `latents_flip`, `moments_flip`, the same.
    Labels: `cls`, `label`, `cls.txt`, `label.txt` (ascii), `cls.npy`, `label.npy`, or `json` with a key `label` or `cls`.
    """

    ROLES = {
        "moments": ("moments.npy", "latents.npy", "latent.npy", "npy", "moments", "latents", "latent"),
        "mirrored moments": tuple(f"{name}_flip{suffix}" for suffix in (".npy", "") for name in ("moments", "latents", "latent")),
        "label": ("cls", "label", "cls.txt", "label.txt", "cls.npy", "label.npy", "json"),
    }

    def __init__(self, files):
        self.files, self.name = files, str(files[0].parent if len(files) > 1 else files[0])
        self.index = self._load_index()
        self.num_images = len(self.index)
        if not self.num_images:
            raise UserError(f"{self.name}: no sample in {len(files)} tar files")
        self.labels, self.holds_mirrored = self.index[:, 5], bool((self.index[:, 4] > 0).all())
        self._look_at_first()

    def _load_index(self):
        """(N, 6) int64: file, offset and size of the moments, of the mirrored moments (0: none), label.

        A hidden file beside the shards keeps it, since tarfile takes a minute for a million samples.
        """
        stats = [(file.name, file.stat()) for file in self.files]
        key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        kept = self.files[0].with_name(INDEX_FILE)
        with contextlib.suppress(Exception), np.load(kept, allow_pickle=False) as arrays:  # none yet, or damaged
            if str(arrays["key"]) == key:
                return arrays["index"]
        say(f"{self.name}: looking through {len(self.files)} tar files; {INDEX_FILE} beside them keeps what is found")
        rows = [row for number, file in enumerate(self.files) for row in self._rows(number, file)]
        index = np.array(rows, np.int64).reshape(-1, 6)
        with contextlib.suppress(OSError), write_whole(kept) as temporary, open(temporary, "wb") as stream:  # a read-only place is fine
            np.savez(stream, key=key, index=index)
        return index

    def _rows(self, number, file):
        """The rows of the index for one tar. Raises UserError if it is damaged or cut short."""
        samples = {}
        with reading(file), tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isreg():
                    folder, slash, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    samples.setdefault(folder + slash + key, {})[kind] = member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile itself takes a cut or bad header for the end
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}, it is cut short or no uncompressed tar")
            return [(number, *self._row(tar, key, members)) for key, members in samples.items()]

    def _row(self, tar, key, members):
        found = {}
        for role, kinds in self.ROLES.items():
            found[role] = next((members[kind] for kind in kinds if kind in members and members[kind].size), None)
            if found[role] is None and role != "mirrored moments":
                raise UserError(f"{tar.name}: sample {key} has no {role}: it has {', '.join(sorted(members))}, "
                                f"wanted one of {', '.join(kinds)} with content")
        moments, mirrored, label = found.values()
        places = (moments.offset_data, moments.size, *((mirrored.offset_data, mirrored.size) if mirrored else (0, 0)))
        return *places, read_label(tar.extractfile(label).read(), f"{tar.name}: {label.name}")

    def _array(self, image, mirrored):
        number, offset, size, *flip, _ = self.index[image].tolist()
        if mirrored:
            offset, size = flip
        check_not_cut(self.files[number], offset + size)
        with open(self.files[number], "rb") as file:
            file.seek(offset - 512)
            header, data = file.read(512), file.read(size)
        where = f"{self.files[number]}: {header[:100].rstrip(bytes(1)).decode(errors='replace')}"
        return (read_npy if data.startswith(NPY_MAGIC) else read_pickle)(data, where), where


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
