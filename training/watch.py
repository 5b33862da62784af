"""What is looked at while a run goes on: sample grids, evaluations, the loss curve."""

import dataclasses
import json

from utils import distributed
from utils.cli import UserError
from utils.files import write_whole
from utils.logging import say


def make_sample_grid(config, folder, class_names, device, latents):
    """sample_grid(net, step) -> picture (H, W, 3) uint8 of fixed seeds, saved as samples/STEP.png; None if it is there already.

    None if no grids are asked for. latents: the description of what the run is trained on; the autoencoder must fit it.
    """
    if not config.log.sample_every:
        return None
    from sampling.sample import draw_grid, image_decoder, latents_to_uint8

    if config.vae.path:
        try:
            decode = image_decoder(config.vae, config.model.in_channels, device, latents, f"data.root={config.data.root}")
        except UserError as error:
            raise UserError(f"{error}. Sample grids (log.sample_every={config.log.sample_every}) need it; log.sample_every=0 trains "
                            f"without, and vae.path='' shows the first three latent channels instead") from error
    else:
        say("vae.path is empty: sample grids show the first three latent channels")
        decode = latents_to_uint8

    def sample_grid(net, step):
        path = folder / "samples" / f"{step:07d}.png"
        if path.is_file():
            return None
        path.parent.mkdir(exist_ok=True)
        with write_whole(path) as temporary:
            return draw_grid(net, decode, config, device, temporary, class_names)

    return sample_grid


def make_evaluate(config, folder, device, latents):
    """evaluate(net, step) -> numbers, from eval.num_images samples of seeds 0, 1, ...; None if not asked for.

    They are saved with every setting behind them as evaluations/STEP.json, and read from there if they are there already.
    If images have NaN, the only number is nan_images: how many.
    """
    if not config.eval.every:
        return None
    from fid.evaluate import Evaluator, format_result, save_result
    from sampling.sample import describe_bad, generate, image_decoder

    decode = image_decoder(config.vae, config.model.in_channels, device, latents, f"data.root={config.data.root}")
    sample = dataclasses.replace(config.sample, num_steps=config.eval.num_steps)
    evaluator = Evaluator.from_config(dataclasses.replace(config.eval, metrics=config.eval.metrics or "fid"))

    def evaluate(net, step):
        path = folder / "evaluations" / f"{step:07d}.json"
        there = distributed.broadcast_object(json.loads(path.read_text()) if distributed.is_main() and path.is_file() else None)
        if there is not None:
            return there["numbers"]
        evaluator.reset()
        bad = []
        for batch in generate(net, decode, list(range(config.eval.num_images)), sample, device):
            evaluator.add(batch.images, batch.index)
            bad += batch.bad_seeds
        bad = sum(distributed.all_gather_object(bad), [])
        if bad:
            say(f"WARNING: no evaluation at step {step}: {describe_bad(bad, config.eval.num_images)}")
            result = {"numbers": {"nan_images": len(bad)}}
        else:
            result = evaluator.result()
            say(f"evaluation of the average at step {step}:\n{format_result(result)}")
        save_result(path, result)
        return result["numbers"]

    return evaluate


def forget_after(folder, step):
    """Delete grids and evaluations of later steps than `step`, which a run that goes on from there makes anew, and halves of files."""
    for path in (*folder.glob("samples/*"), *folder.glob("evaluations/*")):
        if path.suffix == ".tmp" or path.stem.isdigit() and int(path.stem) > step:
            path.unlink()


def draw_loss_curve(folder):
    """folder/loss.png from folder/metrics.jsonl: every loss that was logged. A value of None is a gap."""
    from utils.images import plot_curves

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    if lines:
        names = [name for name in lines[-1] if name == "loss" or name.startswith("loss_") and name != "loss_scale"]
        steps = [line["step"] for line in lines]
        series = {name.removeprefix("loss_"): (steps, [line.get(name) for line in lines]) for name in names}
        plot_curves(folder / "loss.png", series, xlabel="step", ylabel="loss", title=folder.name)
