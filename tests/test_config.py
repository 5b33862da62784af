"""The config schema: what is wrong is found at once, and everything that can be set is read by somebody."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from utils.config import Config, SpeedUp, from_dict, load_config, to_dict, to_yaml

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {section.name: section.type for section in dataclasses.fields(Config)}


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("override, nearest", [
    ("train.batch_size=4", "did you mean 'train.batchsize'?"),
    ("train.learning_rate=1", "'train."),
    ("trian.lr=1", "did you mean 'train'?"),
    ("train.cfg_scale=2", "did you mean 'sample.cfg_scale'?"),
    ("modle.in_size=8", "did you mean 'model'?"),
    ("zzz=1", "the sections are model, data, vae, train, sample, eval, log"),
])
def test_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(ValueError, match="unknown key") as refusal:
        load_config(None, [override])
    assert nearest in str(refusal.value)


def test_unknown_key_in_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'train.batch_size'; did you mean 'train.batchsize'"):
        load_config(write(tmp_path, "train:\n  batch_size: 4\n"))


@pytest.mark.parametrize("override, wanted", [
    ("train.batchsize=1.5", "train.batchsize=1.5: wanted a whole number, got float"),
    ("train.batchsize=true", "train.batchsize=True: wanted a whole number, got bool"),
    ("train.batchsize=null", "train.batchsize=None: wanted a whole number"),
    ("train.lr=fast", "train.lr='fast': wanted a number, got str"),
    ("train.compile=1", "train.compile=1: wanted one of auto, true, false"),
    ("train.compile=gpu", "train.compile='gpu': wanted one of auto, true, false"),
    ("train.compile=null", "train.compile=None: wanted one of auto, true, false"),
    ("sample.compile=auto", "sample.compile='auto': wanted true or false, got str"),
    ("data.root=[1]", "data.root=[1]: wanted text, got list"),
    ("train.betas=[0.9]", "train.betas=[0.9]: wanted a list of 2 numbers"),
    ("train.betas=0.9", "train.betas=0.9: wanted a list of 2 numbers"),
    ("train.switch_off=fused_adamw", "train.switch_off='fused_adamw': wanted a list, as in train.switch_off=[embed_kept]"),
    ("train.switch_off=[fused_adamw,warp]", "train.switch_off='warp': wanted one of embed_kept, shuffled_decoder, product_attention"),
    ("train=5", "train=5 is a section; set its keys"),
    ("--lr", "argument '--lr' is not understood"),
])
def test_wrong_types_name_key_value_and_what_is_wanted(override, wanted):
    with pytest.raises(ValueError) as refusal:
        load_config(None, [override])
    assert wanted in str(refusal.value)


@pytest.mark.parametrize("overrides, wanted", [
    (["train.batchsize=100", "train.grad_accum=8"], "train.batchsize=100 must be divisible by train.grad_accum=8; try 96 or 104"),
    (["train.batchsize=0"], "train.batchsize=0 must be above 0"),
    (["train.weight_decay=-1"], "train.weight_decay=-1.0 must not be negative"),
    (["train.mask_ratio=1"], "train.mask_ratio=1.0 must be at least 0 and below 1"),
    (["train.mask_ratio=0.2", "train.mask_ratio_min=0.3"], "train.mask_ratio_min=0.3 is above train.mask_ratio=0.2"),
    (["model.use_decoder=false"], "train.mask_ratio=0.5 needs the decoder"),
    (["train.token_multiple=0"], "train.token_multiple=0 must be above 0"),
    (["train.cuda_graphs=true"], "set train.compile=true too"),
    (["train.cuda_graphs=true", "train.compile=false"], "set train.compile=true too"),
    (["train.cuda_graphs=true", "train.compile=true", "train.mask_ratio_fn=cosine4"], "set train.token_multiple=16"),
    (["train.cuda_graphs=true", "train.compile=true", "train.grad_accum=2"], "set train.grad_accum=1"),
    (["train.mask_ratio_fn=cos7"], "train.mask_ratio_fn='cos7': wanted one of constant, linear, exp, cosine2"),
    (["train.amp=fp8"], "train.amp='fp8': wanted one of fp16, bf16, no"),
    (["model.num_classes=0", "sample.cfg_scale=2"], "sample.cfg_scale=2.0 needs classes"),
    (["sample.cfg_interval=[2,1]"], "sample.cfg_interval=[2.0, 1.0]: wanted [sigma_lo, sigma_hi]"),
    (["eval.every=10"], "eval.every=10 needs eval.ref_path"),
    (["log.exp_name=a/b"], "log.exp_name='a/b' is a name, not a path"),
    (["data.resolution=100"], "data.resolution=100 must be a multiple of 8"),
])
def test_impossible_combinations_are_refused(overrides, wanted):
    with pytest.raises(ValueError) as refusal:
        load_config(None, overrides)
    assert wanted in str(refusal.value)


def test_overrides_win_over_the_file_and_the_file_over_the_base(tmp_path):
    base = load_config(None, ["train.lr=1", "train.batchsize=2", "train.seed=3"])
    config = load_config(write(tmp_path, "train:\n  lr: 10\n  batchsize: 20\n"), ["train.lr=100"], base)
    assert (config.train.lr, config.train.batchsize, config.train.seed) == (100.0, 20, 3)


def test_values_are_read_as_meant(tmp_path):
    config = load_config(write(tmp_path, "train:\n  amp: no\n  lr: 1e-4\n  betas: [0.8, 1]\nmodel:\n  depth: null\nlog:\n  exp_name: 7\n"),
                         ["sample.S_max=inf", "train.warmup_images=5"])
    assert config.train.amp == "no" and config.train.lr == 1e-4 and config.train.betas == (0.8, 1.0)
    assert [load_config(None, [f"train.compile={word}"]).train.compile for word in ("auto", "true", "false", "True")] == ["auto", True, False, True]
    assert load_config().train.compile == "auto" and load_config(write(tmp_path, "train: {compile: off}")).train.compile is False
    assert config.model.depth is None and config.log.exp_name == "7" and config.sample.S_max == float("inf")


def test_round_trips(tmp_path):
    config = load_config(None, ["train.betas=[0.1,0.2]", "sample.cfg_interval=[0.1,2]", "model.depth=3", "data.root=/a b/c"])
    assert from_dict(to_dict(config)) == config
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("content, wanted", [("- 1\n", "wanted sections"), ("a: [", "not valid YAML"), ("train: ${nothing}\n", "run.yaml")])
def test_files_that_are_no_config_are_refused(tmp_path, content, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_config(write(tmp_path, content))


def test_missing_file_names_one_that_is_there(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ValueError, match="no such file; there is .*run.yaml"):
        load_config(tmp_path / "runn.yaml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_load(path):
    load_config(path)


def test_every_key_is_read_outside_the_schema():
    """A key is read where an attribute of its name is taken, or named in a function that uses getattr."""
    files = [path for folder in ("", "utils", "dataset", "models", "fid", "sampling", "training") for path in (ROOT / folder).glob("*.py") if path.name != "config.py"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    for function in nodes:
        inside = list(ast.walk(function)) if isinstance(function, ast.FunctionDef) else []
        if any(isinstance(node, ast.Name) and node.id == "getattr" for node in inside):
            read |= {node.value for node in inside if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    asked = {node.args[0].value for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "uses"}
    assert asked == set(typing.get_args(SpeedUp))  # TrainConfig.uses(name) is how switch_off is read
    keys = {f"{name}.{key.name}": key.name for name, section in SECTIONS.items() for key in dataclasses.fields(section)}
    keys.pop("train.switch_off")
    assert [full for full, name in keys.items() if name not in read] == []


def test_defaults_are_a_valid_config_that_nothing_writes_to():
    config = Config()
    assert from_dict(to_dict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1
