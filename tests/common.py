"""What several test files use: the scripts as a user runs them, and their metrics."""
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TQDM_DISABLE": "1"}     # first

import tyro                                     # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TASKS = ["drawer-open", "faucet-close"]
TINY = ["--batch-size", "8", "--eval-batches", "1", "--eval-every", "1000", "--log-every", "1"]


def command(script, *args, processes=0):
    head = [sys.executable]
    if processes:
        head += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*head, str(ROOT / script), *map(str, args)]


def run(script, *args, processes=0, check=True, env=None):
    """Runs a script to its end; -> the finished process."""
    p = subprocess.run(command(script, *args, processes=processes), cwd=ROOT, env=env or ENV,
                       text=True, capture_output=True, timeout=300)
    if check and p.returncode:
        raise AssertionError(f"{script} {args} exited {p.returncode}\n{p.stdout[-2000:]}\n"
                             f"{p.stderr[-4000:]}")
    return p


def run_here(script, *args):
    """The same in this process, which has imported all that takes seconds."""
    stage = importlib.import_module(script.removesuffix(".py"))
    with mock.patch.object(signal, "signal"):               # pytest's own stay
        assert stage.main(tyro.cli(stage.Config, args=[*map(str, args)])) == 0


def start(script, *args):
    """Starts a script; -> the process, its errors in a pipe."""
    return subprocess.Popen(command(script, *args), env=ENV, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def metrics(folder, *keys):
    """{key: {step: value}} of a run."""
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {k: {r["step"]: r[k] for r in rows if k in r} for k in keys}


def expert_pictures(task, seed, steps):
    """In a simulation process: pictures and backgrounds at these steps of an expert's episode, and
    one more of the last step, viewed at level 0."""
    import rollout
    yield from ()                           # it asks for nothing
    world, pictures = rollout.world_at("metaworld", task, False), []
    world.reset(seed)
    for step in range(max(steps) + 1):
        if step in steps:
            pictures.append((world.image(64, "corner4"), world.background(64, "corner4")))
            last = rollout.view(world, "corner4", 64, rollout.Distraction((seed,), 0.0), step)
        world.step(world.expert())
    images, backgrounds = map(np.stack, zip(*pictures))
    return {"images": images, "backgrounds": backgrounds, "last": last}


def look_at_libero(name, task, seed):
    """In a simulation process: state and picture, and both after five steps up."""
    import rollout
    yield from ()                           # it asks for nothing
    world, found = rollout.world_at(name, task, False), []
    world.reset(seed)
    for steps in (0, 5):
        for _ in range(steps):
            world.step(np.array([0, 0, 1, 0, 0, 0, -1.0]))
        found += [world.state, world.image(64, "agentview")]
    return {"seen": found}


def fake_episodes(fails, stop_at=None):
    """In place of rollout.run_episodes: episodes of noise, a function of task and seed; those of
    fails(task, seed) fail, and job `stop_at` is interrupted."""
    def run_episodes(jobs, act, workers, label, new, another):
        for i, key in enumerate(jobs):
            if i == stop_at:
                raise KeyboardInterrupt
            while key and fails(*key[1:]):
                last, key = key, next(iter(another(key, {})), None)
            if not key:
                yield last, {}
                continue
            _, task, seed = key
            rng = np.random.default_rng((seed, *task.encode()))
            values = rng.standard_normal((5, 4))
            yield key, dict(
                images=rng.integers(0, 255, (5, 64, 64, 3), np.uint8), state=values, action=values,
                executed_action=values, reward=values[:, 0], seed=seed, success=True, further={})
    return run_episodes


def stage_args(stage, data, stages):
    extra = {"laq": [], "vla": ["--laq-ckpt", stages / "laq/laq.pt2"],
             "finetune": ["--init", stages / "vla/stage2", "--episodes-per-task", 2,
                          "--laq-ckpt", "pooled"]}[stage]
    return ["--data", data, *extra, *TINY]


class OnlyMeta(TorchDispatchMode):
    """As on a GPU, without one: tensors live on the device `meta`, and an operation that mixes them
    with CPU tensors, other than a copy, fails. Autocast knows no such device: left out here."""

    def __init__(self, monkeypatch):
        super().__init__()
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim]
        mixed = {x.device.type for x in tensors} == {"cpu", "meta"}
        assert not mixed or "copy" in str(operation), f"{operation} mixes devices"
        return operation(*args, **(kwargs or {}))
