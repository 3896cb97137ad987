"""Table and plot of what label_efficiency.sh measured: python sbatch/label_efficiency.py OUT

Reads OUT/TASKSET+LEVEL/ARM+SEED/demosD_stepsN_seedF/rollout/results.json. A rate is the mean over
runs, its interval the 95% of a bootstrap that draws runs, and episodes within them. TFLOP are of
forward and backward in all stages that led to a policy.
"""
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")
NAME = re.compile(r"(?P<setting>[a-z]+\d+)/(?P<arm>[a-z]+3?)(?P<seed>\d)/"
                  r"demos(?P<demos>\d+)_steps(?P<steps>\d+)_seed(?P<again>\d+)/rollout")


def read(out: Path) -> tuple[dict, dict]:
    """{(setting, arm, demos, steps): [successes of a run, bool (episodes,), ...]}, and the same
    with the TFLOP of a run."""
    cells, compute = {}, {}
    for path in sorted(out.glob("*/*/*/rollout/results.json")):
        found = NAME.fullmatch(str(path.parent.relative_to(out)))
        if found:
            key = found["setting"], found["arm"], int(found["demos"]), int(found["steps"])
            episodes = json.loads(path.read_text())["episodes"]
            cells.setdefault(key, []).append(np.array([e["success"] for e in episodes]))
            compute[key] = total_tflop(path.parents[1])
    return cells, compute


def total_tflop(run: Path) -> float:
    """Of a stage and, as its configuration names them, the stages before it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    total = max((line.get("tflop", 0.0) for line in lines), default=0.0)
    manifest = next(run.glob("*/manifest.json"), None)              # of policy/ or stage2/
    if manifest is None:                                            # a quantizer, the first stage
        return total
    config = json.loads(manifest.read_text())["config"]
    quantizer, stage2 = (Path(config.get(name, "none")) for name in ("laq_ckpt", "init"))
    if stage2.name == "stage2":                                     # whose quantizer is the same
        total += total_tflop(stage2.parent)
    elif quantizer.suffix == ".pt2" and config.get("mode") != "actions":
        total += total_tflop(quantizer.parent)
    return total


def interval(runs: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean success and its 95% interval."""
    rng, means = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = [runs[i] for i in rng.integers(len(runs), size=len(runs))]
        means.append(np.mean([rng.choice(run, len(run)).mean() for run in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([run.mean() for run in runs])), float(low), float(high)


def main(out: Path):
    runs, compute = read(out)
    cells = {key: (*interval(runs[key]), len(runs[key]), compute[key]) for key in sorted(runs)}
    if not cells:
        raise SystemExit(f"label_efficiency: no results in '{out}'")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("setting arm demos steps success low high runs tflop".split())
        writer.writerows([*key, *map("{:.3f}".format, value[:3]), *value[3:]]
                         for key, value in cells.items())
    lines = ["| video | demonstrations | arm | iterations | success [95%] | runs | TFLOP |",
             "|" + "---|" * 7]
    for (setting, arm, demos, steps), (mean, low, high, n, tflop) in cells.items():
        lines.append(f"| {setting} | {demos} | {arm} | {steps} "
                     f"| {mean:.2f} [{low:.2f}, {high:.2f}] | {n} | {tflop:.1f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(cells, out / "success.png")
    print(f"{out}/table.md, results.csv, success.png")


def plot(cells: dict, path: Path):
    """A row a setting: success over demonstrations after the iterations that most cells have, and
    over iterations with two demonstrations, or as many as there are."""
    settings, arms = (sorted({key[i] for key in cells}) for i in (0, 1))
    cells_of = Counter(key[3] for key in cells)
    steps = max(cells_of, key=lambda n: (cells_of[n], n))
    demos = 2 if any(key[2] == 2 for key in cells) else max(key[2] for key in cells)
    fig, axes = plt.subplots(len(settings), 2, figsize=(9, 3.2 * len(settings)), squeeze=False)
    for row, setting in zip(axes, settings):
        for arm in arms:
            mine = {key[2:]: v for key, v in cells.items() if key[:2] == (setting, arm)}
            over_demos = {d: v for (d, n), v in mine.items() if n == steps}
            over_steps = {n: v for (d, n), v in mine.items() if d == demos}
            for ax, curve in zip(row, (over_demos, over_steps)):
                if curve:
                    mean, low, high, *_ = np.array(list(curve.values())).T
                    ax.errorbar(list(curve), mean, (mean - low, high - mean), label=arm,
                                marker="o", capsize=2)
        row[0].set(title=f"{setting}, {steps} iterations", xlabel="demonstrations a task")
        row[1].set(title=f"{setting}, {demos} demonstrations", xlabel="iterations")
        row[1].set_xscale("symlog", linthresh=100)                      # 0 is one of them
        for ax, i in zip(row, (2, 3)):
            values = sorted({key[i] for key in cells})
            ax.set(ylim=(0, 1), ylabel="success")
            ax.set_xticks(values, values, minor=False)
            ax.minorticks_off()
            if ax.has_data():
                ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
