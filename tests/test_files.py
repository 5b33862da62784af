"""Files are written whole or not at all; folders that cannot be used are refused before any work and leave nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils import files
from utils.cli import UserError
from utils.files import make_folder, told, write_whole

ROOT = Path(__file__).resolve().parent.parent


def test_a_folder_is_made_with_its_parents_and_may_be_there_already(tmp_path):
    (tmp_path / "a").mkdir()
    for _ in range(2):
        assert make_folder(tmp_path / "a" / "b" / "c", "--outdir") == tmp_path / "a" / "b" / "c"
    assert list((tmp_path / "a" / "b" / "c").iterdir()) == []


@pytest.mark.parametrize("path, message", [
    ("file", "--outdir .*file is a file; give a folder"),
    ("file/below", r"--outdir .*below cannot be written \(Not a directory\)"),
    ("new/" + "x" * 300, r"cannot be written \(File name too long\); give another folder"),
    ("/proc/self/new", "cannot be written"),
])
def test_a_folder_that_cannot_be_is_told(tmp_path, path, message):
    (tmp_path / "file").write_text("content")
    with pytest.raises(UserError, match=message) as refusal:
        make_folder(tmp_path / path, "--outdir")
    assert len(str(refusal.value).splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "content"


def test_a_read_only_folder_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "new" / "deep"):
        with pytest.raises(UserError, match="results_dir .* cannot be written .Permission denied."):
            make_folder(folder, "log.results_dir")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]  # the old one stays, the new ones are gone


def test_a_failing_block_leaves_the_old_file_and_no_temporary_one(tmp_path):
    (tmp_path / "file").write_text("old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with write_whole(tmp_path / "file") as temporary:
                temporary.write_text("half")
                raise error
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with write_whole(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    code = ("import os, signal, sys\nfrom utils.files import write_whole\nwith write_whole(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "file").read_text() == "old"


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """write, fsync(file), rename, fsync(folder): without the first, a crash can leave an empty file under the right name."""
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append("fsync folder" if path == tmp_path else f"fsync {path.read_text()}")
        fsync(descriptor)

    def note_replace(source, target):
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with write_whole(tmp_path / "file") as temporary:
        temporary.write_text("content")
        assert calls == []
    assert calls == ["fsync content", "rename to file", "fsync folder"]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with write_whole(tmp_path / "file") as first, write_whole(tmp_path / "file") as second:
        assert first != second and first.parent == second.parent == tmp_path
        assert first.suffix == second.suffix == ".tmp"  # what clean-ups look for
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # the outer block ends last


def test_an_os_error_is_told_with_the_path(tmp_path):
    with pytest.raises(UserError, match=r"metrics.json cannot be written \(No space left on device\); free some space"):
        with told("metrics.json"):
            raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="as it is"):
        with told("x"):
            raise UserError("as it is")
    with pytest.raises(ValueError, match="a bug"):
        with told("x"):
            raise ValueError("a bug")
    with pytest.raises(UserError, match="cannot be written"):
        with told(tmp_path / "none" / "file"), write_whole(tmp_path / "none" / "file") as temporary:
            temporary.write_text("content")
