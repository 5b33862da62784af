"""Checkpoint files are written whole or not at all; the newest undamaged one is found."""

import argparse
import errno
import json
import os
import shutil

import pytest
import torch
from torch.utils import _pytree as pytree

from sampling.load import damage, file_sha256, load_checkpoint
from training import checkpoint
from training.checkpoint import CheckpointWriter, find_latest, write_checkpoint
from utils.cli import UserError


def state(step, size=500):
    random_numbers = torch.Generator().manual_seed(step)
    weights = {"model.w": torch.randn(size, generator=random_numbers), "model.b": torch.randn(3, generator=random_numbers)}
    return {"model": weights, "ema": {name: value / 2 for name, value in weights.items()}, "step": step, "images_seen": 4 * step}


def save_all(folder, steps, **options):
    writer = CheckpointWriter(folder, **options)
    writer.prepare(0, 1000, 1)
    for step in steps:
        writer.save(step, state(step))
    assert writer.wait()
    return writer


def steps_in(folder):
    return sorted(int(path.stem) for path in folder.glob("*.pt"))


# ------------------------------------------------------------------------------------------------ writing

def test_checkpoint_comes_back_and_its_manifest_tells_size_and_checksum(tmp_path):
    save_all(tmp_path, [7])
    path, manifest = tmp_path / "0000007.pt", json.loads((tmp_path / "0000007.json").read_text())
    assert sorted(os.listdir(tmp_path)) == ["0000007.json", "0000007.pt"]
    assert manifest["size"] == path.stat().st_size and manifest["sha256"] == file_sha256(path) and manifest["step"] == 7
    content = load_checkpoint(path)
    assert content.keys() == state(7).keys() and torch.equal(content["model"]["model.w"], state(7)["model"]["model.w"])
    assert find_latest(tmp_path) == path


def test_every_file_is_on_disk_before_it_takes_its_name_and_the_manifest_comes_first(tmp_path, monkeypatch):
    """Otherwise a crash of the machine could leave a file under its final name without its content."""
    order, sizes = [], {}

    def record(name, function):
        def recorded(*args):
            what = args[0] if name == "rename" else os.readlink(f"/proc/self/fd/{args[0]}")
            kind = "folder" if os.path.isdir(what) else os.path.basename(what).split(".")[1]
            order.append((name, kind))
            if name == "flush" and kind != "folder":
                sizes[kind] = os.path.getsize(what)
            return function(*args)
        return recorded

    monkeypatch.setattr(os, "fsync", record("flush", os.fsync))
    monkeypatch.setattr(os, "replace", record("rename", os.replace))
    write_checkpoint(tmp_path / "0000007.pt", state(7))
    assert order == [("flush", "json"), ("rename", "json"), ("flush", "folder"), ("flush", "pt"), ("rename", "pt"), ("flush", "folder")]
    assert sizes == {kind: (tmp_path / f"0000007.{kind}").stat().st_size for kind in ("pt", "json")}


def test_saved_is_the_state_at_the_call_not_at_the_write(tmp_path, monkeypatch):
    """Training goes on while the background writer works, in the tensors that were saved."""
    import threading
    go = threading.Event()
    original = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *args: (go.wait(30), original(*args)))
    writer, content = CheckpointWriter(tmp_path), state(1) | {"opt": {"state": {0: {"step": torch.tensor(5.0)}}}}
    writer.prepare(0, 1000, 1)
    writer.save(1, content)
    content["model"]["model.w"].fill_(0)
    content["opt"]["state"][0]["step"].fill_(0)
    go.set()
    assert writer.wait()
    saved = load_checkpoint(tmp_path / "0000001.pt")
    assert torch.equal(saved["model"]["model.w"], state(1)["model"]["model.w"]) and saved["opt"]["state"][0]["step"] == 5


def many_types(step):
    """A state with tensors of many types and sizes, empty ones and single numbers among them."""
    odd = {f"{size}-{dtype}": torch.arange(size).to(dtype) for size in (0, 1, 63, 64, 65)
           for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64)}
    return state(step) | {"odd": odd, "more": [torch.tensor(2.0), (torch.arange(6.0).reshape(2, 3), "text")]}


