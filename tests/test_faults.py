"""What goes wrong by itself: processes die, files are damaged, disks fill. `bash tests/faults.sh`
kills more often."""
import os
import random
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import metrics, run_here, stage_args, start
from torch import nn

import vla

KILLS = int(os.environ.get("KILLS", 1))


def trains(log, since):
    """Whether a run that was started at `since` has logged a step, or is about to."""
    if not log.exists() or log.stat().st_mtime < since:
        return False
    return '"loss"' in log.read_text().rpartition("\n{")[2]


@pytest.mark.parametrize("stage", ["laq", "vla", "finetune"])
def test_killed_runs_continue_as_unbroken_ones(stage, data, stages, tmp_path, capsys):
    """A checkpoint is being written most of the time, so kills hit that, too. The report card, if
    the stage has one, compares with the untrained model, not with where the run went on."""
    steps = 12 + 12 * KILLS                                 # more than are done between two kills
    args = [*stage_args(stage, data, stages), "--steps", steps, "--save-every", 1]
    run_here(f"{stage}.py", *args, "--out", tmp_path / "whole")
    card = capsys.readouterr().out.partition("report card")[2]
    broken, log = tmp_path / "broken", tmp_path / "broken/metrics.jsonl"
    args += ["--out", broken, "--resume", "auto"]
    for seed in range(KILLS):
        began = time.time()
        process = start(f"{stage}.py", *args)
        while not trains(log, began) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert process.returncode == -signal.SIGKILL or seed, "the run ended before it was killed"
        print(f"kill {seed + 1}: at step {log.read_text().count('grad_norm')} of {steps}")
    with open(log, "a") as file:
        file.write('{"step": 7, "lo')                       # a line that the disk had no room for
    run_here(f"{stage}.py", *args)
    assert capsys.readouterr().out.partition("report card")[2] == card
    assert "at the start" in card or stage != "vla"
    whole, resumed = (metrics(x, "loss")["loss"] for x in (tmp_path / "whole", broken))
    assert list(resumed) == list(whole) == list(range(steps))
    np.testing.assert_allclose([*resumed.values()], [*whole.values()], rtol=1e-4)


@pytest.fixture
def saved(tmp_path):
    """A run's Saver that has left checkpoints of steps 1, 2, 3 and 4, and its folder."""
    model, loader = nn.Linear(300, 300), SimpleNamespace(state_dict=dict)
    cfg = vla.Config(out=str(tmp_path), lr=1.0, save_every=1)
    save = vla.Saver(cfg, model, vla.make_optimizer(cfg, model), loader)
    for step in range(1, 5):
        save(step, wait=False)
    save.finish()
    return save, tmp_path


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(saved, capsys):
    _, folder = saved
    cfg = vla.Config(out=str(folder), resume="auto")
    last, before, oldest = (folder / name for name in vla.CHECKPOINTS)

    def taken():
        cfg.resume = "auto"
        vla.find_run(cfg)
        return step_of(cfg.resume), capsys.readouterr().err
    assert taken() == (4, "")
    whole = last.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]
    zeroed = whole[:half] + bytes(50) + whole[half + 50:]
    for damaged in (b"", whole[:half], bytes(len(whole)), zeroed, flipped):
        last.write_bytes(damaged)
        assert taken() == (3, f"warning: checkpoint '{last}' is damaged\n")
        cfg.resume = str(last)
        with pytest.raises(SystemExit, match="is damaged or is not a checkpoint"):
            vla.find_run(cfg)
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
    assert [step_of(folder / name) for name in vla.CHECKPOINTS] == [4, 3, 2]


def test_a_checkpoint_is_of_the_step_at_which_it_was_asked_for(saved):
    save, folder = saved
    before = save.model.weight.detach().clone()
    save.thread.submit(time.sleep, 0.3)                     # a slow disk
    save(5, wait=False)
    with torch.no_grad():
        save.model.weight.zero_()
    save.finish()
    assert torch.equal(torch.load(folder / "last.pt", weights_only=True)["model"]["weight"], before)


