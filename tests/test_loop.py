"""One training step and the loop around it, in this process."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import ROOT, SETTINGS, metrics

from dataset.formats import open_latents
from dataset.stream import stream_indices
from models import EDMLoss, TokenMask, build_model, sample_moments
from models.layers import DiTBlock
from sampling.load import read_checkpoint
from training.checkpoint import find_latest
from training.loop import TrainState, fit, prepare_model, step_seed, train_step
from utils.cli import EXIT_BAD, EXIT_STOPPED, StopNotice, UserError
from utils.config import load_config, model_arguments

CPU = torch.device("cpu")
ROOMS = {"models", "dataset", "sampling", "training", "utils", "fid"}


def make_state(**settings):
    values = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    torch.manual_seed(0)
    net = build_model(**model_arguments(config))
    for parameter in net.parameters():  # the published zeros would hide most gradients
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return TrainState(net, config, CPU)


def encode(moments, generator):
    return sample_moments(moments, generator)


def make_loss(state):
    return EDMLoss(mae_loss_coef=state.config.train.mae_loss_coef, patch_size=state.net.patch_size)


def make_batch(size=4):
    random = np.random.default_rng(1)
    return torch.from_numpy(random.standard_normal((size, 8, 8, 8), np.float32)), torch.arange(size) % 5


def sums(state):
    return dict(zip(state.measured, state.sums.tolist(), strict=True))


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.net.parameters()])


class FixedDraws(EDMLoss):
    """Gives every sample the sigma, noise and mask that belong to its latents, however the batch is cut."""

    def draw(self, latents, mask_ratio=0.0, generator=None):
        draws = [EDMLoss.draw(self, latent[None], mask_ratio, torch.Generator().manual_seed(int(latent.abs().sum() * 1e3)))
                 for latent in latents]
        mask = TokenMask(torch.cat([draw.mask.ids_shuffle for draw in draws]), draws[0].mask.num_keep)
        return draws[0]._replace(sigma=torch.cat([draw.sigma for draw in draws]), noise=torch.cat([draw.noise for draw in draws]), mask=mask)


@pytest.mark.parametrize("rounds", [2, 4])
def test_accumulated_rounds_equal_one_round(rounds):
    """Same draws, same mean gradient: float32 sums in another order differ by about 1e-7; Adam is kept from enlarging that."""
    norms, losses, gradients = [], [], []
    for grad_accum in (1, rounds):
        state = make_state(train__grad_accum=grad_accum, train__class_dropout_prob=0.0, train__mask_ratio_fn="constant")
        state.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]])))
        train_step(state, state.net, FixedDraws(patch_size=2), *make_batch(), lambda moments, _: moments[:, :4], torch.Generator())
        norms.append(sums(state)["grad_norm"])
        losses.append(sums(state)["loss"])
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 * max(1.0, gradients[0].abs().max().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_logged_loss_is_the_true_mean_over_rounds_and_steps():
    state, wanted = make_state(train__grad_accum=2), []

    class Recorded(EDMLoss):
        def __call__(self, *args, **kwargs):
            losses = super().__call__(*args, **kwargs)
            wanted.append((losses["denoising"] + 0.1 * losses["mae"]).detach())
            return losses

    for _ in range(3):
        train_step(state, state.net, Recorded(patch_size=2), *make_batch(), encode, torch.Generator())
    values = sums(state)
    assert values["good_steps"] == 3 and len(wanted) == 6
    assert values["loss"] / 3 == pytest.approx(torch.cat(wanted).mean().item(), rel=1e-6)
    assert values["loss"] == pytest.approx(values["loss_denoising"] + 0.1 * values["loss_mae"], rel=1e-6)


def test_step_is_a_function_of_seed_and_step():
    def two_steps(seed):
        state = make_state(train__seed=seed)
        torch.manual_seed(np.random.randint(1000))  # the global generator must not matter
        for _ in range(2):
            train_step(state, state.net, make_loss(state), *make_batch(), encode, torch.Generator())
        return weights(state)

    assert torch.equal(two_steps(0), two_steps(0))
    assert not torch.equal(two_steps(0), two_steps(1))
    assert len({step_seed(seed, rank, step) for seed in range(4) for rank in range(4) for step in range(40)}) == 640


def test_labels_are_dropped_at_the_asked_rate():
    seen = []

    class Recorded(EDMLoss):
        def __call__(self, net, latents, class_labels, *args, **kwargs):
            seen.append(class_labels)
            return super().__call__(net, latents, class_labels, *args, **kwargs)

    state = make_state(train__grad_accum=1, train__class_dropout_prob=0.25)
    for _ in range(8):
        train_step(state, state.net, Recorded(patch_size=2), *make_batch(250), encode, torch.Generator())
    labels = torch.cat(seen)
    share = (labels == 5).double().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)  # 5 standard deviations
    assert torch.equal(labels[labels != 5], (torch.arange(2000) % 250 % 5)[labels != 5])


def test_learning_rate_and_mask_ratio_follow_the_step():
    state = make_state(train__warmup_images=0, train__lr=1.0, train__lr_schedule="linear", train__mask_ratio_fn="linear",
                       train__max_num_steps=4)
    ratios, rates = [], []
    for _ in range(4):
        ratios.append(train_step(state, state.net, make_loss(state), *make_batch(), encode, torch.Generator()))
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert ratios == [0.5, 0.375, 0.25, 0.125] and rates == [1, 0.75, 0.5, 0.25]
    assert (state.step, state.images_seen) == (4, 16)


def test_schedules_count_from_the_step_and_image_that_the_run_started_at():
    """A run from a checkpoint of step 100 has its own warm-up and decay."""
    state = make_state(train__warmup_images=8, train__lr=1.0, train__lr_schedule="linear", train__mask_ratio_fn="linear", train__max_num_steps=4)
    state.step = state.start_step = 100
    state.images_seen = state.start_images = 400
    ratios, rates = [], []
    for _ in range(4):
        ratios.append(train_step(state, state.net, make_loss(state), *make_batch(), encode, torch.Generator()))
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert ratios == [0.5, 0.375, 0.25, 0.125] and rates == [0, 0.75 * 0.5, 0.5, 0.25]
    assert (state.step, state.images_seen, state.end_step) == (104, 416, 104)


def test_data_goes_on_where_the_checkpoint_that_the_run_started_from_left_off(latents, tmp_path):
    state, seen = make_state(train__grad_accum=1, train__max_num_steps=1), []
    state.images_seen = state.start_images = 8
    fit(state, tmp_path, latents, lambda moments, generator: seen.append(moments) or encode(moments, generator), StopNotice())
    wanted, _ = latents.read(stream_indices(len(latents), 0, 8, 4))
    assert torch.equal(seen[0], torch.from_numpy(wanted))


def test_ema_follows_every_step():
    state = make_state()
    start = weights(state)
    train_step(state, state.net, make_loss(state), *make_batch(), encode, torch.Generator())
    average = torch.cat([p.flatten() for p in state.ema.net.parameters()])
    torch.testing.assert_close(average, 0.9 * start + 0.1 * weights(state), atol=1e-7, rtol=1e-6)


def test_bad_step_is_skipped_and_left_out_of_the_mean():
    state = make_state()
    moments, labels = make_batch()
    before = weights(state)
    train_step(state, state.net, make_loss(state), moments * float("nan"), labels, encode, torch.Generator())
    assert torch.equal(weights(state), before)
    assert set(sums(state).values()) == {0} and state.stepper.bad_steps.tolist() == [1, 1] and state.step == 1
    train_step(state, state.net, make_loss(state), moments, labels, encode, torch.Generator())
    average = torch.cat([p.flatten() for p in state.ema.net.parameters()])
    train_step(state, state.net, make_loss(state), moments * float("nan"), labels, encode, torch.Generator())
    followed = torch.cat([p.flatten() for p in state.ema.net.parameters()])
    torch.testing.assert_close(followed, 0.9 * average + 0.1 * weights(state), atol=1e-7, rtol=1e-6)  # the average goes on
    assert sums(state)["good_steps"] == 1 and torch.isfinite(state.sums).all() and not torch.equal(weights(state), before)


class ThreeLosses(EDMLoss):
    """Another term by name: the mean of what the network makes, with a weight of its own; and one without a weight."""

    def __call__(self, net, latents, class_labels=None, mask_ratio=0.0, generator=None):
        losses = super().__call__(net, latents, class_labels, mask_ratio, generator)
        self.weights["drift"] = 0.25
        return losses | {"drift": latents.mean(dim=(1, 2, 3)), "bias": torch.full((len(latents),), 2.0)}


def test_any_loss_is_summed_by_its_weight_and_measured_under_its_name():
    plain, state = make_state(), make_state()
    train_step(plain, plain.net, make_loss(plain), *make_batch(), encode, torch.Generator())
    train_step(state, state.net, ThreeLosses(patch_size=2), *make_batch(), encode, torch.Generator())
    values = sums(state)
    assert list(values) == ["loss", "loss_denoising", "loss_mae", "loss_drift", "loss_bias", "grad_norm", "good_steps"]
    assert values["loss_bias"] == 2.0
    assert values["loss"] == pytest.approx(sums(plain)["loss"] + 0.25 * values["loss_drift"] + 2.0, rel=1e-6)
    assert torch.equal(weights(state), weights(plain))  # neither of the two has a gradient


# ------------------------------------------------------------------------------------------------ the loop

@pytest.fixture
def latents(tiny_latents):
    return open_latents(tiny_latents, num_classes=5)


def spoil(bad_calls):
    """An encode that gives NaN latents in the given calls."""
    calls = [0]

    def encode(moments, generator):
        calls[0] += 1
        return sample_moments(moments, generator) * (float("nan") if calls[0] in bad_calls else 1.0)

    return encode


def test_few_bad_steps_are_told_and_survived(latents, tmp_path, capsys):
    state = make_state(train__grad_accum=1, train__max_bad_steps=3)
    assert fit(state, tmp_path, latents, spoil({3, 4, 9}), StopNotice()) == 0
    said = capsys.readouterr().out
    assert "WARNING: 2 steps up to step 4 had NaN or Inf losses or gradients and were skipped (2 in all)" in said
    assert "WARNING: 1 steps up to step 10" in said
    assert metrics(tmp_path)[-1]["bad_steps"] == 3
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path) if line["step"] != 4)


def test_a_log_line_of_bad_steps_alone_has_no_numbers(latents, tmp_path, capsys):
    state = make_state(train__grad_accum=1, train__max_bad_steps=3)
    assert fit(state, tmp_path, latents, spoil({3, 4}), StopNotice()) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("loss", "loss_denoising", "loss_mae", "grad_norm"):
            assert (line[key] is None) == (line["step"] == 4), (line["step"], key)
    assert "step 4/12: no loss: every step since the last line was skipped, lr" in capsys.readouterr().out


@pytest.mark.parametrize("bad, code", [(set(range(1, 13)), EXIT_BAD), (set(range(2, 9)), EXIT_BAD), (set(range(2, 8)), 0)])
def test_a_run_most_of_whose_steps_failed_says_so_and_has_a_code_of_its_own(latents, tmp_path, capsys, bad, code):
    state = make_state(train__grad_accum=1)
    assert fit(state, tmp_path, latents, spoil(bad), StopNotice()) == code
    said = capsys.readouterr().out
    assert (f"WARNING: {len(bad)} of the run's 12 steps had NaN or Inf losses or gradients and changed nothing" in said) == (code == EXIT_BAD)


def test_the_share_that_is_really_removed_is_logged(latents, tmp_path, capsys):
    """16 patches cannot lose 99 %: one of them stays."""
    state = make_state(train__mask_ratio=0.99, train__mask_ratio_fn="constant", train__max_num_steps=2)
    assert fit(state, tmp_path, latents, encode, StopNotice()) == 0
    assert metrics(tmp_path)[-1]["mask_ratio"] == 15 / 16 and "masked 94%" in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_stop_the_run(latents, tmp_path):
    state = make_state(train__grad_accum=1, train__max_bad_steps=3, train__max_num_steps=40, log__log_every=10)
    with pytest.raises(UserError, match="steps 6 to 9 all had NaN or Inf losses or gradients. Try a lower train.lr, train.grad_clip=1"):
        fit(state, tmp_path, latents, spoil(set(range(6, 10)) | {20}), StopNotice())  # healthy again before anyone looks
    assert find_latest(tmp_path / "checkpoints").stem in ("0000004", "0000008")


def test_collapsed_loss_scale_stops_the_run(latents, tmp_path):
    state = make_state(train__grad_accum=1, train__max_num_steps=40)
    state.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    with pytest.raises(UserError, match="fp16's loss scale has fallen below 1 by step 6, after 3 skipped steps. Try a lower"):
        fit(state, tmp_path, latents, spoil({2, 4, 6}), StopNotice())


def test_scaler_state_is_resumed(latents, tmp_path):
    state = make_state(train__grad_accum=1)
    state.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    fit(state, tmp_path, latents, spoil({2}), StopNotice())
    content = torch.load(tmp_path / "checkpoints" / "0000012.pt", weights_only=True)
    other = make_state()
    other.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    other.resume(content)
    assert other.stepper.state_dict() == state.stepper.state_dict()
    assert other.stepper.scaler.get_scale() == 128.0  # 64, halved at step 2, doubled after steps 7 and 12
    assert other.stepper.bad_steps.tolist() == [0, 1]


def test_notice_given_before_the_start_stops_without_a_step(latents, tmp_path):
    state, notice = make_state(), StopNotice()
    notice.requested = True
    assert fit(state, tmp_path, latents, encode, notice) == EXIT_STOPPED
    assert state.step == 0 and not list((tmp_path / "checkpoints").iterdir())


def test_notice_during_evaluation_is_heard_after_it(latents, tmp_path):
    state, notice = make_state(eval__every=4, eval__ref_path="x"), StopNotice()

    def evaluate(net, step):
        notice.requested = True
        return {"fid": 3.0}

    assert fit(state, tmp_path, latents, encode, notice, evaluate=evaluate) == EXIT_STOPPED
    assert state.step == 4 and metrics(tmp_path)[-1]["fid"] == 3.0
    assert json.loads((tmp_path / "checkpoints" / "0000004.json").read_text())["step"] == 4


@pytest.mark.parametrize("what", ["evaluate", "sample_grid"])
def test_checkpoint_is_saved_before_what_looks_at_its_step(latents, tmp_path, what):
    """A failure there costs no step; the resumed run makes up for it first."""
    settings = {"eval__every": 4, "eval__ref_path": "x", "log__sample_every": 4}

    def fail(net, step):
        raise RuntimeError("no such sampler")

    with pytest.raises(RuntimeError, match="no such sampler"):
        fit(make_state(**settings), tmp_path, latents, encode, StopNotice(), **{what: fail})
    content = torch.load(tmp_path / "checkpoints" / "0000004.pt", weights_only=True)
    state, seen = make_state(**settings), []
    state.resume(content)
    assert fit(state, tmp_path, latents, encode, StopNotice(),
               **{what: lambda net, step: seen.append(step) or ({"fid": 3.0} if what == "evaluate" else None)}) == 0
    assert seen == [4, 8, 12]
    assert [line["step"] for line in metrics(tmp_path) if "fid" in line] == (seen if what == "evaluate" else [])
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_the_logged_rate_is_that_of_training_without_evaluations(latents, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr("training.loop.time.monotonic", lambda: seconds[0])

    def encode_in_a_second(moments, generator):
        seconds[0] += 1.0
        return encode(moments, generator)

    def evaluate(net, step):
        seconds[0] += 1000.0
        return {"fid": 3.0}

    state = make_state(eval__every=3, eval__ref_path="x", train__grad_accum=1)
    fit(state, tmp_path, latents, encode_in_a_second, StopNotice(), evaluate=evaluate)
    rates = [line["images_per_s"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "images_per_s" in line]
    assert rates == [4.0] * 6  # 4 images a step of one second, at each of the 6 log lines


def test_interval_checkpoints_and_the_last_one_are_saved(latents, tmp_path):
    state = make_state(train__max_num_steps=11, log__ckpt_every=3, log__keep_last=2, log__keep_every=6)
    assert fit(state, tmp_path, latents, encode, StopNotice()) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt")) == ["0000006.pt", "0000009.pt", "0000011.pt"]


def test_a_resumed_run_keeps_nothing_of_the_file(latents, tmp_path):
    fit(make_state(), tmp_path, latents, encode, StopNotice())
    path, state = tmp_path / "checkpoints" / "0000012.pt", make_state()
    state.resume(read_checkpoint(path))
    assert state.step == 12 and str(path) not in Path("/proc/self/maps").read_text()


def test_settings_of_the_optimizer_are_those_of_the_config_after_a_resume(latents, tmp_path):
    state = make_state()
    fit(state, tmp_path, latents, encode, StopNotice())
    other = make_state(train__weight_decay=0.5, train__betas="[0.8,0.9]")
    other.resume(torch.load(tmp_path / "checkpoints" / "0000012.pt", weights_only=True))
    group = other.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["fused"]) == (0.5, (0.8, 0.9), True)


# ------------------------------------------------------------------------------------------------ compiled blocks

@pytest.fixture
def compile_with(monkeypatch):
    """compile_with(backend): train.compile=auto compiles here as it does on a GPU, with another backend than inductor."""
    def choose(backend):
        monkeypatch.setattr("training.loop.use_compile", lambda setting, device: setting is not False)
        monkeypatch.setattr("training.loop.compile_options", lambda train: {"backend": backend, "dynamic": True})
        torch.compiler.reset()

    yield choose
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def broken_compiler(graph, inputs):
    raise RuntimeError("no such instruction\nand a page of details")


def test_auto_goes_on_uncompiled_when_the_compiler_fails(latents, tmp_path, capsys, compile_with):
    compile_with(broken_compiler)
    state, plain = make_state(), make_state(train__compile=False)
    assert fit(state, tmp_path / "auto", latents, encode, StopNotice()) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line]
    assert len(said) == 1 and "no such instruction" in said[0] and "details" not in said[0]
    fit(plain, tmp_path / "plain", latents, encode, StopNotice())
    assert torch.equal(weights(state), weights(plain))  # the pass that failed has left nothing behind


def test_a_failing_compiler_ends_a_run_that_asks_for_it(latents, tmp_path, compile_with):
    compile_with(broken_compiler)
    with pytest.raises(Exception, match="no such instruction"):
        fit(make_state(train__compile=True), tmp_path, latents, encode, StopNotice())


def test_memory_that_runs_out_is_an_error_also_under_auto(latents, tmp_path, compile_with):
    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compile_with(lambda graph, inputs: hungry)
    with pytest.raises(torch.OutOfMemoryError):
        fit(make_state(), tmp_path, latents, encode, StopNotice())


def test_a_resumed_run_compiles_for_the_shapes_that_the_new_run_compiled_for(latents, tmp_path, compile_with):
    """The mask schedule has changed the token count meanwhile, and kernels can depend on the count that the compiler sees first."""
    seen = []

    def record(graph, inputs):
        seen.append([tuple(map(int, value.shape)) for value in inputs if isinstance(value, torch.Tensor)])
        return graph

    compile_with(record)
    new, resumed = make_state(), make_state()
    fit(new, tmp_path / "new", latents, encode, StopNotice())
    shapes = seen[0]
    compile_with(record)
    seen.clear()
    resumed.resume(torch.load(tmp_path / "new" / "checkpoints" / "0000008.pt", weights_only=True))
    fit(resumed, tmp_path / "resumed", latents, encode, StopNotice())
    assert seen[0] == shapes and torch.equal(weights(resumed), weights(new))


@pytest.mark.parametrize("settings, counts", [({}, [8, 9, 16]), ({"mask_ratio": 0.8}, [3, 8, 16]), ({"mask_ratio_min": 0.4}, [8, 9]),
                                              ({"mask_ratio_fn": "constant"}, [])])
def test_token_counts_to_come_are_rehearsed_before_the_first_step(settings, counts):
    """The first one, one that differs from it in being divisible by 8, the last one. Nothing of it stays."""
    state, passes = make_state(**{f"train__{key}": value for key, value in settings.items()}), []
    before, random_state = weights(state), torch.get_rng_state()

    class Recorded(EDMLoss):
        def terms(self, latents, noised, denoised, sigma, mask):
            passes.append(16 if mask is None else mask.num_keep)
            assert len(latents) == 2  # a round's
            return super().terms(latents, noised, denoised, sigma, mask)

    assert prepare_model(state, Recorded(patch_size=2), None) is state.net
    assert passes == counts
    assert torch.equal(weights(state), before) and torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in state.net.parameters()) and not state.optimizer.state


def test_memory_that_will_run_out_at_the_end_of_a_schedule_is_told_before_the_first_step(latents, tmp_path, monkeypatch):
    def small_gpu(self, tokens, c):
        if tokens.shape[1] == 16 and tokens.shape[2] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, c)

    forward = DiTBlock.forward
    monkeypatch.setattr(DiTBlock, "forward", small_gpu)
    state = make_state(model__width=32)  # the decoder, of width 16, fits
    with pytest.raises(torch.OutOfMemoryError):
        fit(state, tmp_path, latents, encode, StopNotice())
    assert state.step == 0


def test_nothing_is_compiled_after_the_first_step_has_begun(latents, tmp_path, monkeypatch, compile_with):
    compiled = {"before": 0, "later": 0}

    def count(graph, inputs):
        compiled["later" if begun else "before"] += 1
        return graph

    def step(*arguments):
        begun.append(True)
        return train_step(*arguments)

    begun = []
    compile_with(count)
    monkeypatch.setattr("training.loop.train_step", step)
    fit(make_state(model__width=32), tmp_path, latents, encode, StopNotice())
    assert len(begun) == 12 and compiled["before"] and not compiled["later"]


# ------------------------------------------------------------------------------------------------ what a step goes through

def functions_of_a_step(latents, folder):
    """{(file, function)} of ours that the main thread enters from the middle of step 5 to the middle of step 6."""
    state, entered = make_state(train__grad_accum=1, log__log_every=1000, log__ckpt_every=1000), set()

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and state.step in (4, 5) and counting[0] and ROOT in path.parents and path.relative_to(ROOT).parts[0] in ROOMS:
            entered.add((str(path.relative_to(ROOT)), frame.f_code.co_qualname))

    counting = [False]

    def step_begins(*_):
        counting[0] = state.step == 4

    state.optimizer.register_step_post_hook(step_begins)
    sys.setprofile(watch)
    try:
        fit(state, folder, latents, functools.partial(sample_moments, scale=0.5, shift=0.0), StopNotice())
    finally:
        sys.setprofile(None)
    return entered


def test_a_steady_step_enters_few_files_and_functions_of_ours(latents, tmp_path):
    """A reader of one step has these to read. At most 11 files and 40 functions; `pytest -s` prints the counts."""
    entered = functions_of_a_step(latents, tmp_path)
    files = sorted({path for path, _ in entered})
    print(f"{len(files)} files, {len(entered)} functions: {', '.join(files)}")
    assert len(files) <= 11 and len(entered) <= 40, sorted(entered)
