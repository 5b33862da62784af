import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from latent_helpers import NUM_IMAGES, SHAPE, make_plan, random_moments, tree, write_set, write_shards
from dataset.formats import open_latents
from dataset.store import LatentWriter, StoredLatents
from utils.cli import UserError


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_size", [1, 4, 11, 100])
def test_samples_come_back_bit_for_bit(tmp_path, dtype, shard_size):
    moments, mirrored, labels = random_moments(dtype)
    latents = open_latents(write_set(tmp_path / "set", dtype=dtype, shard_size=shard_size), xflip=True)
    order = np.random.default_rng(1).permutation(2 * NUM_IMAGES)
    found, found_labels = latents.read(order)
    assert found.dtype == dtype and found_labels.dtype == np.int64
    np.testing.assert_array_equal(found, np.concatenate([moments, mirrored])[order])
    np.testing.assert_array_equal(found_labels, np.tile(labels, 2)[order])


def test_attributes_tell_what_was_written(tmp_path):
    latents = StoredLatents(write_set(tmp_path / "set"))
    assert (len(latents), latents.sample_shape, latents.num_classes, latents.class_names, latents.scale, latents.shift,
            latents.vae, latents.mirrored) == (NUM_IMAGES, SHAPE, 3, ["ant", "bee", "cat"], 0.25, 0.5, "some/vae", False)
    assert latents.description == {"scale": 0.25, "shift": 0.5, "vae": "0123456789abcdef"}


def test_scale_and_shift_may_be_one_per_channel(tmp_path):
    scale, shift = [0.1, 0.2, 0.3, 0.4], [-1.0, 0.0, 1.0, 2.0]
    latents = open_latents(write_set(tmp_path / "set", scale=scale, shift=shift), scale=scale)
    assert (latents.scale, latents.shift) == (scale, shift)


