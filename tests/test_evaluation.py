"""Numbers without files between: training evaluates on its way and stays itself, generate.py measures what it samples."""

import json
import sys

import numpy as np
import pytest
import torch
from training_runs import assert_equal, assert_same_run, command_line, metrics

from models import build_model
from sampling.sample import classes_of
from training.watch import make_evaluate
from utils.config import load_config, model_arguments

EVALUATION = {"eval__every": 5, "eval__embedding": "pixels", "eval__num_images": 7, "eval__num_steps": 2, "sample__batchsize": 3}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An image set of 32 x 32 pixels, which is what `tiny_vae` decodes."""
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    return path


def evaluated(data, vae, reference, folder):
    return command_line(data, folder, vae__path=vae, eval__ref_path=reference, log__tensorboard="true", **EVALUATION)


@pytest.fixture(scope="module")
def trained(runs, tiny_latents, tiny_vae, reference, tmp_path_factory):
    """The folder of a run with evaluation, on one process."""
    results = tmp_path_factory.mktemp("evaluated")
    codes, said = runs.start(evaluated(tiny_latents, tiny_vae, reference, results), results / "out.txt")
    assert codes == [0] and "evaluation of the average at step 12" in said, said
    return results / "run"


# ------------------------------------------------------------------------------------------------ training

@pytest.mark.parametrize("processes", [1, 2])
def test_training_is_the_same_bit_for_bit_with_evaluation_and_without(runs, tiny_latents, tiny_vae, reference, tmp_path, processes):
    arguments = {"with": evaluated(tiny_latents, tiny_vae, reference, tmp_path / "with"),
                 "without": command_line(tiny_latents, tmp_path / "without")}
    for name in arguments:
        codes, said = runs.start(arguments[name], tmp_path / "out.txt", processes)
        assert codes == [0] * processes, said
    for step in ("0000008.pt", "0000012.pt"):
        on, off = (torch.load(tmp_path / name / "run" / "checkpoints" / step, weights_only=True) for name in arguments)
        for key in ("model", "ema", "opt", "stepper"):
            assert_equal(on[key], off[key], f"{step}/{key}")
    losses = [[line["loss"] for line in metrics(tmp_path / name / "run") if "loss" in line] for name in arguments]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_curve_is_in_the_log_and_in_tensorboard_with_its_settings_in_a_file(trained):
    curve = {line["step"]: line["FD-pixels"] for line in metrics(trained) if "FD-pixels" in line}
    assert list(curve) == [5, 10, 12] and len(set(curve.values())) == 3
    for step, number in curve.items():
        result = json.loads((trained / "evaluations" / f"{step:07d}.json").read_text())
        assert result["numbers"] == {"FD-pixels": number}  # the cheap number alone, though the reference could serve more
        assert result["settings"]["num_images"] == 7 and result["settings"]["conversion"] == "floor((x + 1) * 127.5)"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    # TensorBoard keeps float32: 1e-7 relative
    assert {event.step: event.value for event in events.Scalars("FD-pixels")} == pytest.approx(curve, rel=1e-6)


def test_images_with_nan_give_no_number_but_their_count(tiny_vae, reference, tmp_path, capsys):
    config = load_config(None, ["model.model_type=DiT-S/2", "model.in_size=8", "model.num_classes=3", "model.depth=1", "model.width=16",
                                "model.num_heads=2", "model.decoder_depth=1", "model.decoder_width=16", "model.decoder_num_heads=2",
                                f"vae.path={tiny_vae}", "eval.every=1", f"eval.ref_path={reference}", "eval.embedding=pixels",
                                "eval.num_images=7", "eval.num_steps=2", "sample.batchsize=3"])
    net = build_model(**model_arguments(config)).eval()
    torch.nn.init.normal_(net.model.final_layer.linear.weight, generator=torch.Generator().manual_seed(0))
    evaluate = make_evaluate(config, tmp_path, torch.device("cpu"), {})
    assert evaluate(net, 1).keys() == {"FD-pixels"}
    net.model.y_embedder.embedding_table.weight.data[:, 1] = torch.nan
    bad = [seed for seed, index in enumerate(classes_of(range(7), net)) if index == 1]
    for _ in range(2):  # the second time it is read from the file
        assert evaluate(net, 2) == {"nan_images": len(bad)} and 0 < len(bad) < 7
    said = capsys.readouterr().out
    assert said.count(f"WARNING: no evaluation at step 2: {len(bad)} of 7 images have NaN or Inf: seeds {', '.join(map(str, bad))}") == 1


def test_killed_run_with_evaluation_goes_on_as_if_never_stopped(runs, tiny_latents, tiny_vae, reference, trained, tmp_path):
    arguments = evaluated(tiny_latents, tiny_vae, reference, tmp_path)
    runs.start(arguments, tmp_path / "out.txt", crash=("step", 7))  # after an evaluation that no checkpoint has
    codes, said = runs.start(arguments, tmp_path / "out.txt")
    assert codes == [0] and "resuming from" in said
    assert_same_run(tmp_path / "run", trained)


# ------------------------------------------------------------------------------------------------ generate.py and python -m fid

def call_with_tiny_inception(main, arguments):
    """Call the main of generate.py or of `python -m fid` on TinyInception in place of the real network."""
    from fid_helpers import TinyInception

    from fid import embeddings
    embeddings.Inception = lambda weights, device: TinyInception()
    sys.argv = ["command", *arguments]
    main()


def generate(*arguments):
    import generate as script
    call_with_tiny_inception(script.main, arguments)


def calc(*arguments):
    from fid import __main__ as script
    call_with_tiny_inception(script.main, ["calc", *arguments])


def sample(runs, checkpoint, vae, folder, *more, processes=1):
    """generate.py with what training's evaluations had: seeds, steps, batches; returns (metrics.json, what was printed)."""
    arguments = ["--ckpt_path", checkpoint, "--vae", vae, "--seeds", "0-6", "--num_steps", 2, "--batchsize", 3, "--outdir", folder]
    said = runs.call("test_evaluation:generate", [*arguments, *more], folder.parent / "out.txt", processes)
    return json.loads((folder / "metrics.json").read_text()), said


