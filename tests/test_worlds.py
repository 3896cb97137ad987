"""Worlds of rollout.py and what is recorded in them."""
import json
import resource

import data_oxe
import finetune
import numpy as np
import pytest
import rollout
import tensorflow_datasets as tfds
from common import TASKS, TINY, fake_episodes, run_here
from PIL import Image

REACH = "own_world:Reach"


def roll(**options):
    cfg = rollout.Config(**options)
    rollout.main(cfg)
    return cfg


def episodes_of(folder):
    """[{"task", "seed", "success", "steps": list}], as anyone with tfds reads a dataset."""
    episodes = tfds.as_numpy(tfds.builder_from_directory(str(folder)).as_dataset(split="train"))
    return [{**e["episode_metadata"], "steps": list(e["steps"])} for e in episodes]


@pytest.fixture(scope="module")
def reach(tmp_path_factory):
    """Six episodes of an expert in one's own environment, and a policy that has barely learned."""
    folder = tmp_path_factory.mktemp("reach")
    roll(world=REACH, record=True, data=str(folder), episodes=6, max_steps=40, image_size=32,
         workers=1)
    run_here("finetune.py", "--data", folder, "--mix", "own_world_reach_render", "--init", "none",
             "--episodes-per-task", 0, "--out", folder / "ft", "--steps", 3, *TINY)
    return folder


# ------------------------------------------------------------ worlds
def test_an_environment_of_one_s_own(reach, tmp_path, capsys):
    """Recorded by its expert, learned from, and acted in, in closed and open loop."""
    recorded = episodes_of(reach / "own_world_reach_render/1.0.0")
    assert len(recorded) == 6 and all(e["success"] for e in recorded)
    step = recorded[0]["steps"][0]
    assert step["observation"]["image"].shape == (32, 32, 3)
    assert step["observation"]["state"].shape == step["action"].shape == (2,)
    assert step["language_instruction"] == b"Move the dot to the cross"
    common = dict(world=REACH, policy=(str(reach / "ft/policy"),), max_steps=20, workers=1)
    roll(**common, episodes=3, out=str(tmp_path / "closed"))
    results = json.loads((tmp_path / "closed/results.json").read_text())
    assert results["tasks"]["all"]["episodes"] == 3
    roll(**common, episodes=3, record=True, keep="all", data=str(tmp_path), image_size=24)
    mine = episodes_of(tmp_path / "own_world_reach_render/1.0.0")
    assert [e["seed"] for e in mine] == [0, 1, 2] and not all(e["success"] for e in mine)
    assert "of 3 starts of 'Reach'" in capsys.readouterr().out
    entry = data_oxe.find_entry(str(tmp_path), "own_world_reach_render")
    assert entry.success == "episode_metadata/success" and entry.action == "executed_action:dd"


def test_open_loop_measures_what_a_policy_does(reach, tmp_path, monkeypatch, capsys):
    """A policy that says the recorded actions has no error, the mean's is about one deviation."""
    options = dict(policy=(str(reach / "ft/policy"),), data=str(reach), out=str(tmp_path))
    real, rows = rollout.predictions, {}

    def perfect(*args):
        rows.update(real(*args))
        return {key: (true, true, mask) for key, (_, true, mask) in rows.items()}
    monkeypatch.setattr(rollout, "predictions", perfect)
    roll(world="dataset", **options)
    out = capsys.readouterr().out
    errors = json.loads((tmp_path / "open_loop.json").read_text())["errors"]
    assert max(errors["policy"]) == 0 and 0.5 < min(errors["mean action"]) < 2
    assert "held-out episodes" in out and Image.open(tmp_path / "open_loop.png").width > 300
    recorded = episodes_of(reach / "own_world_reach_render/1.0.0")
    for episode in {episode for episode, _ in rows}:        # whole ones, step by step
        steps = recorded[episode]["steps"]
        assert [t for e, t in rows if e == episode] == list(range(len(steps)))
        for t, step in enumerate(steps):
            assert np.array_equal(rows[episode, t][1][0], step["executed_action"])