@pytest.mark.parametrize("wish, message", [
    ({"scale": 0.3}, "scale=0.3 is asked for .data.scale, or --scale of dataset.convert., but .*set says 0.25; leave it out"),
    ({"shift": 0.0}, "shift=0.0 is asked for .* says 0.5"),
    ({"scale": [0.25, 0.25, 0.25, 0.3]}, "says 0.25"),
])
def test_another_scale_than_the_sets_own_is_refused(tmp_path, wish, message):
    path = write_set(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        open_latents(path, **wish)
    assert open_latents(path, scale=0.25, shift=0.5).scale == 0.25


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_set_of_an_older_version_has_no_digest_and_is_read(tmp_path):
    path = write_set(tmp_path / "set")
    edit_manifest(path, lambda manifest: manifest.pop("vae_digest"))
    assert StoredLatents(path).vae_digest == ""


@pytest.mark.parametrize("key, value", [
    ("num_images", 10 ** 9), ("num_images", "11"), ("num_images", 11.0), ("num_images", True), ("scale", "x"), ("scale", float("nan")),
    ("scale", 0), ("scale", -1.0), ("scale", [0.1, 0.2]), ("scale", None), ("shift", float("inf")), ("shift", []), ("num_classes", -1),
    ("num_classes", None), ("num_classes", 4), ("class_names", ["ant"]), ("class_names", 3), ("sample_shape", [8, 3]),
    ("sample_shape", [7, 3, 3]),
    ("sample_shape", [8, 3, -3]), ("sample_shape", [8, 3, 10 ** 9]), ("sample_shape", 5), ("dtype", "float64"), ("dtype", 4),
    ("mirrored", "yes"), ("shards", []), ("shards", 3), ("shards", [{}] * 3), ("shards", None),
])
def test_impossible_values_in_a_manifest_are_told(tmp_path, key, value):
    path = write_set(tmp_path / "set")
    edit_manifest(path, lambda manifest: manifest.update({key: value}))
    with pytest.raises(UserError, match="manifest.json is damaged: .*; restore the file or make the set again|, the manifest wants "):
        StoredLatents(path)


@pytest.mark.parametrize("change, message", [
    (lambda shard: shard.update(count=3), "manifest.json.*num_images=11, wanted the sum"),
    (lambda shard: shard["files"].pop("labels-00001.npy"), "manifest.json is damaged: KeyError"),
    (lambda shard: shard["files"]["moments-00001.npy"].update(bytes=10 ** 12), "moments-00001.npy is cut short: .*wanted 1000000000000;"),
    (lambda shard: shard["files"]["moments-00001.npy"].pop("bytes"), "manifest.json is damaged: KeyError"),
    (lambda shard: shard["files"]["moments-00001.npy"].update(bytes="many"), "manifest.json is damaged: "),
])
def test_shards_that_do_not_fit_their_files_are_told(tmp_path, change, message):
    path = write_set(tmp_path / "set")
    edit_manifest(path, lambda manifest: change(manifest["shards"][1]))
    with pytest.raises(UserError, match=message):
        StoredLatents(path)


def test_counts_that_are_wrong_together_never_cost_memory(tmp_path):
    """num_images and a shard's count are both 10^9 too high: the files are too small for that."""
    path = write_set(tmp_path / "set")

    def change(manifest):
        manifest["num_images"] += 10 ** 9
        manifest["shards"][0]["count"] += 10 ** 9
    edit_manifest(path, change)
    with pytest.raises(UserError, match=r"labels-00000.npy: int64 of shape \(4,\), the manifest wants int64 of shape \(1000000004,\)"):
        StoredLatents(path)


def test_mirrored_copies_count_only_when_asked_for(tmp_path, capsys):
    path = write_set(tmp_path / "set")
    assert len(open_latents(path, xflip=True)) == 22 and capsys.readouterr().out == ""
    assert len(open_latents(path)) == 11
    assert capsys.readouterr().out == f"{path} also holds the mirrored copies of its images; data.xflip=true trains on them too\n"


def test_mirrored_copies_that_are_not_there_are_refused(tmp_path):
    path = write_set(tmp_path / "set", mirrored=False)
    with pytest.raises(UserError, match="data.xflip=true, but .*set holds no mirrored copies; extract it again with --xflip, or set"):
        open_latents(path, xflip=True)


def test_no_batch_and_no_image_twice_are_fine(tmp_path):
    latents = StoredLatents(write_set(tmp_path / "set"))
    assert latents.read([])[0].shape == (0, *SHAPE)
    np.testing.assert_array_equal(latents.read([3, 3])[0][0], latents.read([3])[0][0])


@pytest.mark.parametrize("index", [-1, NUM_IMAGES])
def test_index_outside_the_set_is_refused(tmp_path, index):
    with pytest.raises(IndexError, match="samples 0..10"):
        StoredLatents(write_set(tmp_path / "set")).read([0, index])


def test_unfinished_set_is_not_readable(tmp_path):
    writer = LatentWriter(tmp_path / "set", make_plan())
    write_shards(writer, [0, 2])
    with pytest.raises(ValueError, match=r"still lacks shards \[1\]"):
        writer.finish()
    with pytest.raises(ValueError, match="manifest.json is missing .*interrupted"):
        StoredLatents(tmp_path / "set")


def test_order_and_interruption_leave_no_trace(tmp_path):
    write_set(tmp_path / "straight")
    write_shards(LatentWriter(tmp_path / "broken", make_plan()), [2])
    again = LatentWriter(tmp_path / "broken", make_plan())
    assert again.pending() == [0, 1]
    write_shards(again, [1, 0])
    again.finish()
    assert tree(tmp_path / "broken") == tree(tmp_path / "straight")


KILLED_WRITER = """
import os, signal, sys
sys.path[:0] = sys.argv[2:4]
import dataset.store as store
from latent_helpers import make_plan, write_shards
real, calls = os.replace, 0
def replace(source, target):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
writer = store.LatentWriter(store.Path(sys.argv[1]), make_plan())
write_shards(writer)
writer.finish()
"""


def test_kill_at_every_rename_is_resumed_to_the_same_bytes(tmp_path):
    """14 files are renamed into place: the plan, 3 shards of 4 (with their records), the manifest; each is cut in turn."""
    write_set(tmp_path / "straight")
    here = os.path.dirname(__file__)
    for call in range(1, 15):
        broken = tmp_path / f"broken{call}"
        code = subprocess.run([sys.executable, "-c", KILLED_WRITER, broken, here, os.path.dirname(here), str(call)]).returncode
        assert code == -signal.SIGKILL
        assert not (broken / "manifest.json").exists()
        assert tree(write_set(broken)) == tree(tmp_path / "straight")


def test_kill_after_the_manifest_leaves_a_complete_set(tmp_path):
    write_set(tmp_path / "straight")
    path = write_set(tmp_path / "set")
    (path / ".partial").mkdir()
    (path / ".partial" / "plan.json").write_text("{}")
    assert len(StoredLatents(path)) == NUM_IMAGES
    assert tree(write_set(path)) == tree(tmp_path / "straight")


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"num_images": 12}, {"shard_size": 5}, {"vae": "other"},
                                    {"made_by": {"resolution": 8}}])
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_do_not_go_on_with_a_set(tmp_path, change, finished):
    path = tmp_path / "set"
    if finished:
        write_set(path)
    else:
        write_shards(LatentWriter(path, make_plan()), [0])
    with pytest.raises(ValueError, match=next(iter(next(iter(change.values())) if "made_by" in change else change))):
        LatentWriter(path, make_plan(**change))


