"""What goes wrong by itself: processes die, files are damaged, disks fill. `bash tests/faults.sh`
kills more often."""
import os
import random
import resource
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import metrics, run, stage_args, start
from torch import nn

import vla

KILLS = int(os.environ.get("KILLS", 1))


@pytest.mark.parametrize("stage", ["laq", "vla", "finetune"])
def test_killed_runs_continue_as_unbroken_ones(stage, data, stages, tmp_path):
    """A checkpoint is being written most of the time, so kills hit that, too."""
    args = [*stage_args(stage, data, stages), "--steps", 24, "--save-every", 1]
    run(f"{stage}.py", *args, "--out", tmp_path / "whole")
    broken = tmp_path / "broken"
    args += ["--out", broken, "--resume", "auto"]
    for seed in range(KILLS):
        process = start(f"{stage}.py", *args)
        while not (broken / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert process.returncode == -signal.SIGKILL or seed, "the run ended before it was killed"
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')                       # a line that the disk had no room for
    run(f"{stage}.py", *args)
    whole, resumed = (metrics(x, "loss")["loss"] for x in (tmp_path / "whole", broken))
    assert list(resumed) == list(whole) == list(range(24))
    np.testing.assert_allclose([*resumed.values()], [*whole.values()], rtol=1e-4)


@pytest.fixture
def saved(tmp_path):
    """A run's Saver that has left checkpoints of steps 1, 2, 3 and 4, and its folder."""
    model, loader = nn.Linear(300, 300), SimpleNamespace(state_dict=dict)
    cfg = vla.Config(out=str(tmp_path), lr=1.0)
    save = vla.Saver(cfg, model, vla.make_optimizer(cfg, model), loader)
    for step in range(1, 5):
        save(step, wait=False)
    save.finish()
    return save, tmp_path


def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(saved, capsys):
    _, folder = saved
    cfg = vla.Config(out=str(folder), resume="auto")
    last, before, oldest = (folder / name for name in vla.CHECKPOINTS)

    def taken():
        cfg.resume = "auto"
        vla.check_run(cfg, 1)
        return vla.read_checkpoint(cfg.resume, "--resume")["step"], capsys.readouterr().err
    assert taken() == (4, "")
    whole = last.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]
    zeroed = whole[:half] + bytes(50) + whole[half + 50:]
    for damaged in (b"", whole[:half], bytes(len(whole)), zeroed, flipped):
        last.write_bytes(damaged)
        assert taken() == (3, f"warning: checkpoint '{last}' is damaged\n")
        with pytest.raises(SystemExit, match="is damaged or is not a checkpoint"):
            vla.read_checkpoint(str(last), "--resume")
    last.unlink()                                           # killed between two renames
    before.write_bytes(b"")
    assert taken() == (2, f"warning: checkpoint '{before}' is damaged\n")
    oldest.write_bytes(b"")
    with pytest.raises(SystemExit, match="all checkpoints of .* are damaged"):
        taken()


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints(saved):
    save, folder = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        save(5, wait=False)                                 # training goes on until the next
        with pytest.raises(SystemExit, match="no checkpoint could be written to .* MB are free"):
            save(6, wait=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    steps = [torch.load(folder / name, weights_only=True)["step"] for name in vla.CHECKPOINTS]
    assert steps == [4, 3, 2]


def test_a_checkpoint_is_of_the_step_at_which_it_was_asked_for(saved):
    save, folder = saved
    before = save.model.weight.detach().clone()
    save.thread.submit(time.sleep, 0.3)                     # a slow disk
    save(5, wait=False)
    with torch.no_grad():
        save.model.weight.zero_()
    save.finish()
    assert torch.equal(torch.load(folder / "last.pt", weights_only=True)["model"]["weight"], before)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 0, "model": Evil()}, "last.pt")
    assert vla.newest_checkpoint(".") == "last.pt"          # its checksums are right
    with pytest.raises(SystemExit, match="is not a checkpoint of this script"):
        vla.read_checkpoint("last.pt", "--resume")
    assert os.listdir() == ["last.pt"]
