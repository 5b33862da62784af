"""The benchmark of starting: what it launches and when it looks at the clock."""

import pytest

from benchmarks import startup


def launch(code, moments, **environment):
    return startup.launch(["-c", code], moments, environment)


def test_moments_come_in_order():
    code = "print('step 1/3: loss', flush=True)\nsum(range(10**7))\nprint('step 3/3: loss')"
    reached = launch(code, {"first step": "step 1/", "last step": "step 3/"})
    assert 0 < reached["first step"] < reached["last step"] < reached[startup.ENDED]


@pytest.mark.parametrize("code, said", [("print('some trace')\nraise SystemExit(3)", "ended with code 3:\nsome trace"),
                                        ("print('another line')", "ended with code 0:\nanother line")])
def test_a_command_that_fails_or_misses_its_moment_is_no_measurement(code, said):
    with pytest.raises(RuntimeError, match=said):
        launch(code, {"first step": "step 1/"})


def test_the_command_gets_its_environment():
    assert "printed" in launch("import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])", {"printed": "some/cache"},
                               TORCHINDUCTOR_CACHE_DIR="some/cache")


@pytest.mark.parametrize("switch", [[], ["--compile"]])
def test_sampling_takes_the_checkpoint_of_the_training(tmp_path, switch):
    arms = startup.make_arms(startup.parse_arguments(switch), tmp_path)
    (train, _), (sample, _) = arms["train_latent.py"], arms["generate.py"]
    assert f"log.results_dir={tmp_path}" in train and "log.exp_name=run" in train
    assert str(tmp_path / "run/checkpoints/0000003.pt") in sample
    assert f"train.compile={bool(switch)}" in train and f"sample.compile={bool(switch)}" in sample
