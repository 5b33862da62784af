"""Reading checkpoints: checked before use, never executed; weights into networks."""

import argparse
import pickle
import random
from collections import OrderedDict

import pytest
import torch

import models
from models.layers import sincos_positions
from sampling.load import (checkpoint_digest, file_sha256, fit_decoder, load_checkpoint, load_net, load_weights_into, prepare_network,
                           read_checkpoint, steps_done, strip_prefixes, weights_of)
from training.checkpoint import write_checkpoint
from utils.cli import UserError
from utils.config import load_config, model_arguments, to_dict

SIZES = dict(in_channels=4, depth=1, width=16, num_heads=2, decoder_depth=1, decoder_width=16, decoder_num_heads=2)


def load_weights(path, which="ema"):
    return weights_of(load_checkpoint(path), which, path)


def state(step, size=500):
    random_numbers = torch.Generator().manual_seed(step)
    weights = {"model.w": torch.randn(size, generator=random_numbers), "model.b": torch.randn(3, generator=random_numbers)}
    return {"model": weights, "ema": {name: value / 2 for name, value in weights.items()}, "step": step, "images_seen": 4 * step}


# ------------------------------------------------------------------------------------------------ the published format

def published(path, prefix="module._orig_mod.", **extra):
    content = state(3)
    weights = {which: {prefix + name: value for name, value in content[which].items()} for which in ("model", "ema")}
    torch.save({**weights, "opt": {"state": {0: {"step": torch.tensor(2000000.0)}}, "param_groups": []},
                "args": argparse.Namespace(lr=1e-4, ema_decay=0.9999), **extra}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_published_files_load_under_plain_names(tmp_path, prefix):
    path = published(tmp_path / "best_with_guidance.pt", prefix)
    for which in ("ema", "model"):
        weights = load_weights(path, which)
        assert weights.keys() == {"model.w", "model.b"} and torch.equal(weights["model.w"], state(3)[which]["model.w"])
    assert steps_done(load_checkpoint(path)) == 2_000_000  # counted by AdamW, not parsed from the file's name


def test_plain_state_dict_and_safetensors_load(tmp_path):
    from safetensors.torch import save_file
    weights = state(1)["model"]
    torch.save(OrderedDict(weights), tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        assert torch.equal(load_weights(tmp_path / name)["model.w"], weights["model.w"])


def test_old_torch_format_loads(tmp_path):
    torch.save(state(1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_weights(tmp_path / "old.pt", "model")["model.w"], state(1)["model"]["model.w"])


def test_only_leading_wrapper_prefixes_are_stripped():
    assert strip_prefixes("module._orig_mod.module.model.module.w") == "model.module.w"


# ------------------------------------------------------------------------------------------------ refusals

class Trap:
    """Unpickled by plain pickle, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def traps(sprung):
    """Files that execute something when they are trusted, as (name, writer)."""
    class Local(torch.nn.Module):
        pass

    yield "trap-in-zip.pt", lambda path: torch.save({"model": {"a": torch.ones(2)}, "args": Trap(sprung)}, path)
    yield "trap-old-format.pt", lambda path: torch.save({"ema": Trap(sprung)}, path, _use_new_zipfile_serialization=False)
    yield "trap-pickle.pt", lambda path: path.write_bytes(pickle.dumps({"ema": Trap(sprung)}))
    yield "trap-bare.pt", lambda path: path.write_bytes(b"cos\nsystem\n(S'touch " + str(sprung).encode() + b"'\ntR.")
    yield "trap-eval.pt", lambda path: path.write_bytes(f"c__builtin__\neval\n(S'open({str(sprung)!r}, \"w\")'\ntR.".encode())
    yield "module.pt", lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path)
    yield "path.pt", lambda path: torch.save({"args": path}, path)
    yield "module-bare.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path)


def wrong_types():
    """Contents of the right format but the wrong kind, as (name, object)."""
    tensor = torch.ones(2)
    yield from {"list": [1, 2], "tensor": tensor, "text": "weights", "none": None, "number": 7, "empty": {}, "model-list": {"model": [tensor]},
                "ema-none": {"ema": None}, "ema-text": {"ema": "x"}, "ema-numbers": {"ema": {"a": 1.0}}, "mixed": {"ema": {"a": tensor, "b": 3}},
                "opt-list": {"ema": {"a": tensor}, "opt": []},
                "step-text": {"ema": {"a": tensor}, "step": "12"}, "step-tensor": {"ema": {"a": tensor}, "step": tensor},
                "no-ema": {"model": {"a": tensor}}, "config": {"ema": {"a": tensor}, "config": []}, "args-only": {"args": argparse.Namespace(a=1)},
                "latents": {"ema": {"a": tensor}, "latents": 0.5}, "nested": {"ema": {"a": {"b": tensor}}}, "numbers-as-names": {"ema": {1: tensor}}}.items()


def junk(dice):
    yield "empty", b""
    yield "zeros", bytes(1000)
    yield "text", b"hello, I am not a checkpoint\n" * 9
    yield "html", b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"
    yield "gzip", b"\x1f\x8b\x08\x00" + dice.randbytes(200)
    yield "zip-magic", b"PK\x03\x04" + dice.randbytes(300)
    yield "empty-zip", b"PK\x05\x06" + bytes(18)
    for i in range(12):
        yield f"noise-{i}", dice.randbytes(dice.randint(1, 3000))


def test_200_damaged_or_hostile_files_are_refused_and_none_is_executed(tmp_path, monkeypatch):
    """A clear ValueError with the path each time. With a manifest every flipped bit is found; without one, those that matter."""
    dice, sprung = random.Random(0), tmp_path / "sprung"
    good = tmp_path / "0000003.pt"
    write_checkpoint(good, state(3))
    whole, manifest = good.read_bytes(), (tmp_path / "0000003.json").read_bytes()
    count = 0

    def refuse(path):
        nonlocal count
        count += 1
        with pytest.raises(ValueError) as refusal:
            load_weights(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value), path.name
        assert not sprung.exists(), path.name

    for name, write in traps(sprung):
        write(tmp_path / name)
        refuse(tmp_path / name)
    for name, content in wrong_types():
        torch.save(content, tmp_path / f"type-{name}.pt")
        refuse(tmp_path / f"type-{name}.pt")
    for name, content in junk(dice):
        (tmp_path / f"junk-{name}.pt").write_bytes(content)
        refuse(tmp_path / f"junk-{name}.pt")
    for i in range(60):
        path = tmp_path / f"cut-{i}.pt"
        path.write_bytes(whole[:dice.randrange(len(whole))])
        refuse(path)
    for i in range(60):
        content = bytearray(whole)
        for _ in range(dice.choice((1, 1, 8))):
            content[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path = tmp_path / f"flipped-{i}.pt"
        path.write_bytes(content)
        path.with_suffix(".json").write_bytes(manifest)
        refuse(path)
    for i, content in enumerate((b"", b"[]", b"{}", b'{"size": "x", "sha256": 1}', b"\xff\xfe", manifest[:40], b"5")):
        path = tmp_path / f"manifest-{i}.pt"
        path.write_bytes(whole)
        path.with_suffix(".json").write_bytes(content)
        refuse(path)
    for name in ("cut", "flipped"):
        path = tmp_path / f"{name}.safetensors"
        from safetensors.torch import save_file
        save_file(state(1)["model"], path)
        content = path.read_bytes()
        path.write_bytes(content[:-9] if name == "cut" else bytes([content[0] ^ 255]) + content[1:])
        refuse(path)
    for i in range(25):  # without a manifest: a flip is refused, or lies where nothing is read
        content = bytearray(whole)
        content[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path = tmp_path / f"unlisted-{i}.pt"
        path.write_bytes(content)
        count += 1
        try:
            weights = load_weights(path)
        except ValueError as refusal:
            assert str(path) in str(refusal)
        else:
            assert all(torch.equal(value, state(3)["ema"][name]) for name, value in weights.items()) and len(weights) == 2
    assert count >= 200
    assert good.read_bytes() == whole and load_weights(good)["model.w"].shape == (500,)


def test_refusal_names_the_class(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"is refused: it contains torch.nn.modules.linear.Linear; only tensors, plain containers and "
                                         r"argparse.Namespace are accepted, and nothing was executed"):
        load_checkpoint(tmp_path / "module.pt")


def test_missing_file_and_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        load_weights(tmp_path / "nowhere.pt")
    torch.save({"model": {"a": torch.ones(1)}, "opt": {}}, tmp_path / "no_ema.pt")
    with pytest.raises(ValueError, match="no_ema.pt has no 'ema' weights; it has model, opt"):
        load_weights(tmp_path / "no_ema.pt")


def mapped(path):
    """Whether this process has the file mapped into memory."""
    return str(path) in open("/proc/self/maps").read()


def test_tensors_are_mapped_from_the_file_and_not_read_into_memory(tmp_path):
    path = tmp_path / "0000003.pt"
    write_checkpoint(path, state(3))
    content = read_checkpoint(path)
    assert mapped(path) and torch.equal(content["ema"]["model.w"], state(3)["ema"]["model.w"])
    del content
    assert not mapped(path)


def test_a_file_of_the_oldest_form_is_read_too(tmp_path):
    torch.save(state(3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_weights(tmp_path / "old.pt")["model.w"], state(3)["ema"]["model.w"])


# ------------------------------------------------------------------------------------------------ into another model

def test_misfits_are_listed_by_name_and_skipped_by_flag(tmp_path, capsys):
    torch.manual_seed(0)
    old, new = (models.build_model("DiT-S/2", in_size=8, num_classes=classes, **SIZES) for classes in (10, 7))
    weights = {**old.state_dict(), "model.extra": torch.ones(1)}
    del weights["model.mask_token"]
    table = new.model.y_embedder.embedding_table.weight.detach().clone()
    with pytest.raises(ValueError) as refusal:
        load_weights_into(new, weights, "old.pt")
    for words in ("old.pt does not fit the model", "missing: model.mask_token", "unknown: model.extra",
                  "other shape: model.y_embedder.embedding_table.weight (16, 10), wanted (16, 7)", "; check the model section"):
        assert words in str(refusal.value)
    load_weights_into(new, weights, "old.pt", skip_mismatched=True)
    assert "left at fresh values or out; missing: model.mask_token" in capsys.readouterr().out
    assert torch.equal(new.model.y_embedder.embedding_table.weight, table)
    assert torch.equal(new.model.blocks[0].attn.qkv.weight, old.model.blocks[0].attn.qkv.weight)


def test_nothing_that_fits_is_refused_also_with_the_flag():
    net = models.build_model("DiT-S/2", in_size=8, num_classes=10, **SIZES)
    with pytest.raises(ValueError, match="has nothing that fits the model; missing: "):
        load_weights_into(net, {"other.w": torch.ones(1)}, "other.pt", skip_mismatched=True)


def test_positions_of_another_resolution_are_interpolated(capsys):
    """Of two times as many patches, those at odd and even places lie a quarter of an old patch before and behind its centre."""
    old, new = (models.build_model("DiT-S/2", in_size=size, num_classes=10, **SIZES) for size in (8, 16))
    with pytest.raises(ValueError, match=r"model.pos_embed \(1, 16, 16\), wanted \(1, 64, 16\)"):
        load_weights_into(new, old.state_dict(), "old.pt")
    load_weights_into(new, old.state_dict(), "old.pt", skip_mismatched=True)
    assert "model.pos_embed is interpolated from 4 x 4 to 8 x 8 patches" in capsys.readouterr().out
    table = new.model.pos_embed.detach()
    assert torch.equal(table, sincos_positions(16, 8, unit_grid=4)) and not table.requires_grad
    columns = torch.asin(table[0, :3, 0])  # the first sine has frequency 1: its angle is the column in old patches
    torch.testing.assert_close(columns, torch.tensor([-0.25, 0.25, 0.75]), atol=1e-5, rtol=0)
    old_table = old.model.pos_embed.detach()[0]
    neighbours = torch.cdist(table[0], old_table).argmin(dim=1).reshape(8, 8)
    wanted = torch.arange(16).reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(neighbours, wanted)  # each new patch is nearest to the old one that it lies in


# ------------------------------------------------------------------------------------------------ networks

def saved_net(path, config=(), **extra):
    """A checkpoint of a tiny network with its config; returns the network."""
    settings = load_config(None, ["model.model_type=DiT-S/2", "model.in_size=8", "model.num_classes=3", *(f"model.{key}={value}" for key, value
                                                                                                       in SIZES.items())])
    net = models.build_model(**model_arguments(settings))
    values = to_dict(settings)
    for key, value in config:
        section, name = key.split(".")
        values[section][name] = value
    average = {name: value / 2 for name, value in net.state_dict().items()}
    write_checkpoint(path, {"model": net.state_dict(), "ema": average, "config": values, **extra})
    return net


def test_network_comes_with_its_config_and_what_its_checkpoint_says(tmp_path):
    path = tmp_path / "0000001.pt"
    saved = saved_net(path, class_names=["a", "b", "c"], latents={"scale": 0.5, "shift": 0.0, "vae": ""})
    net, config, class_names, latents = load_net(path, "ema", None, ["sample.num_steps=7"], torch.device("cpu"))
    assert config.model.depth == 1 and config.sample.num_steps == 7 and class_names == ["a", "b", "c"] and latents["scale"] == 0.5
    assert all(torch.equal(value, saved.state_dict()[name] / 2) for name, value in net.state_dict().items())
    raw = load_net(path, "model", None, [], torch.device("cpu"))[0]
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in raw.state_dict().items())
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    assert not mapped(path)  # the network keeps copies
    half, config, *_ = load_net(path, "ema", None, ["sample.amp=bf16"], torch.device("cpu"))
    prepare_network(half, config.sample, torch.device("cpu"))
    assert half.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def test_compiling_is_said_with_the_wait_to_expect(tmp_path, monkeypatch, capsys):
    saved_net(tmp_path / "0000001.pt")
    monkeypatch.setattr(models.EDMPrecond, "compile_blocks", lambda net: print("begins"))
    net, config, *_ = load_net(tmp_path / "0000001.pt", "ema", None, ["sample.compile=true"], torch.device("cpu"))
    prepare_network(net, config.sample, torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == ["compiling the blocks: about 1 minute on the first batch", "begins"]


def test_a_checkpoint_without_config_asks_for_one_and_takes_it(tmp_path):
    """As the published ones."""
    net = saved_net(tmp_path / "ours.pt")
    torch.save({"ema": net.state_dict()}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match="checkpoint .*theirs.pt carries no config; describe its network with --config"):
        load_net(tmp_path / "theirs.pt", "ema", None, [], torch.device("cpu"))
    sizes = "".join(f"  {key}: {value}\n" for key, value in SIZES.items())
    (tmp_path / "net.yaml").write_text(f"model:\n  model_type: DiT-S/2\n  in_size: 8\n  num_classes: 3\n{sizes}")
    found = load_net(tmp_path / "theirs.pt", "ema", tmp_path / "net.yaml", [], torch.device("cpu"))[0]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_bad_value_in_a_checkpoints_config_names_the_file(tmp_path):
    path = tmp_path / "0000001.pt"
    saved_net(path, config=[("train.lr", -1.0)])
    with pytest.raises(UserError, match="checkpoint .*0000001.pt, in its config: train.lr=-1.0"):
        load_net(path, "ema", None, [], torch.device("cpu"))


def test_keys_of_an_older_version_are_told_once_and_the_checkpoint_is_sampled(tmp_path, capsys):
    path = tmp_path / "0000001.pt"
    saved_net(path, config=[("train.half_gone", True), ("sample.solver_set", "edm"), ("sample.solver", "heun")])
    config = load_net(path, "ema", None, [], torch.device("cpu"))[1]
    assert config.sample.solver == "heun"  # all of them were saved; the edm sampler is the ablation sampler with these choices
    assert capsys.readouterr().out.count("train.half_gone, sample.solver_set") == 1


def test_digest_is_the_manifests_or_the_files_own(tmp_path):
    path = tmp_path / "0000001.pt"
    saved_net(path)
    digest = checkpoint_digest(path)
    path.with_suffix(".json").unlink()
    assert digest == checkpoint_digest(path) == file_sha256(path) and len(digest) == 64


def autoencoder(scale=0.18215, shift=0.0, digest="a" * 16):
    return argparse.Namespace(scale=scale, shift=shift, digest=digest)


def test_latents_of_another_autoencoder_are_refused():
    with pytest.raises(UserError, match="checkpoint x.pt has latents of the autoencoder b{16}, but vae.path=v.pth is a{16}; give the .*--vae"):
        fit_decoder(autoencoder(), {"scale": 0.18215, "shift": 0.0, "vae": "b" * 16}, "checkpoint x.pt", "v.pth")


@pytest.mark.parametrize("latents", [{}, {"scale": None, "shift": None, "vae": ""}, {"scale": 0.1821500062942505, "shift": 0.0, "vae": ""},
                                     {"scale": 0.18215, "shift": 0.0, "vae": "a" * 16}])
def test_the_same_and_what_is_not_known_pass_in_silence(latents, capsys):
    vae = autoencoder()
    fit_decoder(vae, latents, "checkpoint x.pt", "v.pth")
    assert (vae.scale, vae.shift) == pytest.approx((0.18215, 0.0)) and capsys.readouterr().out == ""


@pytest.mark.parametrize("scale, shift", [(0.5, 0.25), ([1.0, 2.0], [0.0, 3.0])])
def test_latents_are_decoded_with_their_own_numbers(scale, shift, capsys):
    """Those that were set by hand (data.scale) for this very autoencoder need no word, those of an unknown one are told once."""
    for digest in ("a" * 16, "", ""):
        vae = autoencoder()
        fit_decoder(vae, {"scale": scale, "shift": shift, "vae": digest}, "checkpoint x.pt", "v.pth")
        assert (vae.scale, vae.shift) == (scale, shift)
        said = capsys.readouterr().out
        if digest:
            assert said == ""
            wanted = [f"checkpoint x.pt has latents of scale {scale} by an unknown autoencoder; they are decoded with that scale, not with "
                      f"the 0.18215 of vae.path=v.pth.", f"latents of shift {shift} by an unknown"]
        else:
            assert all(said.count(words) == 1 for words in wanted)
            wanted = []
    assert said == ""
