"""Every figure, and the tables of docs/results.md, from the stored JSON alone.

    python3 -m experiments.figures --setting cpu                 # all figures, and docs/results.md
    python3 -m experiments.figures --setting cpu --only gain     # one of them
"""

import argparse
import statistics
from pathlib import Path

from experiments.analysis import fill, gains, load, read, tables
from utils.cli import UserError, run

COLOURS = {"dit": "tab:gray", "unmasked": "tab:blue", "masked": "tab:orange", "masked-50": "tab:orange", "tuned-const": "tab:green",
           "tuned-cos": "tab:olive", "masked-25": "tab:cyan", "masked-75": "tab:red", "no-mae": "tab:purple"}
NAMES = {"dit": "DiT, no decoder", "unmasked": "unmasked", "masked": "half masked"}
ABLATION = ("unmasked", "masked-25", "masked-50", "masked-75", "no-mae")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, help="folder of results: cpu | gpu")
    parser.add_argument("--only", choices=sorted(FIGURES), help="draw this figure, and leave docs/results.md alone")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--doc", type=Path, default=Path("docs/results.md"), help="text whose tables are filled in (default: %(default)s)")
    return parser.parse_args(argv)


def new_figure(columns, height=4.0):
    """(figure, axes): a Figure of its own, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def convergence(folder):
    """FD against seconds, FLOPs and steps: mean and lowest to highest of the seeds, real images as a line."""
    figure, axes = new_figure(3, 6.0)  # tall: the floor is two decades below
    for axis, (key, label, unit) in zip(axes, (("seconds", "training seconds", 1), ("flops", "training TFLOP", 1e12), ("step", "steps", 1))):
        for arm, found in load(folder).items():
            if len(found) < 2 and len(load(folder)["unmasked"]) > 1:
                continue  # one seed only: in the ablation
            points = list(zip(*(run["snapshots"] for run in found)))
            x = [statistics.mean(s[key] for s in point) / unit for point in points]
            fd = [[s["fd"] for s in point] for point in points]
            axis.plot(x, [statistics.mean(v) for v in fd], marker="o", markersize=3, color=COLOURS[arm], label=found[0]["title"])
            axis.fill_between(x, [min(v) for v in fd], [max(v) for v in fd], color=COLOURS[arm], alpha=0.2, linewidth=0)
        axis.axhline(read(folder, "real")["rows"][0]["real"]["fd"], color="black", linestyle="--", linewidth=1, label="real images")
        axis.set(xlabel=label, ylabel="FD-classifier", yscale="log")
    axes[0].legend(fontsize=8)
    return figure


def ablation(folder):
    """Final FD of the mask ratios on equal FLOPs, unguided and guided."""
    figure, (axis,) = new_figure(1)
    loaded = load(folder)
    runs = {arm: loaded[arm] for arm in ABLATION if arm in loaded}
    for offset, name, pick in ((-0.2, "unguided", lambda r: r["snapshots"][-1]["fd"]), (0.2, "guided", lambda r: r["guided"]["fd"])):
        values = [[pick(run) for run in found] for found in runs.values()]
        means = [statistics.mean(v) for v in values]
        spread = [[m - min(v) for m, v in zip(means, values)], [max(v) - m for m, v in zip(means, values)]]
        axis.bar([i + offset for i in range(len(runs))], means, 0.4, yerr=spread, capsize=3, label=name)
    axis.set_xticks(range(len(runs)), [found[0]["title"] for found in runs.values()], rotation=20, fontsize=8)
    axis.set(ylabel="FD-classifier, equal FLOPs")
    axis.margins(y=0.25)
    axis.legend()
    return figure


def bars(groups, ylabel):
    """groups: {label: {arm: height}}."""
    figure, (axis,) = new_figure(1)
    for number, arm in enumerate(NAMES):
        axis.bar([i + 0.27 * (number - 1) for i in range(len(groups))], [group[arm] for group in groups.values()], 0.25,
                 color=COLOURS[arm], label=NAMES[arm])
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(ylabel=ylabel)
    axis.legend(fontsize=8)
    return figure


def speed(folder):
    """Images per second of training steps at 64 tokens, as measured."""
    groups = {}
    for row in read(folder, "steps")["rows"]:
        if row["tokens"] == 64:
            groups.setdefault(f"width {row['width']}", {})[row["arm"]] = 1000 * row["batch"] / row["ms"]["median"]
    return bars(groups, "training images/s, 64 tokens")


def memory(folder):
    """Memory of XL/2 at batch 32: state and what is kept for the backward pass, counted."""
    groups = {}
    for row in read(folder, "paper")["rows"]:
        if "state_bytes" in row:
            groups.setdefault(row["resolution"], {})[row["arm"]] = (row["state_bytes"] + 32 * row["kept_bytes_per_image"]) / 1e9
    return bars(groups, "XL/2, batch 32: counted GB")


def gflops(folder):
    """Bubbles: training GFLOPs per image of the paper's sizes."""
    figure, axes = new_figure(2)
    rows = read(folder, "paper")["rows"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for axis, resolution in zip(axes, dict.fromkeys(row["resolution"] for row in rows)):
        for arm in NAMES:
            found = [row for row in rows if (row["arm"], row["resolution"]) == (arm, resolution)]
            work = [row["training_flops"] / 1e9 for row in found]
            axis.scatter([sizes.index(row["size"]) for row in found], work, [max(8, w / (1 if "256" in resolution else 4)) for w in work],
                         color=COLOURS[arm], alpha=0.6, label=NAMES[arm])
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set(title=resolution, ylabel="GFLOP per training image (area in proportion)", yscale="log", xlim=(-0.6, len(sizes) - 0.4))
        axis.margins(y=0.2)
    axes[0].legend(fontsize=8, markerscale=0.4, loc="upper left")
    return figure


def gain(folder):
    """How much cheaper half masked is than unmasked: in time and in FLOPs, against tokens and against work."""
    figure, axes = new_figure(2)
    found = gains(read(folder, "steps"))
    flops = {(row["width"], row["tokens"]): row["flops_per_image"] for row in read(folder, "steps")["rows"] if row["arm"] == "unmasked"}
    for number, width in enumerate(dict.fromkeys(row[0] for row in found)):
        rows = [row for row in found if row[0] == width]
        times = [statistics.median(row[2]) for row in rows]
        spread = [[t - min(row[2]) for t, row in zip(times, rows)], [max(row[2]) - t for t, row in zip(times, rows)]]
        for axis, x in zip(axes, ([row[1] for row in rows], [flops[width, row[1]] / 1e6 for row in rows])):
            axis.errorbar(x, times, yerr=spread, marker="o", capsize=3, color=f"C{number}", label=f"width {width}: time")
            axis.plot(x, [row[3] for row in rows], linestyle="--", color=f"C{number}", label=f"width {width}: FLOPs")
    for axis, label in zip(axes, ("tokens", "unmasked training MFLOP per image")):
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xlabel=label, ylabel="unmasked / half masked", xscale="log")
    axes[0].legend(fontsize=7)
    return figure


