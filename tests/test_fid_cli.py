"""`python -m fid`: its three forms, one process and several, and how it ends when something is wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_helpers import TinyInception, measure, random_images, random_inception
from PIL import Image

from fid import __main__ as cli
from fid import embeddings
from fid.metrics import METRICS
from fid.statistics import FeatureStream
from utils import cli as script
from utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture()
def run(monkeypatch, tmp_path, capsys):
    """Run `python -m fid ARGS` in this process, on TinyInception in place of the real network; returns what it printed."""
    monkeypatch.setattr(embeddings, "Inception", lambda weights, device: TinyInception())
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=random_images(30, 8, 8, seed=1).numpy())
    np.savez("real.npz", arr_0=random_images(40, 8, 8, seed=2).numpy())

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fid", *map(str, args)])
        cli.main()
        return [line for line in capsys.readouterr().out.splitlines() if "images/s" not in line]  # without progress
    return run


def test_ref_then_calc_equals_calc_against_the_images(run):
    run("ref", "--data", "real.npz", "--dest", "out/ref.npz", "--keep", 40)
    run("calc", "--images", "samples.npz", "--ref", "out/ref.npz", "--json", "a.json")
    run("calc", "--images", "samples.npz", "--ref", "real.npz", "--json", "b.json")
    stored, direct = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert stored["numbers"] == pytest.approx(direct["numbers"], rel=1e-9)
    assert set(stored["numbers"]) == {"FID", "sFID", "IS", "precision", "recall"}
    assert stored["settings"]["reference"]["num_images"] == 40 and stored["settings"]["images"] == "samples.npz"


def test_adm_form_takes_the_reference_first(run):
    run("ref", "--data", "real.npz", "--dest", "ref.npz")
    assert run("ref.npz", "samples.npz", "--metrics", "fid,is") == run(
        "calc", "--metrics", "fid,is", "--images", "samples.npz", "--ref", "ref.npz")
    with pytest.raises(ValueError, match="ref.npz: no arr_0; .* can be the reference but not the images"):
        run("samples.npz", "ref.npz")


def test_reference_given_as_images_is_told(run):
    """ADM's batches hold images too: 10,000, easily mistaken for the samples or for the data set behind the statistics."""
    run("ref", "--data", "real.npz", "--dest", "ref.npz", "--keep", 20)
    swapped = run("samples.npz", "ref.npz", "--metrics", "fid")
    assert any("ref.npz is a reference itself" in line and "swap --images and --ref" in line for line in swapped)
    again = run("ref", "--data", "ref.npz", "--dest", "again.npz")
    assert "those that are written now are of its 20 images arr_0" in again[0]
    assert "is a reference itself" not in "".join(run("ref.npz", "samples.npz", "--metrics", "fid"))


def test_num_seed_and_neighbours(run):
    run("calc", "--images", "samples.npz", "--ref", "real.npz", "--num", 20, "--seed", 3, "--metrics", "fid,kid", "--json", "a.json",
        "--neighbours", "near.png")
    result = json.loads(Path("a.json").read_text())
    assert result["settings"]["num_images"] == 20 and result["settings"]["seed"] == 3
    assert set(result["numbers"]) == {"FID", "KID", "KID_std"} and Path("near.png").stat().st_size > 1000


def test_several_processes_give_the_same_numbers(tmp_path):
    for name, num, seed in (("samples", 45, 1), ("real", 38, 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(num, 8, 8, seed=seed).numpy())
    (tmp_path / "worker.py").write_text("""
import json, sys
from fid_helpers import TinyInception, measure
from fid.metrics import METRICS
from utils import distributed
distributed.init()
result = measure("samples.npz", "real.npz", embedding=TinyInception(), metrics=tuple(METRICS), batch_size=8, interval=True)
if distributed.is_main():
    json.dump(result, open(f"{distributed.world_size()}.json", "w"))
distributed.shutdown()
""")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "worker.py"],
                   cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "3.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have: the number of threads changes the order of the features' float32 sums
    try:
        alone = measure(tmp_path / "samples.npz", tmp_path / "real.npz", embedding=TinyInception(),
                        metrics=tuple(METRICS), batch_size=8, interval=True)
    finally:
        torch.set_num_threads(threads)
    assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-9)
    assert {k: v for k, v in found["interval"].items() if k != "of"} == pytest.approx(
        {k: v for k, v in alone["interval"].items() if k != "of"}, rel=1e-9)
    assert found["settings"]["num_images"] == 45 and found["settings"]["reference"]["num_images"] == 38


