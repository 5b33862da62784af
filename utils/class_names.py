"""Class names: what a user types to the index that the network takes."""

import difflib
from pathlib import Path

from utils.cli import UserError

IMAGENET_FILE = Path(__file__).resolve().parent.parent / "assets" / "imagenet_classes.txt"


def load_imagenet_class_names():
    """The 1000 names of ImageNet-1k in index order (torchvision's list; all different)."""
    return IMAGENET_FILE.read_text(encoding="utf-8").splitlines()


def resolve_class(text, class_names):
    """Index of the class that `text` means: an index, a name, or a part that only one name has.

    Case does not matter; "_" and "-" count as spaces, so that golden_retriever needs no quotes.
    Raises ValueError for an index out of range, an unknown name (with near ones) or an ambiguous part (with its matches).
    """
    text = str(text).strip()
    if text.removeprefix("-").isdecimal():
        return _in_range(int(text), len(class_names))
    wanted, names = _plain(text), [_plain(name) for name in class_names]
    matches = (_indices(name == text for name in class_names)       # ImageNet has the dog Cardigan and the garment cardigan
               or _indices(name == wanted for name in names)
               or _indices(wanted in name for name in names if wanted))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"class {text!r} is ambiguous: {_listed(matches, class_names)}; give more of the name, or the index")
    near = [names.index(name) for name in difflib.get_close_matches(wanted, names, n=3)]
    hint = f"near it: {_listed(near, class_names)}" if near else "no name is near it"
    raise UserError(f"class {text!r} is unknown; {hint}; give a name, a part of one, or an index from 0 to {len(class_names) - 1}")


def _indices(matches):
    return [index for index, match in enumerate(matches) if match]


def _in_range(index, num_classes):
    if not 0 <= index < num_classes:
        raise UserError(f"class {index} is out of range; wanted 0 to {num_classes - 1}")
    return index


def _plain(name):
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _listed(indices, class_names, most=6):
    shown = ", ".join(f"{class_names[index]} ({index})" for index in indices[:most])
    return shown + (f" and {len(indices) - most} more" if len(indices) > most else "")
