"""A new run from the weights of another: ours or a published file, with the optimizer or without, in the same or a new folder."""

import argparse

import pytest
import torch
from training_runs import assert_equal, command_line, metrics, write_latents


@pytest.fixture(scope="module")
def trained(runs, tiny_latents, tmp_path_factory):
    """The last checkpoint, step 6, of a tiny run."""
    results = tmp_path_factory.mktemp("trained")
    codes, said = runs.start(command_line(tiny_latents, results, train__max_num_steps=6, train__mask_ratio_fn="constant"), results / "out.txt")
    assert codes == [0], said
    return results / "run" / "checkpoints" / "0000006.pt"


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """The same as the published code writes it: wrapper prefix, args, an optimizer that counts frozen positions too, no step."""
    ours = torch.load(trained, weights_only=True)
    names = list(ours["model"])
    own_names = [name for name in names if not name.endswith("pos_embed")]
    states = {names.index(own_names[i]): state for i, state in ours["opt"]["state"].items()}
    path = tmp_path_factory.mktemp("published") / "best.pt"
    torch.save({"model": {f"module.{name}": value for name, value in ours["model"].items()}, "ema": ours["ema"],
                "opt": {"state": states, "param_groups": [{**ours["opt"]["param_groups"][0], "params": list(range(len(names)))}]},
                "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def tune(runs, data, folder, checkpoint, *flags, **settings):
    arguments = command_line(data, folder, train__max_num_steps=2, log__log_every=1, **settings)
    return runs.start([*arguments, "--ckpt_path", str(checkpoint), *flags], folder / "out.txt")


@pytest.mark.parametrize("source", ["trained", "published"])
@pytest.mark.parametrize("strict", ["True", "False"])
def test_steps_count_on_in_a_new_folder(runs, tiny_latents, tmp_path, request, source, strict):
    checkpoint = request.getfixturevalue(source)
    codes, said = tune(runs, tiny_latents, tmp_path, checkpoint, "--use_ckpt_path", "False", "--use_strict_load", strict)
    assert codes == [0], said
    assert f"at step 6 ({'weights and optimizer' if strict == 'True' else 'weights only'})" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [7, 8]
    end = torch.load(tmp_path / "run" / "checkpoints" / "0000008.pt", weights_only=True)
    adam_steps = {state["step"].item() for state in end["opt"]["state"].values()}
    assert adam_steps == ({8.0} if strict == "True" else {2.0})


def test_ours_and_the_published_form_of_it_train_alike(runs, tiny_latents, trained, published, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["images_seen"] = 0  # which the published file does not say, so that both begin at the first image
    torch.save(content, tmp_path / "ours.pt")
    ends = []
    for name, checkpoint in (("ours", tmp_path / "ours.pt"), ("theirs", published)):
        codes, said = tune(runs, tiny_latents, tmp_path / name, checkpoint, "--use_ckpt_path", "False")
        assert codes == [0], said
        ends.append(torch.load(tmp_path / name / "run" / "checkpoints" / "0000008.pt", weights_only=True))
    for key in ("model", "ema", "opt", "images_seen"):
        assert_equal(ends[0][key], ends[1][key], key)
    first = content["opt"]["state"][0]["exp_avg_sq"]
    assert not torch.equal(ends[0]["opt"]["state"][0]["exp_avg_sq"], first)  # they did train


def test_ckpt_path_in_its_own_folder_goes_on_there(runs, tiny_latents, tmp_path):
    assert runs.start(command_line(tiny_latents, tmp_path, train__max_num_steps=8), tmp_path / "out.txt")[0] == [0]
    older, elsewhere = tmp_path / "run" / "checkpoints" / "0000004.pt", tmp_path / "weights.pt"
    elsewhere.write_bytes(older.read_bytes())
    codes, said = runs.start([*command_line(tiny_latents, tmp_path, train__max_num_steps=9), "--ckpt_path", str(older)], tmp_path / "out.txt")
    assert codes == [0] and f"{older} is not the newest of its run: 0000008.pt is" in said and "step 8, 32 images seen" in said
    codes, said = tune(runs, tiny_latents, tmp_path, elsewhere)
    assert codes == [2] and "is not in the checkpoints/ folder of a run that could go on" in said and "--use_ckpt_path False" in said


def test_interrupted_tuning_goes_on_by_the_same_command(runs, tiny_latents, trained, tmp_path):
    flags = ("--use_ckpt_path", "False", "--use_strict_load", "False")
    for name, crash in (("calm", None), ("killed", ("step", 2))):
        arguments = [*command_line(tiny_latents, tmp_path / name, train__max_num_steps=4, log__ckpt_every=1), "--ckpt_path", str(trained), *flags]
        if crash:
            runs.start(arguments, tmp_path / "out.txt", crash=crash)
        assert runs.start(arguments, tmp_path / "out.txt")[0] == [0]
    assert metrics(tmp_path / "killed" / "run") == metrics(tmp_path / "calm" / "run")


def test_one_flag_fine_tunes_to_other_classes_and_another_resolution(runs, trained, tmp_path):
    data = write_latents(tmp_path / "set", size=16, num_classes=3)
    codes, said = tune(runs, data, tmp_path, trained, "--finetune", model__in_size=16)  # model.num_classes is still 5
    assert codes == [0], said
    assert "fine-tuning to the 3 classes of" in said and "(weights only)" in said
    assert "model.pos_embed is interpolated from 4 x 4 to 8 x 8 patches" in said
    assert said.count("left at fresh values or out; other shape: model.y_embedder.embedding_table.weight (16, 5), wanted (16, 3)") == 1
    end = torch.load(tmp_path / "run" / "checkpoints" / "0000008.pt", weights_only=True)
    assert end["config"]["model"]["num_classes"] == 3 and end["model"]["model.y_embedder.embedding_table.weight"].shape == (16, 3)


def test_without_the_flag_what_does_not_fit_is_named(runs, trained, tmp_path):
    data = write_latents(tmp_path / "set", size=16, num_classes=3)
    codes, said = tune(runs, data, tmp_path, trained, "--use_ckpt_path", "False", "--use_strict_load", "False", model__in_size=16, model__num_classes=3)
    assert codes == [2]
    for words in ("model.pos_embed (1, 16, 16), wanted (1, 64, 16)", "model.decoder_pos_embed", "embedding_table.weight (16, 5), wanted (16, 3)",
                  "--finetune"):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_flag_without_a_checkpoint_is_refused(runs, tiny_latents, tmp_path):
    codes, said = runs.start([*command_line(tiny_latents, tmp_path), "--finetune"], tmp_path / "out.txt")
    assert codes == [2] and "--finetune needs --ckpt_path" in said
