"""The config schema: what is wrong is found at once, and everything that can be set is read by somebody."""

import argparse
import ast
import dataclasses
import re
from pathlib import Path

import pytest

from utils.cli import UserError
from utils.config import from_dict, load_config, model_arguments, to_dict, to_yaml
from utils.schema import KEYS, Config, ModelConfig, SampleConfig, notes

ROOT = Path(__file__).resolve().parent.parent
CPU = argparse.Namespace(type="cpu")


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("override, nearest", [
    ("train.batch_size=4", "did you mean 'train.batchsize'?"),
    ("train.learning_rate=1", "'train."),
    ("trian.lr=1", "did you mean 'train.lr'?"),
    ("train.cfg_scale=2", "did you mean 'sample.cfg_scale'?"),
    ("modle.in_size=8", "did you mean 'model.in_size'?"),
    ("zzz=1", "the sections are model, data, vae, train, sample, eval, log"),
])
def test_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(UserError, match="unknown key") as refusal:
        load_config(None, [override])
    assert nearest in str(refusal.value)


def test_unknown_key_in_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown key 'train.batch_size'; did you mean 'train.batchsize'"):
        load_config(write(tmp_path, "train:\n  batch_size: 4\n"))


@pytest.mark.parametrize("override, wanted", [
    ("train.batchsize=1.5", "train.batchsize=1.5: wanted a whole number"),
    ("train.batchsize=true", "train.batchsize=True: wanted a whole number"),
    ("train.batchsize=null", "train.batchsize=None: wanted a whole number"),
    ("train.lr=fast", "train.lr='fast': wanted a number"),
    ("train.compile=1", "train.compile=1: wanted one of auto, true, false"),
    ("train.compile=gpu", "train.compile='gpu': wanted one of auto, true, false"),
    ("train.compile=null", "train.compile=None: wanted one of auto, true, false"),
    ("sample.compile=auto", "sample.compile='auto': wanted true or false"),
    ("data.root=[1]", "data.root=[1]: wanted a text"),
    ("train.betas=[0.9]", "train.betas=[0.9]: wanted 2 numbers, as in [0.1,0.9]"),
    ("train.betas=0.9", "train.betas=0.9: wanted 2 numbers, as in [0.1,0.9]"),
    ("train.betas=[a,0.9]", "train.betas=['a', 0.9]: wanted 2 numbers, as in [0.1,0.9]"),
    ("sample.cfg_interval=3", "sample.cfg_interval=3: wanted 2 numbers, as in [0.1,0.9], or null"),
    ("model.depth=deep", "model.depth='deep': wanted a whole number, or null"),
    ("sample.solver=rk4", "sample.solver='rk4': wanted one of euler, heun, or null"),
    ("model.options=5", "model.options=5: wanted keys with values"),
    ("data.scale=big", "data.scale='big': wanted a number, or a list of model.in_channels=4 numbers"),
    ("data.shift=[1,2,3]", "data.shift=[1, 2, 3]: wanted a number, or a list of model.in_channels=4 numbers"),
    ("data.scale=[]", "data.scale=[]: wanted a number"),
    ("train=5", "train=5: this is a section; set its keys, as in train.KEY=5"),
    ("--lr", "argument '--lr' is not understood; see --help (settings look like train.lr=1e-4)"),
    ("train.lr", "argument 'train.lr' is not understood; see --help (settings look"),
    ("sample.num_steps=[", "sample.num_steps=[ cannot be read as YAML"),
    ("data.root=${data.rot}", "data.root: Interpolation key 'data.rot' not found"),
    (f"train.lr=1{'0' * 400}", "wanted a number"),
])
def test_wrong_types_name_key_value_and_what_is_wanted(override, wanted):
    with pytest.raises(UserError) as refusal:
        load_config(None, [override])
    assert wanted in str(refusal.value)


