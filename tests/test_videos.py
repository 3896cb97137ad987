"""Videos of one's own, without actions, in the first two stages: CPU, offline."""
import pytest
from common import TINY, metrics, run_here
from test_data import loader_of, write_video

import data_oxe


@pytest.fixture(scope="module")
def own_videos(tmp_path_factory):
    """Twelve videos, as a dataset in which each has its own caption, and as one without."""
    folder = tmp_path_factory.mktemp("videos")
    clips = folder / "clips"
    clips.mkdir()
    for i in range(12):
        write_video(clips / f"{i}.mp4", 20 * i)
    (folder / "captions.csv").write_text("".join(f"{i},push block {i}\n" for i in range(12)))
    for name, captions in {"told": str(folder / "captions.csv"), "silent": ""}.items():
        data_oxe.from_videos(str(clips), name, data=str(folder), captions=captions, size=64)
    return folder


def args_of(own_videos, mix, out):
    return ["--data", own_videos, "--mix", mix, "--out", out, *TINY, "--val-fraction", 0.25,
            "--steps", 1, "--eval-batches", 2]


def test_both_stages_learn_from_videos_of_ones_own(own_videos, tmp_path, capsys):
    """Whose captions all differ, or are missing. There is nothing to probe, and nothing is said."""
    pooled = "--laq-ckpt", "pooled"
    run_here("laq.py", *args_of(own_videos, "silent", tmp_path / "laq"))
    run_here("vla.py", *args_of(own_videos, "told", tmp_path / "vla"), *pooled)
    assert "no probe from few" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--mode actions learns actions, but no dataset of --mix"):
        run_here("vla.py", *args_of(own_videos, "told", tmp_path / "no"), "--mode", "actions")


def test_of_a_mix_with_videos_what_has_actions_is_probed(own_videos, data, tmp_path):
    (own_videos / "metaworld_corner4").symlink_to(data / "metaworld_corner4")
    mix, probe = "told:0.25,silent:0.25,metaworld_corner4:0.5", "val_action_r2_few_readout"
    run_here("vla.py", *args_of(own_videos, mix, tmp_path), "--laq-ckpt", "pooled")
    assert metrics(tmp_path, probe)[probe]


def test_episodes_of_an_instruction_are_counted_strictly_or_at_most(own_videos):
    for name, at_most, used in (("told", 2, 9), ("silent", 2, 2)):
        loader = loader_of(own_videos, name, "train", 8, 32, val_fraction=0.25, at_most=at_most)
        assert loader.counts[name]["used"] == used
    for name, says in (("told", "fewer than 2 training episodes"), ("silent", "no instructions")):
        with pytest.raises(SystemExit, match=says):
            loader_of(own_videos, name, "train", 8, 32, val_fraction=0.25, episodes_per_task=2)