def test_settings_may_change_while_no_shard_is_written(tmp_path):
    LatentWriter(tmp_path / "set", make_plan(dtype="float16"))
    assert StoredLatents(write_set(tmp_path / "set")).dtype == np.float32


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(ValueError, match="not empty .thesis.tex"):
        LatentWriter(tmp_path, make_plan())
    assert (tmp_path / "thesis.tex").read_text() == "all my work" and len(list(tmp_path.iterdir())) == 1


def test_skipped_images_shorten_their_shard_only(tmp_path):
    moments, mirrored, labels = random_moments()
    writer = LatentWriter(tmp_path / "set", make_plan())
    none = moments[:0]
    writer.write(0, moments[[0, 3]], labels[[0, 3]], mirrored[[0, 3]], skipped=["one.jpg", "two.jpg"])
    writer.write(1, none, labels[:0], none, skipped=["4.jpg", "5.jpg", "6.jpg", "7.jpg"])
    write_shards(writer)
    manifest = writer.finish()
    assert LatentWriter(tmp_path / "set", make_plan()).pending() == []  # the same command again finds it finished
    latents = open_latents(tmp_path / "set", xflip=True)
    kept = [0, 3, 8, 9, 10]
    assert len(manifest["skipped"]) == 6 and len(latents) == 2 * len(kept)
    np.testing.assert_array_equal(latents.read(range(len(latents)))[0], np.concatenate([moments[kept], mirrored[kept]]))
    np.testing.assert_array_equal(latents.read_labels(range(len(kept))), labels[kept])


def test_set_of_nothing_but_skipped_images_is_refused(tmp_path):
    writer = LatentWriter(tmp_path / "set", make_plan(num_images=2))
    empty = np.empty((0, *SHAPE), np.float32)
    writer.write(0, empty, np.empty(0, np.int64), empty, skipped=["a", "b"])
    with pytest.raises(ValueError, match="every image was skipped"):
        writer.finish()


