"""LIBERO as a world of rollout.py; run by tests/libero.sh in an environment that has it."""
import json

import data_oxe
import numpy as np
import pytest
import rollout
from common import TINY, look_at_libero, run, run_here
from test_worlds import episodes_of

pytest.importorskip("libero", reason="LIBERO is not installed: bash tests/libero.sh")
WORLD, TASK = "libero/spatial", "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"


def test_starts_are_reproducible_and_actions_move_the_hand():
    seeds = (3, 4, 3, rollout.EVALUATION, rollout.EVALUATION + 1)
    jobs = {(i, TASK, seed): (look_at_libero, WORLD, TASK, seed) for i, seed in enumerate(seeds)}
    results = dict(rollout.run_episodes(jobs, None, 1))
    found = [results[key]["seen"] for key in jobs]
    for one, other in zip(found[0], found[2]):
        assert np.array_equal(one, other)
    assert (found[0][1] != found[1][1]).any() and (found[3][1] != found[4][1]).any()
    for state, image, later, picture in found:
        assert state.shape == (8,) and 0.01 < later[2] - state[2] < 0.3     # metres, upwards
        assert np.abs(later[:2] - state[:2]).max() < 0.02
        assert (image != picture).any() and image.std() > 20


def test_a_policy_acts_and_is_recorded(tmp_path):
    world, rng = rollout.find_world(WORLD), np.random.default_rng(0)
    entry = data_oxe.Entry(**world.entry)
    with data_oxe.EpisodeWriter(str(tmp_path), "libero_spatial_agentview", entry, 64) as writer:
        for i in range(4):                                  # no demonstrations come with LIBERO
            values = rng.standard_normal((20, 8))
            writer.add(rng.integers(0, 255, (20, 64, 64, 3), np.uint8), values, values[:, :7],
                       values[:, :7], values[:, 0], "Do it", task=TASK, seed=i, success=True,
                       file_path="")
    run_here("finetune.py", "--data", tmp_path, "--mix", "libero_spatial_agentview", "--init",
             "none", "--episodes-per-task", 0, "--out", tmp_path / "ft", "--steps", 2, *TINY)
    common = ["--world", WORLD, "--tasks", TASK, "--policy", tmp_path / "ft/policy", "--episodes",
              1, "--max-steps", 6, "--workers", 1]
    run("rollout.py", *common, "--out", tmp_path / "closed")
    report = json.loads((tmp_path / "closed/results.json").read_text())
    assert report["tasks"]["all"]["episodes"] == 1 and report["episodes"][0]["steps"] == 6
    run("rollout.py", *common, "--record", "--keep", "all", "--data", tmp_path / "recorded",
        "--camera", "agentview", "robot0_eye_in_hand")
    episode, = episodes_of(tmp_path / "recorded/libero_spatial_agentview/1.0.0")
    assert len(episode["steps"]) == 6 and not episode["success"]
    step = episode["steps"][0]
    assert step["observation"]["image_robot0_eye_in_hand"].std() > 10
    assert step["language_instruction"].decode() == world.sentences()[TASK]