@pytest.mark.parametrize("options, says", [
    (dict(world="robocasa"), "unknown --world 'robocasa'; known: metaworld, pusht, libero"),
    (dict(world="absent:World"), "No module named 'absent'.*PYTHONPATH"),
    (dict(world="own_world:Absent"), "no attribute 'Absent'"),
    (dict(world="own_world:Discrete"), "its actions are Discrete.*must be a Box"),
    (dict(world="own_world:Wordless"), "has no instruction; give --sentence"),
    (dict(world=REACH, camera=("top",)), "unknown camera 'top', or twice; known: render"),
    (dict(world=REACH, distract=0.5, record=True), "cannot tell background from objects"),
    (dict(sentence="Do it"), "--sentence: --world metaworld has 50 tasks"),
    (dict(camera=("corner", "topview")), "corner topview: a policy looks from one"),
    (dict(world="dataset", record=True), "is recorded already"),
    (dict(world="dataset", max_steps=9), "no simulator: --max-steps 9 has no meaning there; leave"),
    (dict(world="metaworld", policy=("FT",)), "acts in the units of 'own_world_reach_render'"),
])
def test_a_world_that_does_not_fit_is_one_line(options, says, reach):
    if "policy" in options:
        options["policy"] = (str(reach / "ft/policy"),)
        spec = json.loads((reach / "ft/policy/manifest.json").read_text())
        assert spec["action_dim"] == 2
        says = "action_dim is 2, metaworld has 4"
    with pytest.raises(SystemExit, match=says) as error:
        roll(**options)
    assert "\n" not in error.value.code
    if options.get("world") == "own_world:Wordless":
        assert rollout.sentences_of(rollout.Config(**options, sentence="Go")) == {"Wordless": "Go"}


def test_pusht():
    pytest.importorskip("gym_pusht", reason="gym-pusht is not installed (README: other worlds)")
    with pytest.raises(SystemExit, match="pusht has no scripted expert to record"):
        roll(world="pusht", record=True)
    world = rollout.world_at("pusht", "PushTEnv", False)
    pictures = []
    for seed in (3, 4, 3):
        world.reset(seed)
        start = world.image(96, "render")
        for _ in range(5):
            reward, success = world.step(world.state + [60, 0])
        assert not success and 0 <= reward < 1 and world.state.shape == (2,)
        pictures.append((start, world.image(96, "render")))
    assert np.array_equal(pictures[0], pictures[2]) and (pictures[0][0] != pictures[1][0]).any()
    assert (pictures[0][0] != pictures[0][1]).any()


def test_worlds_that_are_not_installed_say_how():
    for name, says in (("gym_pusht", "pip install --no-deps gym-pusht"), ("libero", "libero.sh")):
        try:
            __import__(name)
        except ImportError:
            world = "pusht" if name == "gym_pusht" else "libero/spatial"
            with pytest.raises(SystemExit, match=says):
                rollout.find_world(world)


# ------------------------------------------------------------ recording
def test_several_cameras_in_one_pass(data, tmp_path):
    """The first is as if recorded alone; further ones stand beside it and in the entry."""
    roll(record=True, data=str(tmp_path), episodes=1, tasks=(TASKS[0],), workers=1,
         camera=("corner4", "topview"))
    both, = episodes_of(tmp_path / "metaworld_corner4/1.0.0")
    alone = next(e for e in episodes_of(data / "metaworld_corner4/1.0.0")
                 if e["task"] == TASKS[0].encode() and e["seed"] == both["seed"])
    assert len(both["steps"]) == len(alone["steps"])
    for one, other in zip(both["steps"], alone["steps"]):
        further = one["observation"].pop("image_topview")
        assert further.shape == (64, 64, 3) and (further != one["observation"]["image"]).any()
        for key, x in other["observation"].items():
            assert np.array_equal(one["observation"][key], x)
        assert np.array_equal(one["action"], other["action"])
    entry = data_oxe.find_entry(str(tmp_path), "metaworld_corner4")
    assert entry.cameras == "observation/image_topview"


