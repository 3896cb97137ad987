"""Several cameras all the way: recorded in one pass, learned from, and shown in closed loop."""
import json

import finetune
import numpy as np
import pytest
import rollout
import torch
import tyro
from common import TASKS, TINY, run_here
from test_worlds import episodes_of, roll


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Four episodes of two cameras, and a policy that has barely learned from them."""
    folder = tmp_path_factory.mktemp("views")
    roll(record=True, data=str(folder), episodes=4, tasks=(TASKS[0],), workers=1, seed=1,
         camera=("corner4", "topview"))
    run_here("finetune.py", "--data", folder, "--init", "none", "--episodes-per-task", 0,
             "--out", folder / "ft", "--steps", 2, "--cameras", 2, *TINY)
    return folder


def test_a_policy_is_shown_what_each_of_its_cameras_sees(views, tmp_path, monkeypatch):
    """Where an episode starts as a recorded one does, the pictures are those recorded."""
    answer, first = rollout.Tested.answer, {}

    def watched(self, shown):
        for (_, _, seed), (images, *_) in shown.items():
            first.setdefault(seed, images)
        return answer(self, shown)
    monkeypatch.setattr(rollout.Tested, "answer", watched)
    monkeypatch.setattr(rollout, "EVALUATION", rollout.SEEDS)           # where --seed 1 records
    roll(policy=(str(views / "ft"),), episodes=2, tasks=(TASKS[0],), max_steps=10, workers=1,
         out=str(tmp_path))
    recorded = {e["seed"]: e["steps"][0]["observation"]
                for e in episodes_of(views / "metaworld_corner4/1.0.0")}
    assert sorted(first) == [rollout.SEEDS, rollout.SEEDS + 1]
    for seed, images in first.items():
        assert images.shape == (2, 64, 64, 3)
        for image, key in zip(images, ("image", "image_topview")):
            assert np.array_equal(image, recorded[seed][key]), key
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"]["all"]["episodes"] == 2
    assert results["policy_manifest"]["views"] == ["corner4", "topview"]


def test_video_is_learned_from_with_all_cameras(views):
    """Of the moment of the first frame; the frames that are decoded are of the first camera."""
    cfg = tyro.cli(finetune.Config, args=["--data", str(views), "--cameras", "2"])
    cpu = torch.device("cpu")
    labeller = finetune.load_labeller("pooled", cpu)
    sources = finetune.Sources(cfg, 64, labeller, 8, 0, 1)
    _, video = next(iter(sources.to(cpu)))
    recorded = episodes_of(views / "metaworld_corner4/1.0.0")
    shown = finetune.pictures(video).numpy()
    assert shown.shape == (4, 2, 64, 64, 3) and video["frames"].shape == (4, 3, 64, 64, 3)
    frames = video["frames"].numpy()
    for e, t, images, decoded in zip(video["episode"], video["step"], shown, frames):
        steps = recorded[e]["steps"]
        seen = [steps[min(t + k, len(steps) - 1)]["observation"] for k in (0, 8, 16)]
        assert np.array_equal(images, [seen[0]["image"], seen[0]["image_topview"]])
        assert np.array_equal(decoded, [x["image"] for x in seen])
