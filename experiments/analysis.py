"""Numbers and tables from the stored JSON alone: curves, time to a target, the text of docs/results.md."""

import json
import statistics


def load(folder):
    """{arm: [run, ...]} of a setting's result folder, seeds in order; a tuning run's seconds count its trunk's too."""
    runs = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["arm"], []).append(run)
    order = list(next(iter(runs.values()))[0]["setting"]["arms"]) if runs else []
    runs = {arm: runs[arm] for arm in order if arm in runs}
    for arm, found in runs.items():
        for run in found:
            if run["start"]:
                trunk = next(other for other in runs[run["start"][0]] if other["seed"] == run["seed"])
                spent = next(s["train_s"] for s in trunk["snapshots"] if s["step"] == run["start_step"])
                run["snapshots"] = [s | {"train_s": s["train_s"] + spent} for s in run["snapshots"]]
    return runs


def crossing(x, fd, target):
    """Where a falling curve first reaches `target`, on the straight line between the points beside it; None if it never does."""
    if fd[0] <= target:
        return x[0]
    for (x0, y0), (x1, y1) in zip(zip(x, fd), zip(x[1:], fd[1:])):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def shares_to_target(runs, arm, baseline, key):
    """Per seed, what `arm` needs of `key` (train_s, flops) to the baseline's final FD, as a share of the baseline's; None: not reached."""
    shares = []
    for run in runs[arm]:
        last = next(other for other in runs[baseline] if other["seed"] == run["seed"])["snapshots"][-1]
        found = crossing([s[key] for s in run["snapshots"]], [s["fd"] for s in run["snapshots"]], last["fd"])
        shares.append(None if found is None else found / last[key])
    return shares


def mean_spread(values, digits=2):
    """"mean ± standard deviation", or the one number; "not reached" where a value is None."""
    if None in values:
        return f"not reached in {sum(value is None for value in values)} of {len(values)} seeds"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean} (one seed)"


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def final_table(runs):
    rows = [[found[0]["title"], len(found), found[0]["start_step"] + found[0]["steps"] if found[0]["start"] else found[0]["steps"],
             mean_spread([run["snapshots"][-1]["train_s"] for run in found], 0),
             f"{statistics.mean(run['snapshots'][-1]['flops'] for run in found) / 1e12:.2f}",
             mean_spread([run["final"]["fd"] for run in found]),
             mean_spread([100 * run["final"]["accuracy"] for run in found], 0),
             mean_spread([run["guided"]["fd"] for run in found]),
             mean_spread([100 * run["guided"]["accuracy"] for run in found], 0)] for found in runs.values()]
    return table(["arm", "seeds", "steps", "training s", "TFLOP", "FD", "class named right, %", "FD guided", "right, guided, %"], rows)


def target_table(runs, baselines=("unmasked", "dit")):
    rows = [[found[0]["title"], runs[baseline][0]["title"], *(mean_spread(shares_to_target(runs, arm, baseline, key))
                                                              for key in ("train_s", "flops"))]
            for arm, found in runs.items() if arm.startswith("masked") for baseline in baselines if baseline in runs]
    return table(["arm", "reaches the final FD of", "with this share of its time", "of its FLOPs"], rows)


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
    for name, make in (("real", real_table), ("steps", gain_table), ("paper", paper_table), ("memory", memory_table)):
        path = folder / f"{'paper' if name == 'memory' else name}.json"
        if path.is_file():
            found[name] = make(json.loads(path.read_text()))
    return found


def fill(text, found):
    """Put each table between its markers <!-- name --> and <!-- /name -->; markers without a table stay as they are."""
    for name, content in found.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        body, end, tail = rest.partition(f"<!-- /{name} -->")
        if begin and end:
            text = f"{head}{begin}\n{content}\n\n{end}{tail}"
    return text
