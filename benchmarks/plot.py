"""Bars of training speed and memory, as in the paper's figures, from the JSON files of benchmarks/train.py.

    python -m benchmarks.plot benchmarks/results/train_cpu_arms.json        # draws train_cpu_arms.png beside it
    python -m benchmarks.plot A.json B.json --output both.png               # one picture of several files of one device

One group of bars per model, precision and batch, one bar per arm: median, with lines from the slowest to the fastest round. Memory is
drawn where it was measured: on GPUs, and on CPUs with two warm-up rounds.
"""

import argparse
import json
from pathlib import Path

from benchmarks.train import ARMS, WITHOUT
from utils.cli import UserError, run

TITLES = {"plain": "plain path", "ours": "{} masked", "compiled": "{} masked, compiled", "unmasked": "unmasked", "dit": "DiT, no decoder"}
TITLES |= {arm: "{} masked, " + arm.replace("_", " ") for arm in WITHOUT}
NEEDED = ("model", "masked", "amp", "batch", "arm", "img/s", "ms/step", "GB")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="files written by python -m benchmarks.train --json")
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw all files as one picture, where arms of the same case stand together")
    return parser.parse_args(argv)


def read_rows(path):
    """Rows of a file of benchmarks/train.py and the device they were measured on. Raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text())
        rows, device = content["rows"], content["device"]
        missing = [key for row in rows for key in NEEDED if key not in row]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of benchmarks/train.py ({error!r})") from error
    if missing or not rows:
        raise UserError(f"{path} is no result of benchmarks/train.py (its rows lack {missing[0] if missing else 'everything'})")
    return rows, device


def groups_of(rows):
    """{label: {arm: row}}. Of the same steps measured twice, in two files, the last count.

    Raises ValueError for rows of one arm and label with different settings, of which one picture could show one only.
    """
    groups = {}
    for row in rows:
        label = f"{row['model']}\n{row['amp']}, batch {row['batch']}"
        other = groups.setdefault(label, {}).get(row["arm"], row)
        if (row["masked"], row.get("config")) != (other["masked"], other.get("config")):
            raise UserError(f"there are two bars of {row['arm']} for {' '.join(label.split())}, of other masked shares or image sizes; "
                            f"draw them as pictures of their own")
        groups[label][row["arm"]] = row
    return groups


def title_of(arm, rows):
    shares = {row["masked"] for row in rows}
    return TITLES[arm].format("half" if shares == {0.5} else ", ".join(f"{share:.0%}" for share in sorted(shares)))


def speed_of(row):
    """(median, lowest, highest) images/s of a row."""
    milliseconds = row["ms/step"]
    return tuple(1000 * row["batch"] / milliseconds[key] for key in ("median", "highest", "lowest"))


def draw_bars(axis, groups, value, ylabel):
    """value(row) -> (height, lowest, highest); arms without rows are left out."""
    arms = [arm for arm in ARMS if any(arm in group for group in groups.values())]
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [i + width * (number - (len(arms) - 1) / 2) for i, group in enumerate(groups.values()) if arm in group]
        bars = [group[arm] for group in groups.values() if arm in group]
        heights = [value(row) for row in bars]
        spread = [[h[0] - h[1] for h in heights], [h[2] - h[0] for h in heights]]
        axis.bar(places, [h[0] for h in heights], 0.92 * width, yerr=spread, capsize=2, label=title_of(arm, bars))
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)


def draw(rows, device, path):
    """Speed, and memory where there is any, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = groups_of(rows)
    with_memory = all(row["GB"] is not None for row in rows)
    columns = 2 if with_memory else 1
    figure = Figure(figsize=(columns * max(5.0, 1.8 * len(groups)), 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    draw_bars(axes[0], groups, speed_of, "training images/s")
    if with_memory:
        draw_bars(axes[1], groups, lambda row: (row["GB"],) * 3, "peak memory, GB")
    figure.suptitle(device, fontsize=9)
    figure.savefig(path)


def main():
    args = parse_arguments()
    found = {file: read_rows(file) for file in args.files}
    if args.output is None:
        pictures = {file.with_suffix(".png"): content for file, content in found.items()}
    else:
        devices = {device for _, device in found.values()}
        if len(devices) > 1:
            raise UserError(f"these files are of different devices, which one picture cannot compare: {', '.join(sorted(devices))}")
        pictures = {args.output: ([row for rows, _ in found.values() for row in rows], devices.pop())}
    for path, (rows, device) in pictures.items():
        draw(rows, device, path)
        print(path)


if __name__ == "__main__":
    run(main)