@pytest.fixture
def spread(saved):
    """A run whose frequent checkpoints lie on the node's own disk: its Saver, OUT, that folder."""
    save, folder = saved
    (folder / "run_id").write_text("abc")
    save.cfg.scratch, save.cfg.keep_every = str(folder / "disk"), 2
    for step in range(5, 50):
        save.judge(step, abs(step - 7))
        save(step, wait=False)
    save.finish()
    return save, folder, folder / "disk/nanolapa_abc"


def test_checkpoints_go_where_they_last(spread):
    """Frequent ones to the node's disk; some to OUT for longer, with the best and the last one."""
    save, folder, disk = spread
    assert [step_of(disk / name) for name in vla.CHECKPOINTS] == [49, 48, 47]
    durable = [int(path.stem[5:]) for path in sorted(folder.glob("step_*.pt"))]
    assert durable == [20, *range(30, 49, 2)]
    assert step_of(folder / "best.pt") == 7 and step_of(folder / "last.pt") == 4
    save = vla.Saver(save.cfg, save.model, save.optimizer, save.loader)             # continued
    save.judge(51, 0.5)
    assert save.due(51) and save.paths(51, False) == [disk / "last.pt"]
    save(51, wait=True)
    assert step_of(folder / "last.pt") == 51 and not disk.exists()


def test_a_new_run_clears_the_old_one_away(spread, monkeypatch):
    """Else --resume auto would go on from what is left of it."""
    save, folder, disk = spread
    monkeypatch.setattr(vla, "matmul_rate", lambda device, dtype: 1.0)
    with pytest.raises(SystemExit, match="holds a run; continue it with --resume auto"):
        vla.find_run(save.cfg)
    vla.Logger(save.cfg, rank=0, world=1, start=0, flops=1, device=torch.device("cpu"))
    assert not [*folder.glob("*.pt"), *disk.glob("*.pt")]
    assert (folder / "run_id").read_text() != "abc"         # nor from what other nodes have of it


def test_a_run_continues_from_the_newest_checkpoint_of_any_node(spread, monkeypatch):
    """What one node alone has is copied to OUT, so that all ranks read the same file."""
    save, folder, disk = spread

    def taken(scratch, elsewhere=(-1, "")):
        cfg = vla.Config(out=str(folder), scratch=str(scratch), resume="auto")
        monkeypatch.setattr(vla, "of_all_ranks", lambda value: [value, elsewhere])
        return Path(vla.choose_checkpoint(cfg)).relative_to(folder).name
    assert taken("/another/node") == "step_00000048.pt"
    assert taken("/another/node", (60, "/node/2/last.pt")) == "step_00000060.pt"    # it copies
    assert not (folder / "step_00000060.pt").exists()
    assert taken(folder / "disk") == "step_00000049.pt"
    assert step_of(folder / "step_00000049.pt") == 49
    (disk / "last.pt").write_bytes(b"")
    assert taken(folder / "disk") == "step_00000049.pt"
    monkeypatch.setattr(vla, "of_all_ranks", lambda value: [value, 3])  # a disk that is not shared
    cfg = vla.Config(resume=str(folder / "last.pt"))
    with pytest.raises(SystemExit, match=r"see '.*' at different steps, \[3, 4\]"):
        vla.load_checkpoint(cfg, None, None, None, rank=0, world=2)
    with pytest.raises(SystemExit, match="'/fast' is lost with its node: give --keep-every"):
        vla.check_run(vla.Config(scratch="/fast"), 1)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 0, "model": Evil()}, "last.pt")
    vla.check_whole("last.pt", "--resume")                  # its checksums are right
    with pytest.raises(SystemExit, match="is not a checkpoint of this script"):
        vla.read_checkpoint("last.pt", "--resume")
    with pytest.raises(SystemExit, match="all checkpoints of '.' are damaged"):
        vla.find_run(vla.Config(out=".", resume="auto"))
    assert os.listdir() == ["last.pt"]
