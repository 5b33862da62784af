"""Class names: from what a user types to the index that the network takes."""

import difflib
import unicodedata

from utils.cli import PROJECT_ROOT, UserError

IMAGENET_FILE = PROJECT_ROOT / "assets" / "imagenet_classes.txt"
FEW = 20  # so many names are listed; all of a small set when a name is unknown


def load_imagenet_class_names():
    """The 1000 names of ImageNet-1k in index order (torchvision's list; all different)."""
    return IMAGENET_FILE.read_text(encoding="utf-8").splitlines()


def resolve_class(text, class_names):
    """Index of the class that `text` means: an index, a name, or a part that only one name has.

    Case and accents do not matter; "_" and "-" count as spaces, so that golden_retriever needs no quotes.
    Raises UserError for an index out of range, an unknown name (with all names or the near ones) or an ambiguous part.
    """
    text = str(text).strip()
    if text.removeprefix("-").isdecimal():
        if not 0 <= int(text) < len(class_names):
            raise UserError(f"class {text} is out of range; wanted 0 to {len(class_names) - 1}")
        return int(text)
    wanted, names = _plain(text), [_plain(name) for name in class_names]
    matches = ([index for index, name in enumerate(class_names) if name == text]  # ImageNet has the dog Cardigan and the garment cardigan
               or [index for index, name in enumerate(names) if name == wanted]
               or [index for index, name in enumerate(names) if wanted and wanted in name])
    if len(matches) == 1:
        return matches[0]
    few = range(len(class_names)) if len(class_names) <= FEW else ()
    near = matches or few or [names.index(name) for name in difflib.get_close_matches(wanted, names, n=3)]
    listed = ", ".join(f"{class_names[index]} ({index})" for index in near[:FEW]) or "no name is near it"
    raise UserError(f"class {text!r} is {'ambiguous' if matches else 'unknown'}: {listed}{', ...' if len(near) > FEW else ''}; "
                    f"give a name, a part that only one has, or an index from 0 to {len(class_names) - 1}")


def _plain(name):
    """In lower case, without accents, words apart by one space."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    unaccented = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(unaccented.replace("_", " ").replace("-", " ").split())