@pytest.mark.parametrize("overrides, wanted", [
    (["train.batchsize=100", "train.grad_accum=8"], "train.batchsize=100 must be divisible by train.grad_accum=8; try 104"),
    (["train.batchsize=0"], "train.batchsize=0 must be above 0"),
    (["train.weight_decay=-1"], "train.weight_decay=-1.0 must be at least 0 and below inf"),
    (["train.lr=nan"], "train.lr=nan must be above 0 and below inf"),
    (["train.lr=inf"], "train.lr=inf must be above 0 and below inf"),
    (["sample.cfg_scale=inf"], "sample.cfg_scale=inf must be above 0 and below inf"),
    (["sample.S_max=nan"], "sample.S_max=nan must be at least 0"),
    (["data.scale=[1,0,1,1]"], "data.scale=[1, 0, 1, 1] must be above 0"),
    (["train.betas=[0.9,1]"], "train.betas=(0.9, 1.0) must be at least 0 and below 1"),
    ([f"train.seed={2**64}"], "train.seed=18446744073709551616 must be at least 0 and below 18446744073709551616"),
    (["train.seed=-1"], "train.seed=-1 must be at least 0 and below 18446744073709551616"),
    (["train.mask_ratio=1"], "train.mask_ratio=1.0 must be at least 0 and below 1"),
    (["model.options.width=3"], "model.options.width hides a key of its own; set model.width"),
    (["sample.options.rho=3"], "sample.options.rho hides a key of its own; set sample.rho"),
    (["train.mask_ratio=0.2", "train.mask_ratio_min=0.3"], "train.mask_ratio_min=0.3 must not be above train.mask_ratio=0.2"),
    (["model.use_decoder=false"], "train.mask_ratio=0.5 needs the decoder"),
    (["train.mask_ratio_fn=cos7"], "train.mask_ratio_fn='cos7': wanted one of constant, linear, exp, cosine2"),
    (["train.amp=fp8"], "train.amp='fp8': wanted one of fp16, bf16, no"),
    (["sample.cfg_interval=[2,1]"], "sample.cfg_interval=(2.0, 1.0): wanted [sigma_lo, sigma_hi]"),
    (["eval.every=10"], "eval.every=10 needs eval.ref_path"),
])
def test_impossible_combinations_are_refused(overrides, wanted):
    with pytest.raises(UserError) as refusal:
        load_config(None, overrides)
    assert wanted in str(refusal.value)


def test_overrides_win_over_the_file_and_the_file_over_the_base(tmp_path):
    base = load_config(None, ["train.lr=1", "train.batchsize=2", "train.seed=3"])
    config = load_config(write(tmp_path, "train:\n  lr: 10\n  batchsize: 20\n"), ["train.lr=100"], base)
    assert (config.train.lr, config.train.batchsize, config.train.seed) == (100.0, 20, 3)


def test_values_are_read_as_meant(tmp_path):
    config = load_config(write(tmp_path, "train:\n  amp: no\n  lr: 1e-4\n  betas: [0.8, 0]\nmodel:\n  depth: null\nlog:\n  exp_name: 7\n"),
                         ["sample.S_max=inf", "train.warmup_images=5"])
    assert config.train.amp == "no" and config.train.lr == 1e-4 and config.train.betas == (0.8, 0.0)
    compile_modes = [load_config(None, [f"train.compile={word}"]).train.compile for word in ("auto", "true", "false", "True")]
    assert compile_modes == ["auto", True, False, True]
    assert load_config().train.compile == "auto" and load_config(write(tmp_path, "train: {compile: off}")).train.compile is False
    assert load_config(write(tmp_path, "vae:\n  path:\n"), ["eval.metrics="]).vae.path == load_config(None, ["vae.path="]).vae.path == ""
    assert config.model.depth is None and config.log.exp_name == "7" and config.sample.S_max == float("inf")


def test_round_trips(tmp_path):
    config = load_config(None, ["train.betas=[0.1,0.2]", "sample.cfg_interval=[0.1,2]", "model.depth=3", "data.root=/a b/c",
                                "sample.sampler=mine", "sample.options.order=3", "model.options.window=[2,4]", "data.scale=[1,2,3,4]"])
    assert from_dict(to_dict(config)) == config
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("content, wanted", [
    ("- 1\n", "run.yaml: wanted sections"), ("a: [", "run.yaml cannot be read as YAML"), ("train: ${nothing}\n", "is a section"),
    ("train: {lr: 1, lr: 2}", "found duplicate key"), (b"\xff\xfe\x00", "run.yaml cannot be read as YAML: 'utf-8' codec")])
def test_files_that_are_no_config_are_refused(tmp_path, content, wanted):
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=wanted) as refusal:
        load_config(tmp_path / "run.yaml")
    assert len(str(refusal.value).splitlines()) == 1


def test_a_missing_file_a_folder_and_a_name_too_long_are_told(tmp_path):
    with pytest.raises(UserError, match="none.yaml cannot be read as YAML: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read .*Is a directory"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="cannot be read .*File name too long"):
        load_config(tmp_path / ("x" * 300))