@pytest.mark.parametrize("processes", [1, 2])
def test_generate_finds_the_number_that_training_logged(runs, trained, tiny_vae, reference, tmp_path, processes):
    checkpoint = trained / "checkpoints" / "0000012.pt"
    result, said = sample(runs, checkpoint, tiny_vae, tmp_path / "out", "--format", "none", "--ref_path", reference, processes=processes)
    assert set(result["numbers"]) == {"FD-pixels", "precision-pixels", "recall-pixels"}
    assert result["numbers"]["FD-pixels"] == pytest.approx(metrics(trained)[-1]["FD-pixels"], rel=1e-9)
    assert "not computed: sfid is defined on the inception embedding only" in said and "too few" in said
    sampling = result["settings"]["sampling"]
    assert sampling["ckpt_path"] == str(checkpoint) and sampling["sample.num_steps"] == 2 and sampling["seeds"] == "0-6"
    assert not (tmp_path / "out" / "images").exists()


def test_generate_equals_fid_calc_on_the_images_it_wrote(runs, trained, tiny_vae, reference, tmp_path):
    while_sampling, said = sample(runs, trained / "checkpoints" / "0000012.pt", tiny_vae, tmp_path / "out", "--ref_path", reference,
                                  "eval.embedding=inception")
    measured = runs.call("test_evaluation:calc", ["--images", tmp_path / "out" / "images", "--ref", reference, "--batch", 3,
                                                  "--json", tmp_path / "calc.json"], tmp_path / "calc.txt", 1)
    afterwards = json.loads((tmp_path / "calc.json").read_text())
    assert while_sampling["numbers"].keys() == {"FID", "sFID", "IS", "precision", "recall"}
    # The reference is seen in batches of 64 by one and of 3 by the other, which moves the last bits of float32 features: 3e-9 here.
    assert while_sampling["numbers"] == pytest.approx(afterwards["numbers"], rel=1e-7)
    lines = [line for line in measured.splitlines() if line.split()[0] in afterwards["numbers"]]
    assert len(lines) == 5 and all(line in said for line in lines)  # printed alike