def test_one_block_of_host_memory_holds_all_tensors_and_is_used_again(tmp_path):
    """Places that do not overlap, aligned, with storages of their own, so that the file is the same bit for bit."""
    writer = CheckpointWriter(tmp_path)
    copies, blocks = [], []
    for step in (1, 2):
        copies.append([leaf for leaf in pytree.tree_leaves(writer._copy_to_host(many_types(step))) if torch.is_tensor(leaf)])
        blocks.append(writer.block)
    assert blocks[0] is blocks[1] and [c.data_ptr() for c in copies[0]] == [c.data_ptr() for c in copies[1]]
    first, num_bytes = blocks[0].ctypes.data, sum(tensor.nbytes for tensor in copies[0])
    assert num_bytes < len(blocks[0]) <= num_bytes + checkpoint.ALIGNMENT * len(copies[0])
    there = [tensor for tensor in copies[0] if tensor.nbytes]
    ends = [first, *(tensor.data_ptr() + tensor.nbytes for tensor in there)]
    for tensor, before in zip(there, ends):
        assert tensor.data_ptr() >= before and tensor.nbytes == tensor.untyped_storage().nbytes()
        assert tensor.data_ptr() % checkpoint.ALIGNMENT == 0
    assert ends[-1] <= first + len(blocks[0])
    writer._copy_to_host(many_types(3) | {"new": torch.zeros(1000)})
    assert len(writer.block) > len(blocks[0])


def test_copies_in_the_block_make_the_same_file(tmp_path):
    writer = CheckpointWriter(tmp_path)
    (tmp_path / "direct").mkdir()
    for step in (1, 2):
        write_checkpoint(tmp_path / "direct" / "0000009.pt", many_types(step))
        writer.save(9, many_types(step))
        assert writer.wait() and (tmp_path / "0000009.pt").read_bytes() == (tmp_path / "direct" / "0000009.pt").read_bytes()


def test_cuda_is_told_of_the_block_and_of_its_end(tmp_path, monkeypatch):
    """torch's own pinned memory is rounded up to a power of two: 11.7 GB would take 17."""
    calls = []

    class Cudart:
        cudaHostRegister = staticmethod(lambda *arguments: calls.append(("register", *arguments)) or 0)
        cudaHostUnregister = staticmethod(lambda *arguments: calls.append(("unregister", *arguments)) or 0)

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: calls.append(("checked", code)))
    writer = CheckpointWriter(tmp_path)
    writer._grow_block(100, pinned=True)
    small = writer.block.ctypes.data
    writer._grow_block(200, pinned=True)
    large = writer.block.ctypes.data
    del writer
    assert calls == [("register", small, 100, 0), ("checked", 0), ("unregister", small),
                     ("register", large, 200, 0), ("checked", 0), ("unregister", large)]


