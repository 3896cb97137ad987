"""Data and runs that several test files use, made once, also by workers side by side."""
import fcntl
import os

import numpy as np
import pytest
import torch
from common import TASKS, TINY, run, run_here

with torch.device("meta"):                  # torch remembers its constructors at the first use, and
    torch.zeros(1)                          # transformers replaces linspace while it loads a model


def once(tmp_path_factory, name, make):
    """A folder that `make` fills; the first worker makes it, others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six episodes each of two tasks, recorded by the real simulator."""
    def record(folder):
        run("rollout.py", "--record", "--data", folder, "--episodes", 6, "--tasks", *TASKS)
    return once(tmp_path_factory, "data", record)


@pytest.fixture(scope="session")
def stages(data, tmp_path_factory):
    """The loop run once, small: folder with laq/, vla/ and ft/."""
    def train(out):
        run_here("laq.py", "--data", data, "--out", out / "laq", "--steps", 30, *TINY)
        run_here("vla.py", "--data", data, "--out", out / "vla", "--steps", 10, *TINY,
                 "--laq-ckpt", out / "laq/laq.pt2")
        run_here("finetune.py", "--data", data, "--out", out / "ft", "--steps", 10, *TINY,
                 "--init", out / "vla/stage2", "--episodes-per-task", 2,
                 "--laq-ckpt", out / "laq/laq.pt2")
    return once(tmp_path_factory, "stages", train)


def write_episodes(folder, same, frames=9):
    """Eight episodes of noise, one frame pair each; the same eight times or others."""
    import data_oxe
    import rollout
    rng, entry = np.random.default_rng(0), data_oxe.Entry(**rollout.MetaWorld.entry)
    with data_oxe.EpisodeWriter(str(folder), "metaworld_corner4", entry, 64) as writer:
        for i in range(8):
            if i == 0 or not same:
                images = rng.integers(0, 255, (frames, 64, 64, 3), np.uint8)
                action = rng.standard_normal((frames, 4))
            writer.add(images, np.zeros((frames, 4)), action, action, np.zeros(frames), "Do it",
                       task="x", seed=i, success=True, file_path="")
    return folder


@pytest.fixture(scope="session")
def same_episodes(tmp_path_factory):
    """Every rank sees the same batch."""
    return write_episodes(tmp_path_factory.mktemp("same"), same=True)


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """Data in no time: a loss falls on it, that is all."""
    return write_episodes(tmp_path_factory.mktemp("noise"), same=False)


@pytest.fixture(scope="session")
def single_frames(tmp_path_factory):
    """For policies: a batch of six is all training episodes, however many ranks divide them."""
    return write_episodes(tmp_path_factory.mktemp("single"), same=False, frames=1)
