"""Speed and memory of data_oxe.Loader on this machine, beside a raw limit and a naive loader.

    python tests/bench_data.py --fake oxe29                     # the README's table
    python tests/bench_data.py --fake oxe29 --memory-batches 10000
    python tests/bench_data.py --fake oxe29 --against OTHER/data_oxe.py     # ratios to it

--fake first writes that mix's datasets into --data: their schemas, random numbers, 256x256 JPEG
pictures, 48 episodes of 40 steps each. Rows are processes of their own, taken in turns; figures are
medians of --repeats. The loader runs --threads threads.
"""
import importlib.util
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    data: str = "runs/bench"                # folder of the datasets
    mix: str = "oxe29"                      # the many datasets; the first of them is the one
    fake: str = ""                          # write this mix's datasets first, and use it
    pairs: int = 16000                      # of each measurement
    batch_size: int = 32
    size: int = 224                         # pixels a side of resized pictures
    threads: int = 2                        # of the loader
    repeats: int = 3                        # measurements of each row
    memory_batches: int = 0                 # also memory over so many batches; 0: not
    against: str = ""                       # another data_oxe.py with this interface
    out: str = "runs/bench"                 # bench.json


def load(path: str):
    """A data_oxe.py by its path."""
    spec = importlib.util.spec_from_file_location("data_oxe", path)
    module = sys.modules["data_oxe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status(key: str) -> float:
    """VmRSS, VmHWM (MB) or Threads of this process."""
    value = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(value) / (1 if key == "Threads" else 1024)


def bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def rate(batches, cfg: Config, began: float, warm: int = 100, pairs: int = 0) -> dict:
    """Draws pairs; per second and per CPU second of this process, first batch's delay, bytes read,
    memory."""
    next(batches)
    first = time.time() - began
    for _ in range(warm - 1):
        next(batches)
    count = (pairs or cfg.pairs) // cfg.batch_size
    read, wall, cpu = bytes_read(), time.time(), time.process_time()
    for _ in range(count):
        next(batches)
    wall, cpu, read = time.time() - wall, time.process_time() - cpu, bytes_read() - read
    n = count * cfg.batch_size
    return dict(wall=n / wall, cpu=n / cpu, first_s=first, kb=read / n / 1e3,
                rss_mb=status("VmHWM"), threads=status("Threads"))


def measure(kind: str, cfg: Config, mix: str, path: str) -> dict:
    """One row of the table, in a process of its own so that memory and threads are the row's."""
    oxe, began = load(path), time.time()

    def loader(resize, split="train", pairs=8):
        data = oxe.DataConfig(data=cfg.data, mix=mix, resize=resize, pairs_per_episode=pairs,
                              threads=cfg.threads, shuffle_mb=64 if split == "train" else 8)
        return oxe.Loader(data, split, cfg.batch_size, cfg.size)
    if kind == "naive":
        return rate(naive(oxe, cfg, mix), cfg, began, 1, 4 * cfg.batch_size)
    if kind == "memory":
        return memory(loader("cpu"), loader("cpu", "val"), cfg)
    resize, _, pairs = kind.removeprefix("raw ").partition(" ")
    stream = loader(resize, pairs=int(pairs or 8))
    if kind.startswith("raw"):                              # encoded pairs in memory, not in caches
        ds = stream.encoded((0, 0)).take(64 * cfg.batch_size).cache().repeat()
        ds = ds.map(oxe.no_autograph(lambda pair: stream.decoded(pair)["frames"]),
                    num_parallel_calls=cfg.threads)
        return rate(iter(stream.frugal(ds.batch(cfg.batch_size))), cfg, began)
    return rate(iter(stream), cfg, began)


def memory(train, val, cfg: Config) -> dict:
    """Resident memory with a second pipeline, 20 validations, and over many batches."""
    stream, marks = iter(train), []

    def mark(batches):
        for _ in batches:
            pass
        marks.append(status("VmRSS"))
    mark(islice(stream, 100))
    for _ in range(21):
        mark(val.peek(4))
    for _ in range(10):
        mark(islice(stream, cfg.memory_batches // 10))
    return dict(marks=marks, rss_mb=status("VmHWM"), threads=status("Threads"))


def naive(oxe, cfg: Config, mix: str, N: int = 8):
    """What one writes first: a TFDS dataset each, Python picks the pairs and shuffles them
    decoded."""
    rng, buffer = np.random.default_rng(0), []
    entries = {name: oxe.find_entry(cfg.data, name) for name in oxe.parse_mix(mix)}
    streams = {}
    for name, entry in entries.items():
        builder = oxe.open_builder(cfg.data, name, entry)
        streams[name] = iter(builder.as_dataset(split="train", shuffle_files=True).repeat())
    while True:
        while len(buffer) < 8 * cfg.batch_size:
            name = rng.choice(list(streams))
            frames = []
            for step in next(streams[name])["steps"]:
                for key in entries[name].image.split("/"):
                    step = step[key]
                frames.append(step.numpy())
            k = entries[name].offset
            for t in rng.integers(0, len(frames) - k, N):
                buffer.append(np.stack([frames[t], frames[t + k]]))
        rng.shuffle(buffer)
        yield np.stack([buffer.pop() for _ in range(cfg.batch_size)])


def alone(*arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main(cfg: Config):
    here = str(ROOT / "data_oxe.py")
    oxe = load(here)
    if cfg.fake:
        sys.path.insert(0, str(ROOT / "tests"))
        import fakes
        cfg.mix = cfg.fake
        fakes.write_mix(cfg.data, cfg.mix)
    names = list(oxe.parse_mix(cfg.mix))
    one, many, size = names[0], len(names), cfg.size
    if cfg.against:
        return compare(cfg, here, [(one, "gpu"), (cfg.mix, "gpu"), (one, "cpu"), (cfg.mix, "cpu")])
    rows = [("raw limit: two JPEG decodes a pair", "raw gpu", one),
            ("loader, 1 dataset, resize=gpu", "gpu", one),
            (f"loader, {many} datasets, resize=gpu", "gpu", cfg.mix),
            ("the same, 16 pairs an episode instead of 8", "gpu 16", cfg.mix),
            (f"raw limit, resized to {size}", "raw cpu", one),
            (f"loader, 1 dataset, resized to {size}", "cpu", one),
            (f"loader, {many} datasets, resized to {size}", "cpu", cfg.mix),
            (f"naive generator, {many} datasets", "naive", cfg.mix)]
    results = {label: [] for label, _, _ in rows}
    for _ in range(cfg.repeats):
        for label, kind, mix in rows:
            results[label].append(alone(kind, cfg, mix, here))
    print("| | pairs/s | pairs per CPU s | of raw | peak RSS MB | threads | first batch s "
          "| KB read a pair |")
    print("|---|---|---|---|---|---|---|---|")
    table = {}
    for label, found in results.items():
        r = table[label] = {k: float(np.median([x[k] for x in found])) for k in found[0]}
        raw = results[rows[0][0]]
        ratio = np.median([a["cpu"] / b["cpu"] for a, b in zip(found, raw)])
        print(f"| {label} | {r['wall']:.0f} | {r['cpu']:.0f} | {ratio:.2f} | {r['rss_mb']:.0f} "
              f"| {r['threads']:.0f} | {r['first_s']:.1f} | {r['kb']:.0f} |")
    if cfg.memory_batches:
        m = table["memory"] = alone("memory", cfg, cfg.mix, here)
        over = " ".join(f"{x:.0f}" for x in m["marks"][22:])
        print(f"resident MB: training {m['marks'][0]:.0f}, with a validation pipeline "
              f"{m['marks'][1]:.0f}, after 20 more of its openings {m['marks'][21]:.0f}, over "
              f"{cfg.memory_batches} batches {over}, peak {m['rss_mb']:.0f}, "
              f"{m['threads']:.0f} threads")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    (Path(cfg.out) / "bench.json").write_text(json.dumps(table, indent=1))


def compare(cfg: Config, here: str, rows: list):
    """Pairs per CPU second of this version over the other's, each pair of runs back to back."""
    for mix, resize in rows:
        ratios = []
        for i in range(cfg.repeats):
            order = (here, cfg.against) if i % 2 else (cfg.against, here)
            cpu = {path: alone(resize, cfg, mix, path)["cpu"] for path in order}
            ratios.append(cpu[here] / cpu[cfg.against])
        print(f"{mix[:40]} {resize}: median {np.median(ratios):.3f} of "
              f"{[round(r, 3) for r in ratios]}", flush=True)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
