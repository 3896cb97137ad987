"""Table and plot of what ladder.sh ran: python sbatch/ladder.py OUT. A row a run of OUT/runs.txt,
by its last validation."""
import json
import math
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from sweep import result_of

matplotlib.use("Agg")
COLUMNS = {"val_accuracy": "top-1", "val_accuracy_majority": "majority code",
           "val_accuracy_image_only": "image alone",
           "val_accuracy_instruction_only": "instruction alone", "val_top5": "top-5",
           "val_target_r2": "R2 of the target", "val_loss": "loss"}
RUNGS = "one batch", "one dataset", "three", "mix"


def runs_of(out: Path) -> dict:
    """{rung: (folder, last validation)} of those that have one, in order."""
    runs = {}
    for i, line in enumerate((out / "runs.txt").read_text().splitlines()):
        setting, _, folder = line.partition(" --seed 0 --out ")
        rung = RUNGS[i] if i < len(RUNGS) else f"mix, rate {setting.rpartition(' ')[2]}"
        if found := result_of(Path(folder)):
            runs[rung] = Path(folder), found
    return runs


def main(out: Path):
    runs = runs_of(out)
    if not runs:
        raise SystemExit(f"ladder: no validations in '{out}'")
    lines = [f"| run | step | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for rung, (_, found) in runs.items():
        cells = [f"{found[name]:.3f}" if name in found else "" for name in COLUMNS]
        lines.append(f"| {rung} | {found['step']} | {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(runs, out / "ladder.png")
    print(f"{out}/table.md, ladder.png")


def plot(runs: dict, path: Path):
    """Left what each run reached, beside its baselines; right its losses."""
    has_codes = any("val_accuracy" in values for _, values in runs.values())
    score = "accuracy" if has_codes else "target_r2"
    fig, (reached, losses) = plt.subplots(1, 2, figsize=(12, 4.5))
    found = [values for _, values in runs.values()]
    for name, marker in {"majority": "_", "image_only": "^", "instruction_only": "v"}.items():
        y = [values.get(f"val_{score}_{name}") for values in found]
        if None not in y:
            reached.plot(range(len(y)), y, marker, ms=12, mew=2, fillstyle="none",
                         label=name.replace("_", " "))
    y = [values.get(f"val_{score}", math.nan) for values in found]
    ends = [[abs(values.get(f"val_{score}_{end}", math.nan) - middle)           # of few episodes no
             for values, middle in zip(found, y)] for end in ("low", "high")]   # interval
    reached.errorbar(range(len(y)), y, ends, fmt="ko", capsize=3, label="prediction, 95%")
    reached.set_xticks(range(len(y)), list(runs), rotation=30, ha="right")
    reached.set(ylabel={"accuracy": "nearest code, top-1", "target_r2": "R2 of the target"}[score],
                title="last validation")
    reached.legend(fontsize=8)
    for rung, (folder, _) in runs.items():
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curve = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        losses.plot(*zip(*curve), label=rung)
    losses.set(xlabel="step", ylabel="loss of training batches", title="training")
    losses.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
