"""Bars of training speed and memory, as in the paper's figures, from JSON files of benchmarks/train.py made on one device.

    python -m benchmarks.plot benchmarks/results/train_cpu_arms.json            # draws train_cpu_arms.png beside it
    python -m benchmarks.plot A.json B.json --output both.png

One group of bars per model, precision, batch and mask ratio, one bar per arm. Memory is drawn where it was measured.
"""

import argparse
import json
from pathlib import Path

from utils.cli import UserError, run
from utils.files import told


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="files written by python -m benchmarks.train --json")
    parser.add_argument("--output", type=Path, metavar="PNG", help="the picture (default: beside the first file)")
    return parser.parse_args(argv)


def read(files):
    """(device, {"img/s" or "GB": {group: {arm: number}}}). Raises UserError for a file that is missing or no result of benchmarks/train.py."""
    devices, found = set(), {"img/s": {}, "GB": {}}
    for path in files:
        try:
            content = json.loads(path.read_text())
            devices.add(content["device"])
            for row in content["rows"]:
                group = f"{row['model']}, {row['masked']:.0%} masked\n{row['amp']}, batch {row['batch']}"
                for quantity, groups in found.items():
                    groups.setdefault(group, {})[row["arm"]] = row[quantity]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a file that benchmarks.train wrote with --json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of benchmarks/train.py ({error!r})") from error
    if len(devices) != 1 or not found["img/s"]:
        raise UserError(f"wanted steps that were measured on one device, got {', '.join(sorted(devices)) or 'none'}")
    return devices.pop(), found


def draw_bars(axis, groups, ylabel):
    arms = list(dict.fromkeys(arm for group in groups.values() for arm in group))
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [i + width * (number - (len(arms) - 1) / 2) for i, group in enumerate(groups.values()) if arm in group]
        axis.bar(places, [group[arm] for group in groups.values() if arm in group], 0.92 * width, label=arm)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)


def main():
    args = parse_arguments()
    device, found = read(args.files)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if None in [number for group in found["GB"].values() for number in group.values()]:
        del found["GB"]
    path = args.output or args.files[0].with_suffix(".png")
    figure = Figure(figsize=(5.0 * len(found), 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (quantity, groups) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        draw_bars(axis, groups, {"img/s": "training images/s", "GB": "peak memory, GB"}[quantity])
    figure.suptitle(device, fontsize=9)
    with told(path):
        figure.savefig(path, format="png")
    print(path)


if __name__ == "__main__":
    run(main)