def test_keys_may_refer_to_other_keys(tmp_path):
    path = write(tmp_path, "data: {root: '${log.results_dir}/latents'}")
    assert load_config(path, ["log.results_dir=elsewhere"]).data.root == "elsewhere/latents"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_load(path):
    load_config(path)


@pytest.mark.parametrize("page", ["README.md", "scripts/demo.sh"])
def test_sets_of_own_images_are_encoded_as_the_config_beside_wants_them(page):
    commands = r"(extract_latent.py \w+ data/mine.*)\n.*train_latent.py --config (\S+) data.root=data/mine"
    encode, train = re.search(commands, (ROOT / page).read_text()).groups()
    config = load_config(ROOT / train)
    assert f"--resolution {8 * config.model.in_size}" in encode and config.data.xflip == ("--xflip" in encode)


def test_every_key_is_read_outside_the_schema():
    """A key is read where an attribute of its name is taken, or where its name stands in a function or a list next to a getattr.

    The model section goes to the network as a whole.
    """
    files = [path for folder in (".", "utils", "dataset", "models", "fid", "sampling", "training") for path in (ROOT / folder).glob("*.py")]
    read = set()
    for tree in [ast.parse(path.read_text()) for path in files if path.name != "schema.py"]:
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        by_name = [f for f in functions if any(isinstance(node, ast.Name) and node.id == "getattr" for node in ast.walk(f))]
        lists = [node for node in tree.body if isinstance(node, ast.Assign)] if by_name else []
        strings = [node.value for place in by_name + lists for node in ast.walk(place) if isinstance(node, ast.Constant)]
        read |= {value for value in strings if isinstance(value, str)}
    assert [name for name, key in KEYS.items() if key.name not in read and not name.startswith("model.")] == []


def test_model_arguments_are_the_model_section_flat():
    config = load_config(None, ["model.model_type=Toy/2", "model.in_size=7", "model.options.window=4",
                                "train.activation_checkpointing=true"])
    arguments = model_arguments(config)
    assert arguments["window"] == 4 and arguments["activation_checkpointing"] is True and arguments["in_size"] == 7
    assert arguments.keys() == {key.name for key in dataclasses.fields(config.model)} - {"options"} | {"window", "activation_checkpointing"}


def test_keys_of_old_checkpoints_that_are_gone_are_passed_over_and_named():
    values = to_dict(load_config(None, ["train.lr=3"]))
    values["train"] |= {"switch_off": [], "cuda_graphs": False}
    values["sample"] |= {"solver_set": "ablation", "solver": "euler"}
    gone = []
    assert from_dict(values, gone=gone) == load_config(None, ["train.lr=3", "sample.solver=euler"])
    assert gone == ["train.switch_off", "train.cuda_graphs", "sample.solver_set"]
    with pytest.raises(UserError, match="unknown key 'train.switch_off'"):
        from_dict(values)


@pytest.mark.parametrize("overrides, told", [
    ([], []),
    (["train.mask_ratio_min=0.1"], ["train.mask_ratio_min=0.1 has no effect, because train.mask_ratio_fn is constant"]),
    (["model.num_classes=0", "sample.cfg_scale=1.5"],
     ["sample.cfg_scale=1.5 has no effect: without classes (model.num_classes=0) there is no guidance"]),
    (["sample.cfg_interval=[0.1,2]"], ["sample.cfg_interval=(0.1, 2.0) has no effect: sample.cfg_scale=1 turns guidance off"]),
    (["sample.cfg_interval=[0.1,2]", "sample.cfg_scale=2"], []),
    (["sample.tf32=true"], ["sample.tf32=true has no effect on a CPU: only GPUs have TF32"]),
])
def test_settings_without_effect_are_told(overrides, told):
    assert notes(load_config(None, overrides), CPU, "train", "sample") == told
    assert notes(load_config(None, overrides), CPU) == []


def test_tf32_beside_half_precision_is_told_on_gpus():
    gpu = argparse.Namespace(type="cuda")
    told = [notes(load_config(None, ["sample.tf32=true", f"sample.amp={amp}"]), gpu, "sample") for amp in ("no", "bf16", "fp16")]
    assert told == [[], *([f"sample.tf32=true has no effect: sample.amp={amp} rounds the inputs of matrix products further"]
                          for amp in ("bf16", "fp16"))]


def test_defaults_are_a_valid_config_that_nothing_writes_to():
    config = Config()
    assert from_dict(to_dict(config)) == config
    assert hash(config.model) == hash(ModelConfig()) and hash(config.sample) == hash(SampleConfig())  # keys of caches
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1
