"""The benchmark of starting: what it launches and when it looks at the clock."""

import pytest

from benchmarks import startup
from utils.config import load_config


def python(code, moments=None, **options):
    return startup.Arm(["-c", code], moments or {}, **options)


def test_moments_come_in_order_and_processor_time_is_the_process_own():
    arm = python("print('step 1/3: loss', flush=True)\nsum(range(10**7))\nprint('step 3/3: loss')",
                 {"first step": "step 1/", "last step": "step 3/"})
    (first, first_cpu), (last, last_cpu), (end, end_cpu) = startup.launch(arm, threads=1).values()
    assert 0 < first < last < end
    assert 0 <= first_cpu <= last_cpu <= end_cpu + 0.02 and end_cpu > 0  # before the end it is counted in hundredths of a second


@pytest.mark.parametrize("code, said", [("print('some trace')\nraise SystemExit(3)", "ended with code 3:\nsome trace"),
                                        ("print('another line')", "ended with code 0:\nanother line")])
def test_a_command_that_fails_or_misses_its_moment_is_no_measurement(code, said):
    with pytest.raises(RuntimeError, match=said):
        startup.launch(python(code, {"first step": "step 1/"}), threads=1)


def test_folders_of_the_last_launch_are_removed_and_the_cache_is_the_arms(tmp_path):
    (tmp_path / "old").mkdir()
    arm = python("import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'], os.path.exists('%s'))" % (tmp_path / "old"),
                 {"printed": f"{tmp_path / 'cache'} False"}, cache=tmp_path / "cache", fresh=(tmp_path / "old",))
    assert "printed" in startup.launch(arm, threads=1)


def test_compiled_arms_start_once_without_and_once_with_their_cache(tmp_path):
    args = startup.parse_arguments(["--compile"])
    arms = startup.training_arms(args, tmp_path) | startup.sampling_arms(args, tmp_path)
    cache = tmp_path / "compiler-cache"
    for script, key in (("train_latent.py", "train"), ("generate.py", "sample")):
        eager, first, second = (arms[f"{script}, {name}"] for name in ("eager", "compiled, empty cache", "compiled, full cache"))
        assert f"{key}.compile=False" in eager.arguments and eager.cache is None
        assert f"{key}.compile=True" in first.arguments and first.cache == second.cache == cache
        assert cache in first.fresh and cache not in second.fresh
    assert arms["train_latent.py, eager"].fresh == (tmp_path / "eager",)  # whose checkpoint is sampled from
    assert str(tmp_path / "eager/checkpoints/0000003.pt") in arms["generate.py, eager"].arguments


def test_every_command_is_among_the_help_arms():
    names = startup.help_arms()
    assert {"train_latent.py --help", "generate.py --help", "fid --help", "benchmarks.startup --help"} <= names.keys()
    assert names["fid --help"].arguments == ["-m", "fid", "--help"]


def test_written_latents_fit_the_config(tmp_path):
    from dataset.formats import open_latents

    config = load_config(startup.parse_arguments([]).config)
    startup.write_latents(tmp_path / "set", config)
    latents = open_latents(tmp_path / "set", num_classes=config.model.num_classes)
    assert len(latents) == startup.NUM_SAMPLES and latents.sample_shape == (8, 8, 8)