def test_a_recording_outlives_starts_that_kill_its_process(tmp_path, monkeypatch, capsys):
    """Another start takes the place of one that does so twice."""
    monkeypatch.setenv("FRAGILE", str(tmp_path / "mark"))
    roll(world="own_world:Fragile", record=True, data=str(tmp_path), episodes=8, max_steps=40,
         image_size=32, workers=2)
    recorded = episodes_of(tmp_path / "own_world_fragile_render/1.0.0")
    assert [e["seed"] for e in recorded] == [0, 1, 2, 3 + 8, 4, 5, 6, 7]
    said = capsys.readouterr()
    assert "recorded 8 of 8 episodes (9 tried, 1 crashed)" in said.out
    assert said.err.count("'Fragile' at seed 3 crashed twice; skipped") == 1


def test_a_recorded_policy_executes_its_chunks_as_an_evaluated_one():
    """Here blended: its nth chunk says n throughout."""
    cfg = rollout.Config(world=REACH, camera=("render",), image_size=16, max_steps=6, noise=0.0,
                         keep="all", replan=2, ensemble=0.0)
    spec = {"chunk": 4, "action_dim": 2, "source_size": 16, "views": ["render"], "camera": "render"}
    for function, arguments in ((rollout.recorded_episode, ()), (rollout.episode, (False,))):
        episode, asked = function("Reach", 0, cfg, spec, *arguments), 0
        shown = next(episode)
        with pytest.raises(StopIteration) as end:
            while True:
                images, state, noise = shown
                assert images.shape == (1, 16, 16, 3) and noise.shape == (4, 2)
                asked += 1
                shown = episode.send(np.full((4, 2), asked / 100))
        assert asked == 3 and not end.value.value["success"]
        if function is rollout.recorded_episode:
            actions = np.stack(end.value.value["action"])[:, 0]
            assert actions == pytest.approx([0.01, 0.01, 0.015, 0.015, 0.025, 0.025])


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert (a["task"], a["seed"], a["success"]) == (b["task"], b["seed"], b["success"])
        assert all(np.array_equal(x["observation"]["image"], y["observation"]["image"])
                   for x, y in zip(a["steps"], b["steps"], strict=True))


def test_an_interrupted_recording_goes_on(tmp_path, monkeypatch, capsys):
    """After Ctrl-C, a kill that tore the last file, and a disk that was full: what was written
    stays, what follows is as if nothing had happened."""
    monkeypatch.setattr(data_oxe, "SHARD", 4)
    cfg = dict(record=True, episodes=6, tasks=tuple(TASKS))

    def go(name, **options):
        def fails(task, seed):                              # first starts, and all of one job's
            return seed < 6 or seed % 6 == 2
        monkeypatch.setattr(rollout, "run_episodes", fake_episodes(fails, **options))
        roll(**cfg, data=str(tmp_path / name))
        return capsys.readouterr()
    whole = go("whole")
    assert "recorded 10 of 12 episodes (60 tried)" in whole.out
    with pytest.raises(KeyboardInterrupt):
        go("broken", stop_at=6)
    assert "4 episodes stay in" in capsys.readouterr().err
    partial = tmp_path / "broken/metaworld_corner4/.1.0.0.partial"
    with pytest.raises(KeyboardInterrupt):
        go("broken", stop_at=3)                 # of what was left
    last = sorted(partial.glob("*.tfrecord-*"))[-1]
    with last.open("ab") as file:
        file.write(last.read_bytes()[:5000])                # the next one, torn
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(SystemExit, match="cannot write to '.*partial'.*make room"):
            go("broken")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = int(capsys.readouterr().err.split(" episodes stay in")[-2].split()[-1])
    assert kept == 7                                        # two in the file that broke off
    with pytest.raises(SystemExit, match="begun with other options .episodes 6, not 7"):
        roll(**{**cfg, "episodes": 7}, data=str(tmp_path / "broken"))
    after = go("broken")
    assert f"{kept} episodes are there" in after.out
    assert "recorded 10 of 12 episodes (60 tried)" in after.out
    assert "'drawer-open' (0.17), so it has 5 of 6 episodes" in after.err
    equal(*(episodes_of(tmp_path / f"{name}/metaworld_corner4/1.0.0")
            for name in ("whole", "broken")))