@pytest.mark.parametrize("damage, message", [
    (dict(moments=np.zeros((4, 8, 3, 2), np.float32)), r"'moments': \(4, 8, 3, 2\).* wanted .*\(4, 8, 3, 3\)"),
    (dict(mirrored=np.zeros((3, 8, 3, 3), np.float32)), r"'mirrored': \(3, 8, 3, 3\)"),
    (dict(mirrored=None), r"shapes {'moments': \(4, 8, 3, 3\), 'labels': \(4,\)} .* wanted .*mirrored"),
    (dict(moments=np.full((4, *SHAPE), 1e5)), "moments-00000.npy would not be finite as float16"),
    (dict(moments=np.full((4, *SHAPE), np.nan)), "moments-00000.npy would not be finite"),
    (dict(skipped=["x"]), r"'labels': \(4,\)} and 1 skipped, wanted .*\(3,\)"),
])
def test_wrong_shards_are_refused_and_write_nothing(tmp_path, damage, message):
    writer = LatentWriter(tmp_path / "set", make_plan(dtype="float16"))
    right = {"moments": np.zeros((4, *SHAPE)), "labels": np.zeros(4, np.int64), "mirrored": np.zeros((4, *SHAPE))}
    with pytest.raises(ValueError, match=message):
        writer.write(0, **{**right, **damage})
    assert list((tmp_path / "set").glob("*.npy")) == [] and writer.pending() == [0, 1, 2]


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"num_images": 0}, {"shard_size": 0}, {"num_classes": 4}])
def test_impossible_plans_are_refused(change):
    with pytest.raises(ValueError, match="dtype=|num_images=|shard_size=|class_names="):
        make_plan(**change)


@pytest.mark.parametrize("name", ["moments-00001.npy", "mirrored-00002.npy", "labels-00000.npy"])
def test_file_cut_short_or_missing_is_told_at_open(tmp_path, name):
    file = write_set(tmp_path / "set") / name
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ValueError, match=f"{name} is cut short: {size - 1} bytes, wanted {size}"):
        StoredLatents(tmp_path / "set")
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
        StoredLatents(tmp_path / "set")


def test_file_cut_short_while_it_is_read_is_told(tmp_path):
    latents = StoredLatents(write_set(tmp_path / "set"))
    latents.read([0])
    os.truncate(tmp_path / "set" / "moments-00000.npy", 200)
    with pytest.raises(UserError, match="moments-00000.npy is cut short: 200 bytes, wanted "):
        latents.read([0])


def test_an_open_set_keeps_no_file_of_labels_open(tmp_path):
    """ImageNet has 313 shards, and a process may often open no more than 1,024 files."""
    path, before = write_set(tmp_path / "set", shard_size=1), len(os.listdir("/proc/self/fd"))
    latents = StoredLatents(path)
    assert len(latents) == 11 and len(os.listdir("/proc/self/fd")) <= before + 1


def test_header_that_contradicts_the_manifest_is_told(tmp_path):
    path = write_set(tmp_path / "set")
    np.save(path / "moments-00000.npy", np.zeros((4, 8, 9, 1), np.float32))
    with pytest.raises(ValueError, match=r"moments-00000.npy: float32 of shape \(4, 8, 9, 1\), the manifest wants"):
        StoredLatents(path).read([0])


@pytest.mark.parametrize("text, message", [("{", "is damaged: JSONDecodeError"), ("[]", "is damaged: TypeError"),
                                           ('{"format": "maskdit-latents", "version": 2}', "version")])
def test_foreign_manifest_is_told(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        StoredLatents(tmp_path)


def test_manifest_lists_every_file_once(tmp_path):
    path = write_set(tmp_path / "set")
    listed = [name for shard in json.loads((path / "manifest.json").read_text())["shards"] for name in shard["files"]]
    assert sorted(listed + ["manifest.json"]) == sorted(tree(path))


def run_tool(*args):
    return subprocess.run([sys.executable, "-m", "dataset.store", *map(str, args)], capture_output=True, text=True,
                          cwd=os.path.dirname(os.path.dirname(__file__)))


def test_command_line_describes_a_set_and_finds_one_wrong_bit(tmp_path):
    path = write_set(tmp_path / "set")
    fine = run_tool(path)
    assert fine.returncode == 0 and "num_images=11" in fine.stdout and "mirrored=True" in fine.stdout and "3 shards" in fine.stdout
    file = path / "mirrored-00001.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    wrong = run_tool(path)
    assert wrong.returncode == 2 and "mirrored-00001.npy: sha256" in wrong.stderr and "Traceback" not in wrong.stderr