def samples(folder):
    """The pictures that the runs of the first seed kept, side by side."""
    import numpy as np
    from PIL import Image

    kept = {arm: found[0] for arm, found in load(folder).items() if (folder / f"{arm}-seed{found[0]['seed']}.png").is_file()}
    figure, axes = new_figure(len(kept), 7.5)
    figure.set_size_inches(2.7 * len(kept), 6.2)
    for axis, (arm, run_) in zip(axes, kept.items()):
        axis.imshow(np.asarray(Image.open(folder / f"{arm}-seed{run_['seed']}.png")), interpolation="nearest")
        axis.set_title(f"{run_['title']}\nFD {run_['guided']['fd']:.2f}", fontsize=9)
        axis.axis("off")
    return figure


FIGURES = {function.__name__: function for function in (convergence, ablation, speed, memory, gflops, gain, samples)}


def save(figure, path):
    """A PNG of 64 colours, a third of the size."""
    from PIL import Image

    figure.savefig(path, format="png")
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv=None):
    args = parse_arguments(argv)
    folder = args.out / args.setting
    if not list(folder.glob("*-seed*.json")):
        raise UserError(f"{folder}: no results; python3 -m experiments.run --setting {args.setting} makes them")
    for name in [args.only] if args.only else FIGURES:
        path = folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        save(FIGURES[name](folder), path)
        print(path)
    if not args.only and args.doc.is_file():
        args.doc.write_text(fill(args.doc.read_text(), tables(folder)))


if __name__ == "__main__":
    run(main)
