"""LeRobot's datasets, laid out by hand as versions 2.1 and 3.0 are, become RLDS."""
import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tensorflow_datasets as tfds
from common import ROOT                         # noqa: F401  the scripts' folder comes first

import data_oxe

FPS, LENGTHS = 10, [24, 19, 21]
CAMERAS = ["observation.images.top", "observation.images.wrist-left"]
TASKS = ["Push it", "Pull it"]


def grey(camera: int, episode: int, t: int) -> int:
    """Tells the picture: neighbouring frames differ by 9 levels."""
    return 9 * t + 4 * episode + 2 * camera


def write_video(path, greys):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1", "g": "7"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for level in greys:
            image = np.full((64, 96, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def rows_of(episode: int) -> dict:
    T = LENGTHS[episode]
    t = np.arange(T)
    return {"observation.state": [[float(x), episode, 0.5] for x in t],
            "action": [[x + 1.0, 0.1 * x] for x in t],
            "next.success": [bool(episode and x == T - 1) for x in t],
            "timestamp": (t / FPS).astype(np.float32), "frame_index": t,
            "episode_index": np.full(T, episode), "index": t + sum(LENGTHS[:episode]),
            "task_index": np.full(T, episode % 2)}


def write_rows(path, episodes: list[int]):
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [rows_of(episode) for episode in episodes]
    table = {key: [x for part in parts for x in part[key]] for key in parts[0]}
    shuffled = np.random.default_rng(0).permutation(len(table["index"]))
    parquet.write_table(pa.table(table).take(shuffled), path)


def write_info(folder, version: str, **more):
    features = {"observation.state": ("float32", [3]), "action": ("float32", [2]),
                "next.success": ("bool", [1]), **{key: ("video", [64, 96, 3]) for key in CAMERAS}}
    features = {key: {"dtype": dtype, "shape": shape} for key, (dtype, shape) in features.items()}
    features["observation.images.depth"] = {"dtype": "video", "shape": [64, 96, 1],
                                            "info": {"is_depth_map": True}}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(
        {"codebase_version": version, "fps": FPS, "features": features, **more}))


def version_2(folder, frames=lambda episode: LENGTHS[episode]):
    write_info(folder, "v2.1", chunks_size=2)
    lines = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": T}
             for e, T in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for e in range(len(LENGTHS)):
        chunk = f"chunk-{e // 2:03d}"
        write_rows(folder / f"data/{chunk}/episode_{e:06d}.parquet", [e])
        for c, key in enumerate(CAMERAS):
            write_video(folder / f"videos/{chunk}/{key}/episode_{e:06d}.mp4",
                        [grey(c, e, t) for t in range(frames(e))])


def version_3(folder):
    """The first file holds two episodes, the second, of another chunk, the third."""
    write_info(folder, "v3.0")
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})    # as pandas names it
    parquet.write_table(tasks, folder / "meta/tasks.parquet")
    files, rows = {(0, 0): [0, 1], (1, 3): [2]}, []
    for (chunk, file), episodes in files.items():
        name = f"chunk-{chunk:03d}/file-{file:03d}"
        write_rows(folder / f"data/{name}.parquet", episodes)
        for c, key in enumerate(CAMERAS):
            write_video(folder / f"videos/{key}/{name}.mp4",
                        [grey(c, e, t) for e in episodes for t in range(LENGTHS[e])])
        for e in episodes:
            row = {"episode_index": e, "tasks": [TASKS[e % 2]], "length": LENGTHS[e],
                   "data/chunk_index": chunk, "data/file_index": file, "stats/action/max": [9.0]}
            for key in CAMERAS:
                start = sum(LENGTHS[x] for x in episodes if x < e) / FPS
                row |= {f"videos/{key}/{what}": value for what, value in
                        dict(chunk_index=chunk, file_index=file, from_timestamp=start,
                             to_timestamp=start + LENGTHS[e] / FPS).items()}
            rows.append(row)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)


def read(folder) -> dict:
    """{episode: (steps, metadata)}"""
    out = {}
    for episode in tfds.builder_from_directory(str(folder)).as_dataset(split="train"):
        metadata = {key: value.numpy() for key, value in episode["episode_metadata"].items()}
        steps = list(episode["steps"].as_numpy_iterator())
        out[int(metadata["episode_index"])] = steps, metadata
    return out


