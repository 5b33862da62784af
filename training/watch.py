"""Pictures and numbers while a run goes on: sample grids, evaluations, the loss curve."""

import dataclasses


def make_sample_grid(config, folder, dataset, device):
    """sample_grid(net, step) -> picture (H, W, 3) uint8: images of fixed seeds, saved as samples/STEP.png; None if not asked for."""
    if not config.log.sample_every:
        return None
    from sampling.sample import draw_grid, image_decoder, latents_to_uint8
    from utils.logging import say

    try:
        decode = image_decoder(config.vae, config.model.in_channels, device)
    except FileNotFoundError as error:
        say(f"{error}; until then sample grids show the first three latent channels")
        decode = latents_to_uint8
    (folder / "samples").mkdir(exist_ok=True)

    def sample_grid(net, step):
        return draw_grid(net, decode, config, device, folder / "samples" / f"{step:07d}.png", dataset.class_names)

    return sample_grid


def make_evaluate(config, folder, device):
    """evaluate(net, step) -> numbers, from eval.num_images samples of seeds 0, 1, ...; None if not asked for.

    The numbers with every setting behind them are saved as evaluations/STEP.json.
    """
    if not config.eval.every:
        return None
    from fid.evaluate import Evaluator, format_result, save_result
    from sampling.sample import generate, image_decoder
    from utils.logging import say

    decode = image_decoder(config.vae, config.model.in_channels, device)
    sample = dataclasses.replace(config.sample, num_steps=config.eval.num_steps)
    evaluator = Evaluator.from_config(dataclasses.replace(config.eval, metrics=config.eval.metrics or "fid"))

    def evaluate(net, step):
        evaluator.reset()
        for batch in generate(net, decode, list(range(config.eval.num_images)), sample, device):
            evaluator.add(batch.images, batch.index)
        result = evaluator.result()
        say(f"evaluation of the average at step {step}:\n{format_result(result)}")
        save_result(folder / "evaluations" / f"{step:07d}.json", result)
        return result["numbers"]

    return evaluate


def draw_loss_curve(folder):
    """folder/loss.png from folder/metrics.jsonl."""
    import json

    from utils.images import plot_curves

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    if lines:
        steps = [line["step"] for line in lines]
        series = {name: (steps, [line[key] for line in lines])
                  for name, key in (("loss", "loss"), ("denoising", "loss_denoising"), ("reconstruction (MAE)", "loss_mae"))}
        plot_curves(folder / "loss.png", series, xlabel="step", ylabel="loss", title=folder.name)
