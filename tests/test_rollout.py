"""Closed loop of rollout.py: policies in one process, simulators in others, tables and checks."""
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rollout
import torch
from common import TASKS, run, start


def roll(**options):
    cfg = rollout.Config(**options)
    rollout.main(cfg)
    return cfg


def read(folder, name="results"):
    return json.loads((Path(folder) / f"{name}.json").read_text())


# ------------------------------------------------------------ whole evaluations
def test_several_policies_in_one_call_are_as_each_alone(stages, tmp_path, capsys):
    """The same noise for the same seed, whatever else is in a batch; --compare of what is finished
    gives the same table, torchrun the same successes."""
    policy = str(stages / "ft/policy")
    common = dict(episodes=2, max_steps=24, tasks=tuple(TASKS), distract=0.5)
    roll(policy=(f"a={policy},{policy}", f"b={stages}/ft"), out=str(tmp_path / "all"), **common)
    table = read(tmp_path / "all", "table")
    assert list(table) == ["a", "b"] and len(table["a"]["runs"]) == 2
    run("rollout.py", "--policy", policy, "--episodes", 2, "--max-steps", 24, "--tasks", *TASKS,
        "--distract", 0.5, "--out", tmp_path / "alone", processes=2)
    alone = read(tmp_path / "alone")
    assert alone["tasks"]["all"]["episodes"] == 4
    assert min(e["seed"] for e in alone["episodes"]) >= 1_000_000_000       # recording stays below
    for name in ("a_0", "a_1", "b"):
        found = read(tmp_path / "all" / name)
        for mine, its in zip(found["episodes"], alone["episodes"], strict=True):
            assert {**mine, "steps": 0} == {**its, "steps": 0}
        assert all((tmp_path / f"all/{name}/{t}.gif").stat().st_size > 1000 for t in TASKS)
    page = (tmp_path / "all/report.html").read_text()
    assert page.count("data:image/gif") == 6 and page.count("data:image/png") == 2
    shares = read(tmp_path / "all", "over_time")["b"]["share"]
    assert len(shares) == 25 and shares[-1] == table["b"]["tasks"]["all"]["rate"]

    capsys.readouterr()
    items = (f"a={tmp_path}/all/a_0,{tmp_path}/all/a_1", f"b={tmp_path}/all/b")
    roll(compare=items, out=str(tmp_path / "again"))
    out = capsys.readouterr().out
    assert read(tmp_path / "again", "table") == table
    assert "drawer-open (4)" in out and "8 of 8" in out and "--distract 0.5" in out
    with pytest.raises(SystemExit, match="alone' holds an evaluation, whose report"):
        roll(compare=items, out=str(tmp_path / "alone"))
    old = read(tmp_path / "alone")
    del old["config"]["distract"]                           # as before there was such an option
    (tmp_path / "alone/results.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="--distract of 'b' is 0.0, of 'a' 0.5"):
        roll(compare=(items[0], f"b={tmp_path}/alone"), out=str(tmp_path / "again"))


def test_an_evaluation_outlives_a_simulator_and_an_interruption(stages, tmp_path):
    """A worker is killed, then all of it is stopped; --resume runs what is missing, and only of the
    same settings and policy."""
    shutil.copytree(stages / "ft/policy", tmp_path / "policy")
    args = ["--policy", tmp_path / "policy", "--out", tmp_path / "out", "--tasks", *TASKS,
            "--max-steps", 24, "--workers", 2, "--episodes"]
    process, log = start("rollout.py", *args, 30), tmp_path / "out/episodes_0.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [x for x in children if "spawn_main" in Path(f"/proc/{x}/cmdline").read_text()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    told = ""
    while "died" not in told:
        piece = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        assert piece, f"it ended without a word of the death:{told}"
        told += piece
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    err = told + err
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert err.count("a simulation process died (exit code -9)") == 1, err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    before = log.read_text()
    assert 1 <= len(before.splitlines()) < 60
    log.write_text(before + '{"policy": 0, "ta')            # torn
    p = run("rollout.py", *args, 30, "--resume")
    assert f"{len(before.splitlines())} episodes are in" in p.stdout
    assert log.read_text().startswith(before)
    found = read(tmp_path / "out")
    assert len({(e["task"], e["seed"]) for e in found["episodes"]}) == 60 and not found["crashed"]
    common = dict(policy=(str(tmp_path / "policy"),), out=str(tmp_path / "out"),
                  tasks=tuple(TASKS), max_steps=24, resume=True)
    with pytest.raises(SystemExit, match="of another evaluation: replan was 0, is 4; remove") as e:
        roll(**common, episodes=30, replan=4)
    assert "\n" not in e.value.code
    (tmp_path / "policy/SHA256SUMS").unlink()
    (tmp_path / "policy/note").touch()
    with pytest.raises(SystemExit, match=r"of another evaluation: policy 0, \w+ was '"):
        roll(**common, episodes=30)
    assert read(tmp_path / "out") == found


def test_recorded_actions_succeed_again(data, tmp_path):
    roll(check="replay", data=str(data), episodes=6, tasks=tuple(TASKS), out=str(tmp_path))
    all_of_them = read(tmp_path)["tasks"]["all"]
    assert all_of_them["episodes"] == 12 and all_of_them["rate"] >= 0.95
    with pytest.raises(SystemExit, match="no successful episode of 'door-open', only of drawer-op"):
        roll(check="replay", data=str(data), tasks=("door-open",), out=str(tmp_path / "o"))


def test_an_episode_that_kills_its_process_is_named(tmp_path, monkeypatch, capsys):
    """It alone, however many were under way beside it; one that does so once is run again."""
    monkeypatch.setenv("FRAGILE", str(tmp_path / "mark"))
    cfg = rollout.Config(world="own_world:Fragile", max_steps=40)
    spec = {"camera": "render", "views": ["render"]}
    actions = np.zeros((30, 2))
    jobs = {(0, "Fragile", seed): (rollout.episode, "Fragile", seed, cfg, spec, False, actions)
            for seed in range(8)}
    results = dict(rollout.run_episodes(jobs, None, 2))
    assert len(results) == 8
    crashed = [key[2] for key, result in results.items() if "crashed" in result]
    assert crashed == [3] and results[0, "Fragile", 6]["steps"] == 30
    assert capsys.readouterr().err.count("a simulation process died (exit code 9)") == 3
    with pytest.raises(SystemExit, match="no episode has ended, and 'Fragile' at seed 3 crashed"):
        dict(rollout.run_episodes({k: job for k, job in jobs.items() if k[2] == 3}, None, 1))


# ------------------------------------------------------------ policies
def test_a_batch_is_as_its_episodes_one_by_one(stages, tmp_path):
    cfg = rollout.Config(policy=(str(stages / "ft/policy"),), tasks=tuple(TASKS), camera=())
    one, = rollout.policies(cfg)
    rng = np.random.default_rng(0)
    seen = [(rng.integers(0, 255, (1, 64, 64, 3), np.uint8),
             rng.standard_normal(4, np.float32), rng.standard_normal((8, 4), np.float32))
            for _ in range(5)]
    tasks = [TASKS[i % 2] for i in range(5)]
    together = one.act(tasks, seen)
    alone = [one.act([task], [x])[0] for task, x in zip(tasks, seen)]
    assert together.shape == (5, 8, 4)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_a_policy_moves_to_another_device(stages, monkeypatch):
    """As to a GPU, where all evaluations on one begin."""
    monkeypatch.setattr(rollout, "device_here", lambda: "meta")
    monkeypatch.setattr(rollout, "policy_at", rollout.policy_at.__wrapped__)
    policy, device = rollout.policy_at(str(stages / "ft/policy"))
    with torch.device("meta"):
        tokens = torch.zeros(3, 32, dtype=torch.int64)
        chunks = policy(torch.zeros(3, 64, 64, 3, dtype=torch.uint8), torch.zeros(3, 4), tokens,
                        tokens, torch.zeros(3, 8, 4))
    assert device == chunks.device.type == "meta" and chunks.shape == (3, 8, 4)


def test_overlapping_chunks_are_averaged_as_in_act():
    chunks = {0: np.full((4, 2), 1.0), 2: np.full((4, 2), 2.0), 3: np.full((4, 2), 4.0)}
    assert rollout.blended(chunks, 3, None).tolist() == [4, 4]
    weights = np.exp(-0.5 * np.arange(3))
    expected = weights @ [1, 2, 4] / weights.sum()          # the oldest has the largest weight
    assert rollout.blended(chunks, 3, 0.5) == pytest.approx(expected)
    assert rollout.blended(chunks, 5, 0.0) == pytest.approx(3)


def test_checks_show_other_sentences_and_black_pictures():
    sentences = rollout.METAWORLD_SENTENCES
    cfg = rollout.Config(tasks=tuple(TASKS), check="scrambled")
    assert rollout.instructions(cfg) == {a: sentences[b] for a, b in zip(TASKS, TASKS[::-1])}

    class World:
        cameras = "left", "right"

        def image(self, size, camera):
            return np.full((size, size, 3), 1 + self.cameras.index(camera), np.uint8)
    spec = {"source_size": 8, "views": ["right", "absent", "left"]}
    for check, expected in {"": [2, 0, 1], "blind": [0, 0, 0]}.items():
        cfg = rollout.Config(check=check)
        views = rollout.distractions_of("x", 0, spec["views"], cfg)
        pictures = rollout.look(World(), cfg, spec, views, 0)
        assert pictures.shape == (3, 8, 8, 3) and pictures.max((1, 2, 3)).tolist() == expected


# ------------------------------------------------------------ tables
def evaluation(success, crashed=()):
    """results.json of one task with these successes."""
    episodes = [dict(task="x", seed=i, success=bool(s), steps=5) for i, s in enumerate(success)
                if i not in crashed]
    return {"tasks": {"x": {}, "all": {}}, "episodes": episodes, "policy": "p", "seeds": [0, 1],
            "crashed": [dict(task="x", seed=i, crashed=True) for i in crashed],
            "policy_manifest": {"camera": "c", "chunk": 8},
            "config": {"replan": 0, "ensemble": None, "check": ""}}


def test_differences_are_paired_and_both_variances_shown():
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.5
    better = base | (rng.random(200) < 0.1)                 # never worse on a seed
    table = rollout.tabulate({"base": [evaluation(base)], "better": [evaluation(better)]})
    row, other = table["better"]["tasks"]["all"], table["base"]["tasks"]["all"]
    difference, low, high = row["difference"]
    assert difference == pytest.approx(better.mean() - base.mean())
    assert 0 < low < difference < high
    unpaired = math.sqrt(2) * (row["high"] - row["low"])
    assert high - low < 0.6 * unpaired
    assert (other["low"], other["high"]) == rollout.wilson(int(base.sum()), 200)
    assert table["base"]["of_episodes"] == pytest.approx(math.sqrt(0.25 / 200), rel=0.02)

    seeds = [evaluation(rng.random(200) < p) for p in (0.3, 0.9)]
    arm = rollout.tabulate({"base": [evaluation(base)], "arm": seeds})["arm"]
    assert arm["between_seeds"] == pytest.approx(np.std(arm["training_seeds"], ddof=1))
    row = arm["tasks"]["all"]
    assert row["low"] < 0.4 and row["high"] > 0.8           # as wide as the seeds are apart
    assert arm["of_episodes"] < 0.05

    half = rollout.tabulate({"base": [evaluation(base)],
                             "broken": [evaluation(better, crashed=range(50))]})["broken"]
    assert half["tasks"]["x"]["episodes"] == 150 and len(half["crashed"]) == 50
    assert half["tasks"]["x"]["rate"] == pytest.approx(better[50:].mean())


def test_a_policy_whose_episodes_all_crashed_has_no_result(tmp_path, capsys):
    success = np.arange(8) % 2
    for name, crashed in {"good": (), "dead": range(8)}.items():
        found = evaluation(success, crashed)
        found["config"] |= {"max_steps": 9, "distract": 0.0}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    good, dead = tmp_path / "good", tmp_path / "dead"
    for arms in ((f"good={good}", f"dead={dead}"), (f"dead={dead}", f"good={good},{dead}")):
        roll(compare=arms, out=str(tmp_path / "out"))
        told, page = capsys.readouterr(), (tmp_path / "out/table.json").read_text()
        table = json.loads(page, parse_constant=pytest.fail)            # NaN is no JSON
        assert table["dead"]["tasks"]["all"]["rate"] is None and told.out.count("no result") == 3
        assert (table["good"]["tasks"]["x"]["rate"], table["good"]["training_seeds"]) == (.5, [.5])
        for name in ("success", "over_time"):
            json.loads((tmp_path / f"out/{name}.json").read_text(), parse_constant=pytest.fail)


# ------------------------------------------------------------ errors
@pytest.mark.parametrize("options, changes, says", [
    ({}, {"action_dim": 7}, "action_dim is 7, metaworld has 4"),
    ({}, {"units_of": None}, "has no 'units_of'"),
    ({}, {"datasets": None}, "has no 'datasets'"),
    ({"replan": 9}, {}, "--replan 9: policy '.*' predicts 8 actions"),
    ({"ensemble": 0.01}, {}, "with --replan 0 those of policy .* give --replan in 1..7"),
    ({"check": "scrambled", "tasks": (TASKS[0],)}, {}, "only 'drawer-open'"),
    ({"tasks": (TASKS[0], TASKS[0])}, {}, "names a task twice"),
    ({"twice": True}, {}, "there is a 'FT' already; give NAME=FOLDER"),
])
def test_a_policy_that_does_not_fit_is_one_line(options, changes, says, stages, tmp_path):
    policy = tmp_path / "FT/policy"
    shutil.copytree(stages / "ft/policy", policy)
    spec = {**read(policy, "manifest"), **changes}
    (policy / "manifest.json").write_text(json.dumps({k: x for k, x in spec.items() if x}))
    (policy / "SHA256SUMS").unlink()
    policies = (str(policy),) * (2 if options.pop("twice", False) else 1)
    with pytest.raises(SystemExit, match=says) as error:
        roll(policy=policies, out=str(tmp_path / "out"), **options)
    assert "\n" not in error.value.code and not (tmp_path / "out").exists()
