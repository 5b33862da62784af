"""Files written whole or not at all, and folders checked before the work whose results go there."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from utils.cli import UserError


def make_folder(path, option):
    """Make the folder `path` (and its parents) and check that files can be written there; returns it as a Path.

    option: what to name in the message, such as "--outdir". Raises UserError, and leaves no new folder behind, if the path is
    a file, read-only or too long.
    """
    path, made = Path(path), []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0")
    except OSError as error:
        for folder in made:
            with contextlib.suppress(OSError):  # it was not made, or somebody else has put something there
                folder.rmdir()
        if isinstance(error, FileExistsError):
            raise UserError(f"{option} {path} is a file; give a folder") from None
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); give another folder") from error
    return path


@contextlib.contextmanager
def write_whole(path):
    """Give the path of a temporary file beside `path`; it takes its place, flushed to disk, when the block ends without an error.

    After an error the temporary file is gone and `path` is as it was. After a crash, PATH.*.tmp may be left. Raises OSError as the
    block does.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # process numbers repeat between containers
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def told(path):
    """Turn an OSError in the block, such as a full disk, into a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); free some space or give another place") from error


def file_sha256(path):
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path):
    """Make sure that the content of a file, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