@pytest.mark.parametrize("write", [version_2, version_3])
def test_every_row_comes_with_its_pictures(write, tmp_path):
    write(tmp_path / "source")
    data_oxe.from_lerobot(str(tmp_path / "source"), "robot", data=str(tmp_path), size=32)
    episodes = read(tmp_path / "robot/1.0.0")
    assert sorted(episodes) == [0, 1, 2]
    for e, (steps, metadata) in episodes.items():
        rows = rows_of(e)
        assert len(steps) == LENGTHS[e] and metadata["success"] == bool(e)
        for t, step in enumerate(steps):
            assert step["language_instruction"].decode() == TASKS[e % 2]
            np.testing.assert_array_equal(step["action"], np.float32(rows["action"][t]))
            np.testing.assert_array_equal(step["observation"]["state"],
                                          np.float32(rows["observation.state"][t]))
            for c, image in enumerate(["image", "image_wrist_left"]):
                picture = step["observation"][image]
                assert picture.shape == (32, 32, 3)
                assert np.abs(picture.astype(int) - grey(c, e, t)).max() < 4, (e, t, image)
    cfg = data_oxe.DataConfig(data=str(tmp_path), mix="robot", val_fraction=0)
    assert data_oxe.find_entry(str(tmp_path), "robot").cameras == "observation/image_wrist_left"
    batch = next(iter(data_oxe.Loader(cfg, "train", 4, 32, chunk=2)))
    assert not batch["instruction"].count("")                   # a policy's data, without failures
    assert set(batch["episode"].tolist()) <= {n for n, e in enumerate(episodes.values())
                                              if e[1]["success"]}


def test_fewer_steps_a_second(tmp_path):
    """Every fourth picture; deltas add up, a position is the last of the four."""
    version_3(tmp_path / "source")
    data_oxe.from_lerobot(str(tmp_path / "source"), "slow", data=str(tmp_path), size=32, fps=2.5,
                          kinds="pd", cameras=("wrist-left",))
    for e, (steps, _) in read(tmp_path / "slow/1.0.0").items():
        actions = np.float32(rows_of(e)["action"])
        assert len(steps) == -(-len(actions) // (4))
        for n, step in enumerate(steps):
            group = actions[4 * n:4 * n + 4]
            np.testing.assert_allclose(step["action"], [group[-1, 0], group[:, 1].sum()], rtol=1e-6)
            assert np.abs(step["observation"]["image"].astype(int) - grey(1, e, 4 * n)).max() < 4
    entry = data_oxe.find_entry(str(tmp_path), "slow")
    assert (entry.hz, entry.action, entry.offset) == (2.5, "action:pd", 1)


def test_a_video_shorter_than_its_table_is_named(tmp_path, capsys):
    version_2(tmp_path / "source", frames=lambda e: LENGTHS[e] - 3 * (e == 1))
    (tmp_path / "source/data/chunk-001/episode_000002.parquet").unlink()
    data_oxe.from_lerobot(str(tmp_path / "source"), "short", data=str(tmp_path), size=32)
    out, err = capsys.readouterr()
    assert "left out episode 1 of" in err and "but row 16 wants the picture at 1.600 s" in err
    assert "left out episode 2 of" in err and "1 episodes at 10 steps a second, 2 left out" in out
    assert list(read(tmp_path / "short/1.0.0")) == [0]


def test_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    """What was written before Ctrl-C stays."""
    version_3(tmp_path / "source")
    args = dict(source=str(tmp_path / "source"), name="robot", data=str(tmp_path), size=32)
    real, written = data_oxe.DatasetWriter.write, []

    def write(self, example):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(example["episode_metadata"]["episode_index"])
        real(self, example)

    monkeypatch.setattr(data_oxe, "SHARD", 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(data_oxe.DatasetWriter, "write", write)
        data_oxe.from_lerobot(**args)
    with pytest.raises(SystemExit, match="begun with other options"):
        data_oxe.from_lerobot(**args | {"kinds": "pg"})
    data_oxe.from_lerobot(**args)
    assert "continuing" in capsys.readouterr().out
    assert sorted(read(tmp_path / "robot/1.0.0")) == [0, 1, 2]


@pytest.mark.parametrize("change, message", [
    (dict(cameras=("front",)), "no camera 'front'; it has: top, wrist-left"),
    (dict(fps=3.0), "--fps 3 must divide the 10"), (dict(kinds="ppp"), "must be 2 letters"),
    (dict(source="nowhere"), "no LeRobotDataset at 'nowhere'"),
    (dict(source="hub:a/b"), "cannot be downloaded")])
def test_a_wrong_option_is_refused(change, message, tmp_path):
    write_info(tmp_path / "source", "v2.1")
    (tmp_path / "source/meta/tasks.jsonl").write_text('{"task_index": 0, "task": "Push"}')
    (tmp_path / "source/meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 9}')
    args = dict(source=str(tmp_path / "source"), name="robot", data=str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        data_oxe.from_lerobot(**args | change)
    assert not (tmp_path / "robot").exists()
