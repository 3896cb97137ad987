"""Table of what sweep.sh ran: python3 sbatch/sweep.py OUT. A row a setting: the last validation, or
the success of rollouts, as the mean and deviation over its seeds."""
import json
import re
import statistics
import sys
from pathlib import Path

# metrics of one dataset or token position, of ablations and bootstraps: too many for a table
DETAIL = re.compile(r"/|_\d|_(low|high|trend|only|mean|true|train|unique|entropy)$")


def result_of(run: Path) -> dict:
    """{metric: value}; empty where nothing is finished."""
    if (run / "results.json").exists():
        tasks = json.loads((run / "results.json").read_text())["tasks"]
        return {task: counts["rate"] for task, counts in tasks.items() if counts["episodes"]}
    path = run / "metrics.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if any(name.startswith("val_") for name in row)]
    return rows[-1] if rows else {}


def main(out: Path):
    settings = {}                                           # {setting: [result of a run, ...]}
    for line in (out / "runs.txt").read_text().splitlines():
        setting, _, rest = line.partition(" --seed ")
        found = result_of(Path(rest.partition(" --out ")[2]))
        settings.setdefault(setting.strip(), []).extend([found] if found else [])
    names = list(dict.fromkeys(name for runs in settings.values() for run in runs for name in run
                               if not DETAIL.search(name)))
    lines = [f"| setting | runs | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for setting, runs in settings.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs if name in run]
            cells.append(f"{statistics.mean(values):.4g} ± {statistics.pstdev(values):.2g}"
                         if values else "")
        lines.append(f"| {setting} | {len(runs)} | {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
