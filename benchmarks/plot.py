"""Bars of training speed and memory, as in the paper's figures, from JSON files of benchmarks/train.py made on one device.

    python -m benchmarks.plot benchmarks/results/train_cpu_arms.json            # draws train_cpu_arms.png beside it
    python -m benchmarks.plot A.json B.json --output both.png

One bar per case and arm. Memory is drawn where it was measured.
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
    """(device, {label: row}). Raises UserError for a file that is missing or no result of benchmarks/train.py."""
    devices, bars = set(), {}
    for path in files:
        try:
            content = json.loads(path.read_text())
            devices.add(content["device"])
            for row in content["rows"]:
                label = f"{row['model']} {row['amp']}, batch {row['batch']}, {row['masked']:.0%} masked: {row['arm']}"
                bars[label] = {"training images/s": row["img/s"], "peak memory, GB": row["GB"]}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a file that benchmarks.train wrote with --json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of benchmarks/train.py ({error!r})") from error
    if len(devices) != 1 or not bars:
        raise UserError(f"wanted steps that were measured on one device, got {', '.join(sorted(devices)) or 'none'}")
    return devices.pop(), bars


def main():
    args = parse_arguments()
    device, bars = read(args.files)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = args.output or args.files[0].with_suffix(".png")
    figure = Figure(figsize=(10.0, 1.5 + 0.3 * len(bars)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, quantity in zip(figure.subplots(1, 2, sharey=True), ("training images/s", "peak memory, GB")):
        axis.barh(list(bars), [numbers[quantity] or 0 for numbers in bars.values()])
        axis.set_xlabel(quantity)
    axis.invert_yaxis()
    figure.suptitle(device, fontsize=9)
    with told(path):
        figure.savefig(path, format="png")
    print(path)


if __name__ == "__main__":
    run(main)