@pytest.mark.parametrize("keep_last, keep_every, kept", [(2, 0, [5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (0, 0, [1, 2, 3, 4, 5, 6])])
def test_keep_last_and_keep_every(tmp_path, keep_last, keep_every, kept):
    save_all(tmp_path, range(1, 7), keep_last=keep_last, keep_every=keep_every)
    assert steps_in(tmp_path) == kept == sorted(int(path.stem) for path in tmp_path.glob("*.json"))


def test_pruning_spares_the_new_one_beside_later_damaged_ones_and_files_that_are_not_ours(tmp_path):
    save_all(tmp_path, [300])
    (tmp_path / "0000300.pt").write_bytes(b"damaged")
    torch.save({"model": {}}, tmp_path / "0050.pt")  # as the published code leaves them
    save_all(tmp_path, [200, 250], keep_last=1)
    assert steps_in(tmp_path) == [50, 250, 300]
    assert find_latest(tmp_path) == tmp_path / "0000250.pt"


def full_disk_after(monkeypatch, num_bytes):
    class SmallDisk:
        left = num_bytes

        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            SmallDisk.left -= len(data)
            if SmallDisk.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

        def flush(self):
            self.stream.flush()

    hashing = checkpoint._HashingStream
    monkeypatch.setattr(checkpoint, "_HashingStream", lambda stream: hashing(SmallDisk(stream)))


def test_disk_that_fills_up_leaves_the_earlier_ones_whole_and_says_so(tmp_path, monkeypatch, capsys):
    writer = save_all(tmp_path, [1, 2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_disk_after(monkeypatch, 1500)
    writer.save(3, state(3))
    assert not writer.wait()
    said = capsys.readouterr().out
    assert f"WARNING: {tmp_path / '0000003.pt'} was not written: the disk is full; the earlier checkpoints in {tmp_path} are whole" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    writer.save(4, state(4))  # there is space again
    assert writer.wait() and find_latest(tmp_path).stem == "0000004"


@pytest.mark.skipif(not os.path.exists("/proc/mounts") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_really_full_disk(tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        writer = save_all(small, [1])
        writer.save(2, state(2, size=100_000))
        assert not writer.wait() and find_latest(small).stem == "0000001" and "the disk is full" in capsys.readouterr().out
        with pytest.raises(ValueError, match="GB free, but 1 more checkpoint"):
            writer.prepare(1, 300_000, 1)
    finally:
        os.system(f"umount {small}")


def test_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    free = [350]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=free[0]))
    writer = CheckpointWriter(tmp_path, keep_last=2)
    with pytest.raises(ValueError, match=r"has 0.00 GB free, but 3 more checkpoint\(s\) of 0.00 GB are to come; free some space"):
        writer.prepare(0, 150, 100)  # at the most, two old ones and one being written
    writer.prepare(0, 150, 2)  # no more are to come
    write_checkpoint(tmp_path / "0000001.pt", state(1))
    writer.prepare(1, 150, 100)  # one of the three is there already


def test_unwritable_folder_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="log.results_dir: checkpoint folder .*file/checkpoints cannot be written .*; give another folder"):
        CheckpointWriter(tmp_path / "file" / "checkpoints").prepare(0, 1, 1)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "0000009.pt.tmp").write_bytes(b"half")
    CheckpointWriter(tmp_path).prepare(0, 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_dies_leaves_no_checkpoint_without_its_manifest(tmp_path, monkeypatch):
    """Nor one that the manifest of another content vouches for, when a step is written anew."""
    path = tmp_path / "0000001.pt"

    def die(*_):
        raise KeyboardInterrupt

    for done in (0, 1):  # renames: none, the manifest's
        for again in (False, True):
            if again:
                write_checkpoint(path, state(1))
            replace, renamed = os.replace, []
            monkeypatch.setattr(os, "replace", lambda *names: die() if len(renamed) == done else renamed.append(names) or replace(*names))
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(path, state(1) | {"more": 1})
            monkeypatch.undo()
            assert path.exists() == again and (not again or (damage(path) is None) == (done == 0))
            path.unlink(missing_ok=True)


def test_failed_write_leaves_the_old_file_of_the_same_step(tmp_path, monkeypatch):
    path = tmp_path / "0000001.pt"
    write_checkpoint(path, state(1))
    full_disk_after(monkeypatch, 1500)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, state(2))
    assert damage(path) is None and load_checkpoint(path)["step"] == 1


# ------------------------------------------------------------------------------------------------ the newest valid one

def test_damaged_ones_are_named_and_passed_over(tmp_path, capsys):
    save_all(tmp_path, [1, 2, 3, 4, 5], keep_last=0)
    (tmp_path / "0000005.json").unlink()
    (tmp_path / "0000004.pt").write_bytes((tmp_path / "0000004.pt").read_bytes()[:-1])
    content = bytearray((tmp_path / "0000003.pt").read_bytes())
    content[900] ^= 4
    (tmp_path / "0000003.pt").write_bytes(content)
    (tmp_path / "0000002.json").write_text("{")
    assert find_latest(tmp_path) == tmp_path / "0000001.pt"
    said = capsys.readouterr().out.splitlines()
    for line, step, reason in zip(said, (5, 4, 3, 2), ("no manifest", "its manifest says", "its checksum differs", "not readable"), strict=True):
        assert f"000000{step}.pt is passed over" in line and reason in line


def test_when_all_are_damaged_nothing_is_begun_anew(tmp_path):
    save_all(tmp_path, [1, 2])
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged \(0000002.pt, 0000001.pt\); restore one"):
        find_latest(tmp_path)


def test_folder_without_checkpoints_has_none(tmp_path):
    assert find_latest(tmp_path / "nowhere") is None
    (tmp_path / "0000001.pt.12ab.tmp").write_bytes(b"interrupted")
    assert find_latest(tmp_path) is None


def test_checkpoint_copied_without_its_manifest_is_read_completely_and_gets_one(tmp_path, capsys):
    for step in (3, 5):
        write_checkpoint(tmp_path / f"000000{step}.pt", state(step) | {"stepper": {}})
        (tmp_path / f"000000{step}.json").unlink()
    assert find_latest(tmp_path) == tmp_path / "0000005.pt"
    assert "0000005.pt has no manifest; it was read completely, is whole, and gets one" in capsys.readouterr().out
    assert damage(tmp_path / "0000005.pt") is None and json.loads((tmp_path / "0000005.json").read_text())["step"] == 5
    assert not (tmp_path / "0000003.json").exists()


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-30]), lambda path: path.rename(path.with_name("0000009.pt")),
                                   lambda path: torch.save({"model": state(5)["model"]}, path)], ids=["cut", "other step", "published"])
def test_nothing_is_begun_anew_beside_a_checkpoint_without_a_manifest_that_is_of_no_use(tmp_path, capsys, spoil):
    write_checkpoint(tmp_path / "0000005.pt", state(5) | {"stepper": {}})
    (tmp_path / "0000005.json").unlink()
    spoil(tmp_path / "0000005.pt")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged .*; restore one with its .json, or move the folder away"):
        find_latest(tmp_path)
    assert "is passed over: " in capsys.readouterr().out
