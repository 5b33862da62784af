"""Numbers and tables from the stored JSON alone: curves, time to a target, the text of docs/results.md."""

import json
import statistics

from utils.cli import UserError


def read(folder, name):
    """A result file of a folder. Raises FileNotFoundError naming the command that makes it."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such results; python3 -m experiments.{'run' if name == 'real' else 'costs'} makes them")
    return json.loads(path.read_text())


def load(folder):
    """{arm: [run, ...]} of a setting's result folder, seeds in order.

    Each snapshot gets its `seconds` (see step_seconds), the last one the score of the final samples, of which there are more.
    """
    runs = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["arm"], []).append(run)
    order = list(next(iter(runs.values()))[0]["setting"]["arms"]) if runs else []
    runs = {arm: runs[arm] for arm in order if arm in runs}
    times = read(folder, "arms")["rows"] if runs else []
    for arm, found in runs.items():
        for run in found:
            spent = run["start_step"] * step_seconds(times, run["start"][0], 0) if run["start"] else 0.0
            run["snapshots"][-1] |= run["final"]
            for snapshot in run["snapshots"]:
                done = snapshot["step"] - run["start_step"]
                flops = (snapshot["flops"] - run["start_flops"]) / done
                snapshot["seconds"] = spent + done * step_seconds(times, arm, flops)
    return runs


def step_seconds(times, arm, flops):
    """Seconds of a training step, measured with all arms in turn, so that what else the machine did met all of them.

    times: rows of arms.json. An arm that is not there (a tuning one) is on the straight line between the unmasked arm and
    masked-50, at `flops` per step.
    """
    seconds = {row["arm"]: statistics.median(row["seconds"]) for row in times}
    if arm in seconds:
        return seconds[arm]
    work = {row["arm"]: row["flops"] for row in times}
    share = (flops - work["masked-50"]) / (work["unmasked"] - work["masked-50"])
    return seconds["masked-50"] * (1 - share) + seconds["unmasked"] * share


def crossing(x, fd, target):
    """Where a falling curve first reaches `target`, on the straight line between the points beside it; None if it never does."""
    if fd[0] <= target:
        return x[0]
    for (x0, y0), (x1, y1) in zip(zip(x, fd), zip(x[1:], fd[1:])):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def shares_to_target(runs, arm, baseline, key, at=-1):
    """Per seed, what `arm` needs of `key` (seconds, flops) to the FD of the baseline's snapshot `at`, as a share of what that took.

    None: not reached.
    """
    shares = []
    for run in runs[arm]:
        goal = next(other for other in runs[baseline] if other["seed"] == run["seed"])["snapshots"][at]
        found = crossing([s[key] for s in run["snapshots"]], [s["fd"] for s in run["snapshots"]], goal["fd"])
        shares.append(None if found is None else found / goal[key])
    return shares


def step_ratios(times, arm, baseline):
    """Seconds of a step of `arm` over one of `baseline`, round by round."""
    rows = {row["arm"]: row["seconds"] for row in times}
    return [a / b for a, b in zip(rows[arm], rows[baseline])]


def mean_spread(values, digits=2):
    """"mean ± standard deviation", or the one number; where values are None, how many, and the mean of the others."""
    there = [value for value in values if value is not None]
    missing = f"not reached in {len(values) - len(there)} of {len(values)} seeds" if len(there) < len(values) else ""
    if not there:
        return missing
    mean = f"{statistics.mean(there):.{digits}f}"
    text = f"{mean} ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else mean
    return f"{text}, {missing}" if missing else text if len(there) > 1 else f"{text} (one seed)"


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def final_table(runs):
    rows = [[found[0]["title"], len(found), found[0]["start_step"] + found[0]["steps"] if found[0]["start"] else found[0]["steps"],
             f"{statistics.mean(run['snapshots'][-1]['seconds'] for run in found):.0f}",
             f"{statistics.mean(run['snapshots'][-1]['flops'] for run in found) / 1e12:.2f}",
             mean_spread([run["snapshots"][-1]["fd"] for run in found]),
             mean_spread([100 * run["snapshots"][-1]["accuracy"] for run in found], 0),
             mean_spread([run["guided"]["fd"] for run in found]),
             mean_spread([100 * run["guided"]["accuracy"] for run in found], 0)] for found in runs.values()]
    return table(["arm", "seeds", "steps", "training s", "TFLOP", "FD", "class named right, %", "FD guided", "right, guided, %"], rows)


def target_table(runs, baselines=("unmasked", "dit")):
    """Snapshots after the first; of arms with one seed the last only."""
    rows = []
    for arm, found in ((arm, found) for arm, found in runs.items() if arm.startswith("masked")):
        count = len(found[0]["snapshots"])
        for baseline in (baseline for baseline in baselines if baseline in runs):
            for at in range(1 if len(found) > 1 else count - 1, count):
                rows.append([found[0]["title"], runs[baseline][0]["title"], f"{(at + 1) / count:.2f}",
                             *(mean_spread(shares_to_target(runs, arm, baseline, key, at)) for key in ("flops", "seconds"))])
    return table(["arm", "reaches the FD of", "after this share of the FLOPs", "with this share of those FLOPs", "of that time"], rows)


def speed_table(times):
    rows = [[row["arm"], f"{1000 * statistics.median(row['seconds']):.0f}", f"{row['flops'] / statistics.median(row['seconds']) / 1e9:.0f}",
             "{:.2f} ({:.2f} - {:.2f})".format(*(f(step_ratios(times, row["arm"], "unmasked")) for f in (statistics.median, min, max)))]
            for row in times]
    return table(["arm", "ms per step", "GFLOP/s", "time of a step, times the unmasked one"], rows)


def curve_table(runs):
    rows = []
    for arm, found in runs.items():
        if not found[0]["start"]:
            shares = zip(*([s["fd"] for s in run["snapshots"]] for run in found))
            rows.append([found[0]["title"], *(mean_spread(values) for values in shares)])
    count = len(rows[0]) - 1
    return table(["FD at this share of the FLOPs", *(f"{(i + 1) / count:.2f}" for i in range(count))], rows)


def gains(steps):
    """[(width, tokens, gain in time as a list of the rounds' ratios, gain in FLOPs)]: unmasked over half masked."""
    by = {(row["width"], row["tokens"], row["arm"]): row for row in steps["rows"]}
    return [(width, tokens, [a / b for a, b in zip(row["seconds"], by[width, tokens, "masked"]["seconds"])],
             row["flops_per_image"] / by[width, tokens, "masked"]["flops_per_image"])
            for (width, tokens, arm), row in by.items() if arm == "unmasked"]


def gain_table(steps):
    rows = [[width, tokens, f"{statistics.median(times):.2f} ({min(times):.2f} - {max(times):.2f})", f"{flops:.2f}"]
            for width, tokens, times, flops in gains(steps)]
    return table(["encoder width", "tokens", "time, unmasked / half masked", "FLOPs"], rows)


def paper_table(paper):
    by = {(row["resolution"], row["size"], row["arm"]): row["training_flops"] / 1e9 for row in paper["rows"]}
    rows = [[size, resolution, *(f"{by[resolution, size, a]:.0f}" for a in ("dit", "unmasked", "masked")),
             f"{by[resolution, size, 'dit'] / by[resolution, size, 'masked']:.2f}"]
            for resolution, size, arm in by if arm == "dit"]
    return table(["size", "resolution", "DiT, GFLOP per image", "unmasked", "half masked", "DiT / half masked"], rows)


def memory_table(paper):
    rows = [[row["arm"], row["resolution"], f"{row['state_bytes'] / 1e9:.1f}", f"{row['kept_bytes_per_image'] / 1e6:.0f}",
             f"{(row['state_bytes'] + 32 * row['kept_bytes_per_image']) / 1e9:.1f}"]
            for row in paper["rows"] if "state_bytes" in row]
    return table(["XL/2", "resolution", "state, GB", "kept per image, MB", "batch 32, GB"], rows)


def real_table(real):
    rows = [[name, row["images"], f"{row[key]['fd']:.3f}", f"{100 * row[key]['accuracy']:.0f}"] for row in real["rows"]
            for key, name in (("real", "real training images"), ("decoded", "the same, encoded and decoded"))]
    return table(["images", "number", "FD", "class named right, %"], rows)


def tables(folder):
    """{marker: markdown} of everything in a result folder."""
    runs = load(folder)
    found = {"final": final_table(runs), "target": target_table(runs), "curve": curve_table(runs)}
    for name, make, file in (("real", real_table, "real"), ("arms", lambda content: speed_table(content["rows"]), "arms"),
                             ("steps", gain_table, "steps"), ("paper", paper_table, "paper"), ("memory", memory_table, "paper")):
        if (folder / f"{file}.json").is_file():
            found[name] = make(json.loads((folder / f"{file}.json").read_text()))
    return found


def fill(text, found):
    """Put each table between its markers <!-- name --> and <!-- /name -->; markers without a table stay as they are."""
    for name, content in found.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        body, end, tail = rest.partition(f"<!-- /{name} -->")
        if begin and end:
            text = f"{head}{begin}\n{content}\n\n{end}{tail}"
    return text
