"""Table and plot of what label_efficiency.sh measured: python sbatch/label_efficiency.py OUT

Reads OUT/TASKSET+LEVEL/ARM+SEED/demosD_stepsN_seedF/rollout/results.json; D is 0 where all episodes
are labelled. Fine-tuning seeds of one pretraining seed are averaged; intervals are the 95% of
rollout.py's bootstrap, over pretraining seeds and over environment seeds, which all arms share, and
never narrower than Wilson's. A difference to `learned` is of the pretraining seeds that both have;
of one seed its interval is of the environment seeds alone.
TFLOP are of forward and backward of what learns, in all stages that led to a policy; labelling and
decoding, forward passes of frozen networks, are not counted.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import rollout  # noqa: E402

matplotlib.use("Agg")
NAME = re.compile(r"(?P<setting>[a-z]+\d+)/(?P<arm>[a-z]+)(?P<seed>\d+)/"
                  r"demos(?P<demos>\d+)_steps(?P<steps>\d+)_seed(?P<again>\d+)/rollout")
BASE = "learned"
COLUMNS = "setting demos steps arm success low high difference its_low its_high both seeds runs " \
          "episodes tflop".split()
SEED = 1                                    # --seed of label_efficiency.sh's evaluations


def read(out: Path) -> tuple[dict, dict]:
    """{(setting, demos, steps): {arm: {pretraining seed: [evaluations of rollout.py]}}}, and the
    TFLOP of a run, {(setting, demos, steps, arm): TFLOP}."""
    cells, compute = {}, {}
    for path in sorted(out.glob("*/*/*/rollout/results.json")):
        found = NAME.fullmatch(str(path.parent.relative_to(out)))
        if found:
            key = found["setting"], int(found["demos"]), int(found["steps"])
            seeds = cells.setdefault(key, {}).setdefault(found["arm"], {})
            evaluation = rollout.read_evaluation(path.parent)
            if (seed := evaluation["config"].get("seed")) != SEED:
                raise SystemExit(f"label_efficiency: '{path}' is of --seed {seed}, not {SEED}: of "
                                 f"an earlier version; give another OUT")
            seeds.setdefault(int(found["seed"]), []).append(evaluation)
            tflop = total_tflop(path.parents[1])
            compute[*key, found["arm"]] = max(tflop, compute.get((*key, found["arm"]), 0.0))
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


def row_of(key: tuple, arms: dict, arm: str, tflop: float) -> dict:
    """One line of the table: an arm's success and its difference to BASE, of a cell's evaluations
    by arm and pretraining seed."""
    rate, drawn, episodes = resample({arm: arms[arm]})[arm]
    low, high = rollout.wilson(rate * episodes, episodes)
    widest = np.nanquantile(drawn, [0.025, 0.975]).clip(0, 1)
    values = [*key, arm, rate, min(low, widest[0]), max(high, widest[1]), *[None] * 3]
    both = arms[arm].keys() & arms.get(BASE, {}).keys() if arm != BASE else ()
    if both:
        pair = resample({name: {seed: arms[name][seed] for seed in both} for name in (arm, BASE)})
        (mine, its_drawn, _), (base, base_drawn, _) = pair[arm], pair[BASE]
        values[-3:] = mine - base, *np.nanquantile(its_drawn - base_drawn, [0.025, 0.975])
    runs = sum(map(len, arms[arm].values()))
    values += [len(both), len(arms[arm]), runs, episodes, tflop]
    return dict(zip(COLUMNS, values, strict=True))


def resample(arms: dict) -> dict[str, tuple]:
    """{arm: {seed: [evaluations]}} -> {arm: (rate, rates of the bootstrap's draws, episodes of a
    seed that ended)}"""
    success = {}
    for name, seeds in arms.items():
        each = [np.nanmean([rollout.outcomes(run) for run in its], 0) for its in seeds.values()]
        success[name] = np.stack(each)                              # (seeds, tasks, episodes)
    drawn = rollout.bootstrap(success)
    return {name: (rollout.rates(x)[-1], drawn[name][:, -1], np.isfinite(x).sum() // len(x))
            for name, x in success.items()}


def main(out: Path):
    cells, compute = read(out)
    if not cells:
        raise SystemExit(f"label_efficiency: no results in '{out}'")
    for arms in cells.values():
        runs = {arm: [run for its in seeds.values() for run in its] for arm, seeds in arms.items()}
        rollout.check_comparable(runs)
    order = [BASE, *sorted({arm for arms in cells.values() for arm in arms} - {BASE})]
    rows = [row_of(key, cells[key], arm, compute[*key, arm])
            for key in sorted(cells) for arm in order if arm in cells[key]]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| video | demonstrations | iterations | arm | success [95%] | less {BASE} | seeds "
             f"| runs | episodes | TFLOP |", "|" + "---|" * 10]
    lines += [describe(row) for row in rows]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(rows, order, out / "success.png")
    print(f"{out}/table.md, results.csv, success.png")


def describe(row: dict) -> str:
    less = ""
    if row["difference"] is not None:
        less = "{difference:+.2f} [{its_low:+.2f}, {its_high:+.2f}]".format(**row)
        if row["both"] < row["seeds"]:
            less += f" of {row['both']}"
    demos = row["demos"] or "all"
    return (f"| {row['setting']} | {demos} | {row['steps']} | {row['arm']} "
            f"| {row['success']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {less} "
            f"| {row['seeds']} | {row['runs']} | {row['episodes']} | {row['tflop']:.1f} |")


def plot(rows: list[dict], arms: list[str], path: Path):
    """A row a setting: success over demonstrations after the iterations that most cells have, and
    over iterations with two demonstrations, or as many as there are. Dashed: an arm to which all
    episodes are labelled."""
    settings = sorted({row["setting"] for row in rows})
    steps = Counter(row["steps"] for row in rows).most_common()
    steps = max(steps, key=lambda item: item[::-1])[0]
    few = sorted({row["demos"] for row in rows} - {0})
    demos = 2 if 2 in few else max(few, default=0)
    fig, axes = plt.subplots(len(settings), 2, figsize=(9, 3.2 * len(settings)), squeeze=False)
    for setting, (left, right) in zip(settings, axes):
        mine = [row for row in rows if row["setting"] == setting]
        for number, arm in enumerate(arms):
            its = [row for row in mine if row["arm"] == arm]
            at_steps = [row for row in its if row["steps"] == steps]
            curve(left, "demos", [row for row in at_steps if row["demos"]], arm, number)
            curve(right, "steps", [row for row in its if row["demos"] in (0, demos)], arm, number)
            for row in at_steps:
                if not row["demos"]:
                    left.axhline(row["success"], color=f"C{number}", ls="--", label=arm)
        left.set(title=f"{setting}, {steps} iterations", xlabel="demonstrations a task")
        right.set(title=f"{setting}, {demos} demonstrations", xlabel="iterations")
        right.set_xscale("symlog", linthresh=100)                   # 0 is one of them
        for ax, ticks in ((left, few), (right, sorted({row["steps"] for row in mine}))):
            ax.set(ylim=(0, 1), ylabel="success")
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()
            if ax.has_data():
                ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def curve(ax, x: str, rows: list[dict], arm: str, number: int):
    rows = sorted(rows, key=lambda row: row[x])
    if rows:
        mean, low, high = (np.array([row[name] for row in rows])
                           for name in ("success", "low", "high"))
        ax.errorbar([row[x] for row in rows], mean, (mean - low, high - mean), color=f"C{number}",
                    label=arm, marker="o", capsize=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
