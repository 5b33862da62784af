"""What the benchmarks share: the memory that an arm needs, checks before the work, reports. And one toy run of each comparison."""

import json
from types import SimpleNamespace

import pytest
import torch
from pytest import approx

from benchmarks import common, fid, sample, train, update
from benchmarks.common import alternate, watch_memory
from utils.cli import UserError

TINY = ["model.in_size=8", "model.depth=1", "model.width=32", "model.num_heads=2", "model.decoder_depth=1", "model.decoder_width=32",
        "model.decoder_num_heads=2"]

MIB = 2**20
CPU = torch.device("cpu")


def test_memory_is_what_lives_at_once_and_what_stays():
    stays = []

    def run():
        first = torch.zeros(MIB, dtype=torch.uint8)
        stays.append(first + 1)  # 2 MiB at once
        del first
        torch.zeros(MIB // 2, dtype=torch.uint8)
        return "done"

    assert watch_memory(run, CPU) == ("done", approx(2 * MIB, abs=100), MIB)  # the 1 is a tensor too for a moment
    assert watch_memory(stays.clear, CPU)[1:] == (0, -MIB)
    assert watch_memory(lambda: None, CPU) == (None, 0, 0)


def test_an_arms_memory_counts_what_its_first_call_left():
    """As AdamW's moments: made at the end of the first step, there from the beginning of the second."""
    moments = []

    def step():
        activations = torch.zeros(4 * MIB, dtype=torch.uint8)
        del activations
        if not moments:
            moments.append(torch.zeros(MIB, dtype=torch.uint8))

    args = SimpleNamespace(warmup=2, rounds=1, threads=1)
    assert alternate({"step": step}, args, CPU, memory=True)["step"]["peak_bytes"] == 5 * MIB
    assert alternate({"step": step}, args, CPU)["step"]["peak_bytes"] is None  # not asked for
    assert alternate({"step": step}, SimpleNamespace(warmup=1, rounds=1, threads=1), CPU, memory=True)["step"]["peak_bytes"] is None


def test_arms_take_turns_and_the_warm_up_is_not_counted():
    order = []
    measured = alternate({name: lambda name=name: order.append(name) for name in "ab"}, SimpleNamespace(warmup=1, rounds=2, threads=1), CPU)
    assert order == list("ababab")
    assert [len(entry["seconds"]) for entry in measured.values()] == [2, 2]


def run_toy(module, monkeypatch, tmp_path, *arguments, settings=("--set", *TINY)):
    """The report of one toy run of a benchmark."""
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--json", str(tmp_path / "new/report.json"), *settings])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would stay for the other tests
    monkeypatch.setattr("utils.precision.setup_backends", lambda *arguments, **options: None)
    module.main()
    return json.loads((tmp_path / "new/report.json").read_text())


def test_training_steps_are_compared_with_the_plain_one(monkeypatch, tmp_path):
    report = run_toy(train, monkeypatch, tmp_path, *"--arms plain ours dit --batchsize 2 --rounds 1 --amp no".split())
    assert {"device", "torch", "python", "commit", "command", "threads"} < report.keys() and "--arms plain ours dit" in report["command"]
    assert [(row["batch"], row["arm"]) for row in report["rows"]] == [(2, arm) for arm in ("plain", "ours", "dit")]
    for row in report["rows"]:
        assert row["ms"]["lowest"] > 0 and row["GB"] > 0 and row["config"]["model"]["use_decoder"] is (row["arm"] != "dit")
        assert row["masked"] == (0.0 if row["arm"] == "dit" else 0.5)
        assert (row["x plain"] is None) is (row["arm"] == "plain")


@pytest.mark.parametrize("settings, wanted", [([], (True, True)), (["train.deterministic=false", "train.tf32=false"], (False, False))])
def test_steps_are_measured_as_training_runs_them(monkeypatch, settings, wanted):
    """Switches are those of the config: deterministic kernels by default, as in training. The compiler is told too."""
    monkeypatch.setattr("sys.argv", ["train", "--set", *TINY, *settings])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(train, "compare", lambda *arguments: None)
    set_to = []
    monkeypatch.setattr("utils.precision.setup_backends", lambda *arguments, compiled: set_to.append((*arguments, compiled)))
    train.main()
    assert set_to == [(*wanted, True)]


def test_fid_is_compared_with_pytorch_fid_on_the_device_that_is_asked_for(monkeypatch, tmp_path):
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", None)  # put back after the benchmark has replaced it
    report = run_toy(fid, monkeypatch, tmp_path, *"--device cpu --batch 1 --side 32 --rounds 1 --warmup 0".split(), settings=())
    assert [row["side"] for row in report["rows"]] == ["fid", "pytorch-fid"] and report["device"].startswith("CPU")


def test_sampling_is_compared_with_the_plain_one(monkeypatch, tmp_path):
    report = run_toy(sample, monkeypatch, tmp_path, *"--arms plain ours interval --num_steps 2 --rounds 1 --amp no".split())
    assert [row["arm"] for row in report["rows"]] == ["plain", "ours", "interval"]


def test_network_calls_of_heun_with_guidance():
    """4 noise levels, of which the first is visited once; each visit costs two passes within the interval, 80 > sigma > 0.002."""
    def flops(arm, *arguments):
        args = sample.parse_arguments([*arguments, "--amp", "no", "--set", *TINY])
        return sample.image_flops(sample.arm_config(args, arm))

    one = flops("ours", "--num_steps", "1", "--cfg_scale", "1")
    assert flops("ours", "--num_steps", "4") == 14 * one  # (4 + 3) visits
    assert one * 7 < flops("interval", "--num_steps", "4") < 14 * one


def test_updates_and_checkpoints_are_measured(monkeypatch, tmp_path):
    report = run_toy(update, monkeypatch, tmp_path, "--batchsize", "1", "--rounds", "1", "--warmup", "0")
    assert [row["what"] for row in report["rows"]] == ["AdamW, plain", "AdamW", "EMA, plain", "EMA", "step", "copy", "step beside", "rest"]


@pytest.mark.parametrize("arguments, message", [(["--rounds", "0"], "--rounds 0: wanted 1 or more"), (["--threads", "0"], "--threads 0"),
                                                (["--device", "tpu"], "--device tpu: wanted cpu or"),
                                                (["--json", "FILE/report.json"], "--json .*FILE is a file")])
def test_wrong_arguments_are_told_before_any_work(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    with pytest.raises(UserError, match=message):
        common.start(common.make_parser("text", rounds=1).parse_args(arguments))


def test_a_wrong_setting_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", "--set", "model.depth=none"])
    monkeypatch.setattr(train, "start", None)
    with pytest.raises(UserError, match="model.depth"):
        train.main()


def test_random_latents_are_a_set_that_training_reads(tmp_path):
    from dataset.formats import open_latents

    moments, labels = common.write_random_latents(tmp_path / "set", 5, (8, 6, 6), "float32", 3)
    latents = open_latents(tmp_path / "set", num_classes=3)
    stored, stored_labels = latents.read([4, 0])
    assert len(latents) == 5 and latents.sample_shape == (8, 6, 6)
    assert (stored == moments[[4, 0]]).all() and (stored_labels == labels[[4, 0]]).all()