def calc(launcher, folder, name, *options):
    """`python -m fid calc`, or with a launcher before it, as a user types it; returns the result as JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launcher, "-m", "fid", "calc", "--images", folder / "samples.npz", "--ref", folder / "real.npz",
                           "--batch", "4", "--json", folder / name, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name).read_text())


def assert_equal_under_torchrun(folder, *options):
    """The result of `torchrun --nproc_per_node 2 -m fid calc ...` is that of one process, number by number to 1e-9."""
    one = calc((), folder, "one.json", *options)
    both = calc(("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), folder, "both.json", *options)
    assert both["numbers"] == pytest.approx(one["numbers"], rel=1e-9)
    assert both["settings"] == one["settings"]
    return one


def test_torchrun_command_gives_the_numbers_of_one_process(tmp_path):
    for name, num, seed in (("samples", 45, 1), ("real", 38, 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(num, 8, 8, seed=seed).numpy())
    result = assert_equal_under_torchrun(tmp_path, "--embedding", "pixels", "--metrics", "fid,precision,recall,kid", "--interval")
    assert set(result["numbers"]) == {"FD-pixels", "precision-pixels", "recall-pixels", "KD-pixels", "KD-pixels_std"}


@pytest.mark.slow
def test_torchrun_command_with_a_real_network(tmp_path):
    torch.save(random_inception(), tmp_path / "weights.pth")
    for name, num, seed in (("samples", 13, 1), ("real", 10, 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(num, 32, 32, seed=seed).numpy())
    result = assert_equal_under_torchrun(tmp_path, "--weights", tmp_path / "weights.pth")
    assert set(result["numbers"]) == {"FID", "sFID", "IS", "precision", "recall"}


def test_user_errors_are_one_line_and_code_2(run, capsys):
    np.savez("samples.npz", arr_0=np.zeros((4, 3, 8, 8), np.uint8))
    with pytest.raises(SystemExit) as ended:
        script.run(lambda: run("calc", "--images", "samples.npz", "--ref", "real.npz"))
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ") and "NCHW" in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_whole_command_with_a_real_network(tmp_path):
    torch.save(random_inception(), tmp_path / "weights.pth")
    np.savez(tmp_path / "samples.npz", arr_0=random_images(6, 32, 32, seed=1).numpy())
    np.savez(tmp_path / "real.npz", arr_0=random_images(5, 32, 32, seed=2).numpy())
    done = subprocess.run([sys.executable, "-m", "fid", tmp_path / "real.npz", tmp_path / "samples.npz", "--weights",
                           tmp_path / "weights.pth"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("FID", "sFID", "IS", "precision", "recall", "too few", "not the published ones"))


@pytest.mark.parametrize("options, message", [
    (("--seed", -1), "--seed is -1, wanted at least 0"),
    (("--json", "folder"), "--json folder is a folder"),
    (("--json", "samples.npz/out.json"), "--json samples.npz/out.json: its folder samples.npz is a file"),
    (("--neighbours", "folder"), "--neighbours folder is a folder"),
    (("--interval",), "interval: 30 samples, wanted at least 40"),
    (("--num", 3), "precision: 3 samples, wanted at least 4"),
    (("--num", 1, "--metrics", "fid"), "fid: 1 samples, wanted at least 2"),
    (("--ref", "three.npz"), "precision: 3 reference images in three.npz, wanted at least 4"),
])
def test_what_cannot_end_well_is_told_before_any_work(run, monkeypatch, options, message):
    monkeypatch.setattr(FeatureStream, "add_source", lambda *args: pytest.fail("work began"))
    Path("folder").mkdir()
    np.savez("three.npz", arr_0=random_images(3, 8, 8).numpy())
    with pytest.raises(ValueError, match=message):
        run("calc", "--images", "samples.npz", "--ref", "real.npz", *options)


@pytest.mark.parametrize("dest, message", [
    ("real.npz", "--dest real.npz is the data set itself"),
    ("out/ref", "--dest out/ref has to end with .npz"),
    ("folder.npz", "--dest folder.npz is a folder"),
    ("samples.npz/ref.npz", "its folder samples.npz is a file"),
])
def test_places_where_a_reference_cannot_go_are_told_before_any_work(run, monkeypatch, dest, message):
    monkeypatch.setattr(FeatureStream, "add_source", lambda *args: pytest.fail("work began"))
    Path("folder.npz").mkdir()
    before = Path("real.npz").read_bytes()
    with pytest.raises(ValueError, match=message):
        run("ref", "--data", "real.npz", "--dest", dest)
    assert Path("real.npz").read_bytes() == before


@pytest.mark.parametrize("command, message", [
    (("ref", "--data", "real.npz", "--dest", "out/ref.npz"), "out/ref.npz cannot be written .No space left on device."),
    (("calc", "--images", "samples.npz", "--ref", "real.npz", "--metrics", "fid", "--json", "out/a.json"), "out/a.json cannot be written .No sp"),
    (("calc", "--images", "samples.npz", "--ref", "real.npz", "--metrics", "fid", "--neighbours", "out/n.png"), "out/n.png cannot be written .N"),
])
def test_full_disk_is_one_line_and_leaves_the_old_file(run, monkeypatch, command, message):
    """Every write of the temporary file ends as on a full disk; the file of an earlier run stays as it was."""
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path = Path(command[-1])
    path.parent.mkdir()
    path.write_text("of an earlier run")
    for module, name in ((np, "savez"), (Path, "write_text"), (Image.Image, "save")):
        monkeypatch.setattr(module, name, full)
    with pytest.raises(UserError, match=message) as caught:
        run(*command)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "of an earlier run" and [file.name for file in path.parent.iterdir()] == [path.name]


def test_keep_beyond_the_set_is_told_as_keep_before_any_work(run, monkeypatch):
    monkeypatch.setattr(FeatureStream, "add_source", lambda *args: pytest.fail("work began"))
    with pytest.raises(UserError, match="real.npz: --keep asks for 41 images, it has 40; give 1 to 40"):
        run("ref", "--data", "real.npz", "--dest", "ref.npz", "--keep", 41)
    with pytest.raises(UserError, match="real.npz: --num asks for 0 images"):
        run("ref", "--data", "real.npz", "--dest", "ref.npz", "--num", 0)
    with pytest.raises(UserError, match="real.npz: 1 images, a covariance needs at least 2"):
        run("ref", "--data", "real.npz", "--dest", "ref.npz", "--num", 1)


def test_kept_images_are_a_random_choice_in_file_order(run):
    run("ref", "--data", "real.npz", "--dest", "ref.npz", "--keep", 15, "--seed", 3)
    real, kept = (np.load(name)["arr_0"] for name in ("real.npz", "ref.npz"))
    places = [int(np.flatnonzero((real == image).all((1, 2, 3)))[0]) for image in kept]
    assert len(places) == 15 and places == sorted(set(places)) and places != list(range(15))
