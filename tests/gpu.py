"""The stages on a GPU machine without TensorFlow: on frame pairs that were packed into one file
where TensorFlow is.

    python tests/gpu.py pack --data data --mix metaworld_corner4        # writes pairs.npz
    python tests/gpu.py vla --laq-ckpt pooled --steps 20 ...            # as `python vla.py ...`
    torchrun --nproc_per_node=2 tests/gpu.py vla ...

Everything but the reader is the stages' own: pinned memory, copies, models, losses, checkpoints,
hand-over files.
"""
import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PACKED = Path("pairs.npz")
CHUNK = 50                                  # actions that are packed with a pair


def pack(*args):
    """Writes each split's pairs, 64 px, of the dataset that a stage's --data and --mix name."""
    import data_oxe
    cfg = tyro.cli(data_oxe.DataConfig, args=args)
    entry = data_oxe.find_entry(cfg.data, cfg.mix)
    out = {"entry": json.dumps(asdict(entry))}
    for split, count in (("train", 2560), ("val", 384)):
        loader = data_oxe.Loader(replace(cfg, pairs_per_episode=16), split, 64, 64, chunk=CHUNK,
                                 follow=1)
        batches = list(loader.peek(count // 64))
        for name in batches[0]:
            joined = np.concatenate([np.asarray(batch[name]) for batch in batches])
            out[f"{split}/{name}"] = joined
    np.savez_compressed(PACKED, **out)
    print(f"wrote {PACKED}, {PACKED.stat().st_size / 1e6:.0f} MB")


def without_tensorflow():
    """data_oxe, with a Loader that reads PACKED."""
    import data_oxe
    packed = dict(np.load(PACKED))

    class Packed(data_oxe.Loader):
        def __init__(self, cfg, split, batch_size, image_size, *, horizon_s=None, chunk=1, seed=0,
                     rank=0, world=1, follow=0, **others):
            entry = data_oxe.Entry(**json.loads(str(packed["entry"])))
            rows = {name.partition("/")[2]: x for name, x in packed.items()
                    if name.startswith(split)}
            moments = [0] * (2 + follow) if horizon_s == 0 else range(2 + follow)
            rows["frames"] = rows["frames"][:, list(moments)]
            self.rows = {name: x[:, :chunk] if name in ("actions", "action_mask") else x
                         for name, x in rows.items()}
            self.batch_size, self.image_size, self.position = batch_size, image_size, (0, 0)
            self.seed = seed + 1_000_003 * rank if split == "train" else 0
            episodes = len(np.unique(rows["episode"]))
            self.plans = [SimpleNamespace(name=cfg.mix, entry=entry, used=episodes)]
            self.describe_mix_of(cfg.mix, entry, episodes)
            self.identity = {"pack": len(rows["episode"]), "rank": rank, "world": world}

        def describe_mix_of(self, name, entry, episodes):
            self.names, self.horizon = (name,), {name: {"steps": entry.offset, "seconds": 0.1}}
            self.action_dim, self.state_dim = 4, 4
            self.motion_dims, self.source_size = {name: [0, 1, 2]}, {name: 64}
            self.counts = {name: {"used": episodes}}
            self.share = {name: 1.0}

        def summary(self):
            return f"{len(self.rows['episode'])} packed pairs"

        def read(self, position):
            return self.batches(position)

        def batches(self, position):
            step = position[0]
            while True:
                rng = np.random.default_rng((self.seed, step))
                chosen = rng.permutation(len(self.rows["episode"]))
                chosen = np.resize(chosen, self.batch_size)
                step += 1
                batch = {name: x[chosen] for name, x in self.rows.items()}
                yield batch | {"instruction": batch["instruction"].tolist()}, (step, 0)

        def state_dict(self):
            return {"position": list(self.position), **self.identity}

        def load_state_dict(self, state):
            self.position = tuple(state["position"])

    data_oxe.Loader = Packed


VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
REAL = ["--laq-ckpt", "pooled", "--trunk", VLM, "--random-init", "--dtype", "bfloat16"]
FULL, FROZEN = [*REAL, "--batch-size"], [*REAL, "--freeze", "trunk", "--batch-size"]
BENCHES = {                                 # name: stage, its flags
    "500M full": ("vla", *FULL, "48"),
    "500M full, compiled": ("vla", *FULL, "48", "--compile"),
    "500M frozen": ("vla", *FROZEN, "48"),
    "500M frozen, compiled": ("vla", *FROZEN, "48", "--compile"),
    "500M full, 96": ("vla", *FULL, "96"),
    "500M full, 144": ("vla", *FULL, "144"),
    "500M frozen, 512": ("vla", *FROZEN, "512"),
    "500M full, layers twice": ("vla", *FULL, "256", "--parallel", "fsdp"),
    "7B full": ("vla", *REAL[:2], "--trunk", "dual-7b", *REAL[4:], "--parallel", "fsdp",
                "--batch-size", "1"),
    "laq base": ("laq", "--size", "base", "--dtype", "bfloat16", "--batch-size", "256"),
    "laq base, compiled": ("laq", "--size", "base", "--dtype", "bfloat16", "--batch-size", "256",
                           "--compile"),
    "laq tiny": ("laq", "--batch-size", "32"),
    "vla tiny": ("vla", "--laq-ckpt", "pooled"),
    "finetune tiny": ("finetune", "--init", "none", "--laq-ckpt", "pooled"),
}
STEPS = 30                                  # the last ten of them count


class Enough(Exception):
    """A bench has seen its steps."""


def bench(*chosen):
    """Trains each configuration for some steps; prints its speed and the memory that it took."""
    import gc
    import time

    import torch
    without_tensorflow()
    for name in chosen or BENCHES:
        stage_name, *flags = BENCHES[name]
        stage = importlib.import_module(stage_name)
        cfg = tyro.cli(stage.Config, args=[
            *flags, "--out", f"runs/bench/{name.replace(' ', '_')}", "--overwrite",
            "--eval-batches", "1", "--steps", "1000"])
        rows, began = [], time.time()

        def write(log, step, values, rows=rows):
            if "samples_per_s" in values:
                rows.append((time.time(), values))
            if step == STEPS:
                raise Enough
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with mock.patch.object(stage.Logger, "write", write):
            try:
                stage.main(cfg)
                outcome = "ended"
            except Enough:
                (first, _), *_, (_, last) = rows
                outcome = (f"{last['samples_per_s']:.1f} samples/s, mfu {last['mfu']:.2f}, waits "
                           f"for data {last['data_wait']:.1%}, loss {last['loss']:.3f}")
            except torch.OutOfMemoryError as error:
                outcome = str(error).splitlines()[0]
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f"{name}: {outcome}, {memory:.1f} GiB, {time.time() - began:.0f} s", flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def main(what: str, *args):
    if what in ("pack", "bench"):
        return {"pack": pack, "bench": bench}[what](*args)
    without_tensorflow()
    stage = importlib.import_module(what)
    stage.run(stage.main, tyro.cli(stage.Config, args=args))


if __name__ == "__main__":
    main(*sys.argv[1:])
