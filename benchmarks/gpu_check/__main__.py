"""One command that proves this code on a new machine: every check PASS, FAIL or SKIP, with its figure.

    python3 -m benchmarks.gpu_check --json gpu_check.json    # all checks; those of several processes start torchrun on all GPUs
    python3 -m benchmarks.gpu_check --only "steps|loader"
    python3 -m benchmarks.gpu_check --speed                  # then XL/2's training speed as well
    torchrun --nproc-per-node 8 -m benchmarks.gpu_check      # only the checks of several processes

Without a GPU it runs what has a meaning on a CPU, with small sizes. The exit code is 1 if anything failed. The checks are in checks.py,
those of several processes and of speed in apart.py.
"""

import os
import re
import tempfile
import time
from pathlib import Path

from benchmarks.common import make_parser, start, write_json
from utils.cli import run


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="only checks in whose function name and text this is found")
    parser.add_argument("--speed", action="store_true", help="measure XL/2's training steps too, after the checks")
    return parser.parse_args(argv)


def run_checks(checks, place, only=""):
    """Rows {"check", "status", "figure", "seconds"}, printed as they come. A check that fails does not end the others. Collective."""
    from benchmarks.gpu_check.checks import Failed, Skip
    from utils import distributed
    from utils.logging import say

    rows = []
    for function, text, case in ((function, text, case) for function, text, cases in checks for case in cases):
        name = " ".join([text, *("float32" if part == "no" else str(part) for part in case)])
        if not re.search(only, f"{function.__name__} {name}"):
            continue
        begun = time.monotonic()
        try:
            status, figure = "PASS", function(place, *case)
        except Skip as reason:
            status, figure = "SKIP", str(reason)
        except Exception as error:  # of any kind: the others still count
            status, figure = "FAIL", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        status, figure = min(distributed.all_gather_object((status, figure)))  # FAIL before PASS: one rank that fails is enough
        rows.append({"check": name, "status": status, "figure": " ".join(figure.split()), "seconds": round(time.monotonic() - begun, 1)})
        say("{status}  {check}: {figure}  [{seconds} s]".format(**rows[-1]))
    return rows


def main(argv=None):
    args = parse_arguments(argv)
    device = start(args, tf32=False)
    from benchmarks.gpu_check.checks import CHECKS, Place
    from benchmarks.gpu_check.apart import RANK_CHECKS, SPEED_CHECKS
    from utils import distributed
    from utils.logging import say

    checks = RANK_CHECKS if "RANK" in os.environ else CHECKS + SPEED_CHECKS * args.speed
    distributed.init(timeout_s=120)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_checks(checks, Place(device, Path(folder)), args.only)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    say(", ".join(f"{number} {status}" for status, number in counts.items()))
    if args.json is not None and distributed.is_main():
        write_json(args.json, device, rows=rows)
    distributed.shutdown()
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    run(main)
