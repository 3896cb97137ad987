"""data_oxe.py on small datasets in the true schemas: CPU, offline. TFDS's own reader says what is
right."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields

import cv2
import numpy as np
import pytest
import torch
from common import ROOT

import data_oxe
import rollout
from data_oxe import tf, tfds
from fakes import fake_frames, write_fake

SPECIAL = {
    "kuka": "'/' in keys, ZLIB states",
    "bc_z": "chunks of actions, integers",
    "bridge": "bool gripper, first step",
    "language_table": "tokens",
    "droid": "three instructions, float64",
    "vima_converted_externally_to_rlds": "raw pixels",
    "berkeley_autolab_ur5": "scalar gripper",
    "roboturk": "no state",
    "tidybot": "no action",
    "nyu_franka_play_dataset_converted_externally_to_rlds": "dropped dimensions",
}
PICTURES = {kind: fake_frames(12, 24, kind) for kind in ("jpeg", "png")}


def fake(folder, name, episodes=4, length=12, seed=0, **options):
    """The named dataset, small."""
    entry = data_oxe.REGISTRY[name]
    pictures = PICTURES["jpeg" if entry.frame.endswith("jpeg") else "png"]
    write_fake(str(folder), name, entry, episodes, length, pictures, seed, **options)


def loader_of(folder, mix, split, batch_size, image_size, **options):
    """A Loader; `options` are of DataConfig or its own."""
    own = {f.name for f in fields(data_oxe.DataConfig)}
    cfg = {k: v for k, v in options.items() if k in own}
    cfg = data_oxe.DataConfig(data=str(folder), mix=mix, **{"shuffle_mb": 64.0, **cfg})
    more = {k: v for k, v in options.items() if k not in own}
    return data_oxe.Loader(cfg, split, batch_size, image_size, **more)


def take(loader, n):
    return [b for _, b in zip(range(n), loader)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def oxe(tmp_path_factory):
    """Every dataset of the registry, four episodes of twelve steps, pictures of 24 px."""
    folder = tmp_path_factory.mktemp("oxe")
    for i, name in enumerate(data_oxe.REGISTRY):
        fake(folder, name, length=24 if data_oxe.REGISTRY[name].offset > 5 else 12, seed=i)
    return folder


def dig(step, key):
    outer, _, inner = key.partition("/")
    return step[outer][inner] if inner else step[outer]


# ------------------------------------------------------------ schemas and pairs
@pytest.mark.parametrize("name", SPECIAL)
def test_a_schema_reads_as_tfds_reads_it(name, oxe):
    entry, k = data_oxe.REGISTRY[name], data_oxe.REGISTRY[name].offset
    loader = loader_of(oxe, name, "train", 12, 24, chunk=3, val_fraction=0.25)
    batch = next(iter(loader))
    builder = tfds.builder_from_directory(f"{oxe}/{name}/{entry.version}")
    episodes = [list(e["steps"]) for e in builder.as_dataset(split="train", shuffle_files=False)]
    columns = lambda spec, step: np.concatenate(
        [
            np.ravel(dig(step, key))[[c != "-" for c in kinds]]
            for key, kinds in data_oxe.columns_of(spec)
        ]
        or [np.zeros(0)]
    )
    kinds = data_oxe.kinds_of(entry.action)
    assert set(batch["episode"]) <= {0, 1, 2} and len(set(batch["step"])) > 2
    for i, (e, t) in enumerate(zip(batch["episode"], batch["step"])):
        steps = episodes[e]
        assert entry.skip <= t < len(steps) - k
        assert np.array_equal(
            batch["frames"][i], [dig(steps[t], entry.image), dig(steps[t + k], entry.image)]
        )
        assert batch["instruction"][i] == (f"instruction of {name}" if entry.instruction else "")
        actions = np.array([columns(entry.action, s) for s in steps], np.float32)
        n = batch["action_mask"][i].sum()
        assert n == min(3, len(steps) - t)
        np.testing.assert_allclose(batch["actions"][i, :n], actions[t : t + n], atol=1e-6)
        done = {
            "d": actions[t : t + k].sum(0),
            "v": actions[t : t + k].sum(0) / (entry.hz or 1),
            "p": actions[t + k] - actions[t],
            "g": actions[t + k - 1],
            "u": actions[t + k - 1],
        }
        np.testing.assert_allclose(
            batch["action_sum"][i], [done[c][j] for j, c in enumerate(kinds)], atol=1e-4
        )
        np.testing.assert_allclose(batch["state"][i], columns(entry.state, steps[t]), atol=1e-6)
        assert batch["has_action"][i] == bool(kinds)


def test_the_whole_registry_and_the_mixes(oxe):
    """All datasets in one mix: each is there, weights hold, narrow ones are padded; the mixes
    name known datasets."""
    for mix, count in {
        "oxe29": 29,
        "oxe_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "octo_magic_soup": 25,
        "rtx": 10,
    }.items():
        assert len(data_oxe.parse_mix(mix)) == count and set(data_oxe.parse_mix(mix)) <= set(
            data_oxe.REGISTRY
        )
    facts = list(data_oxe.REGISTRY)
    n = len(facts)
    loader = loader_of(oxe, ",".join(facts), "train", n, 16, shuffle_mb=4)
    batches = take(loader, 20)
    assert set(np.concatenate([b["dataset"] for b in batches])) == set(range(n))
    assert batches[0]["frames"].shape == (n, 2, 16, 16, 3) and batches[0]["state"].shape == (
        n,
        loader.state_dim,
    )
    d, state = batches[0]["dataset"], batches[0]["state"]
    narrow = [
        i for i in range(n) if len(data_oxe.kinds_of(data_oxe.REGISTRY[facts[d[i]]].state)) < 10
    ]
    assert not state[narrow, 10:].any() and state[:, :6].any()
    mix = loader_of(oxe, "bridge:6,viola:2,toto:2", "train", 100, 0, shuffle_mb=1)
    share = np.bincount(np.concatenate([b["dataset"] for b in take(mix, 30)])) / 3000
    assert abs(share - [0.6, 0.2, 0.2]).max() < 0.05 and mix.share == pytest.approx(
        {"bridge": 0.6, "viola": 0.2, "toto": 0.2}
    )
    assert loader_of(oxe, "bridge:6,viola:2", "train", 1, 0, weights="equal").share["viola"] == 0.5
    by_frames = loader_of(
        oxe, "bridge:3,language_table", "train", 1, 0, weights="proportionate"
    ).share
    assert by_frames["language_table"] == pytest.approx(2 / 5)  # 24 steps against 3 times 12


def test_oxe29_in_bounded_memory(oxe):
    """The 29-dataset mix in a process of its own: threads, memory, time to the first batch."""
    code = (
        "import sys, time, data_oxe as d; sys.path.insert(0, 'tests'); import bench_data as b\n"
        "cfg = d.DataConfig(sys.argv[1], 'oxe29', threads=2, shuffle_mb=64)\n"
        "began = time.time()\n"
        "batches = iter(d.Loader(cfg, 'train', 32, 24))\n"
        "next(batches)\n"
        "print(time.time() - began)\n"
        "[next(batches) for _ in range(30)]\n"
        "print(b.status('VmHWM'), b.status('Threads'))"
    )
    p = subprocess.run(
        [sys.executable, "-c", code, str(oxe)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    first, memory, threads = map(float, p.stdout.split())
    assert memory < 1000 and threads <= 16 and first < 12, p.stdout  # 3 s on an idle machine


def test_pairs_all_in_seconds_and_moving(tmp_path):
    fake(tmp_path, "viola", length=30)  # 20 Hz
    loader = loader_of(
        tmp_path,
        "viola",
        "train",
        9,
        24,
        pairs_per_episode=0,
        horizon_s=0.5,
        val_fraction=0.0,
        shuffle_mb=0.5,
    )
    assert loader.horizon == {"viola": {"steps": 10, "seconds": 0.5}}
    epoch = {(int(e), int(t)) for b in take(loader, 40) for e, t in zip(b["episode"], b["step"])}
    assert epoch == {(e, t) for e in range(4) for t in range(20)}  # t + 10 < 30
    few = loader_of(tmp_path, "viola", "train", 8, 24, pairs_per_episode=2, val_fraction=0.0)
    assert few.plans[0].pairs == 2
    frames = (
        [PICTURES["png"][0]] * 15 + PICTURES["png"][:8] + [PICTURES["png"][7]] * 7
    )  # still, moving, still
    write_fake(str(tmp_path), "toto", data_oxe.REGISTRY["toto"], 2, 30, frames)
    moving = loader_of(
        tmp_path, "toto", "train", 16, 24, pairs_per_episode=0, val_fraction=0, min_motion=1.0
    )
    assert {int(t) for b in take(moving, 10) for t in b["step"]} == set(range(11, 22))


def test_consecutive_pairs_stay_within_the_episode(tmp_path):
    """Frames t, t+k, t+2k are those recorded; none is made up at the end. Only frames that follow
    the pairs stop at the episode's last."""
    fake(tmp_path, "viola")  # 20 Hz, 12 steps
    for resize in ("cpu", "gpu"):
        options = dict(pairs_per_episode=0, horizon_s=0.15, val_fraction=0.0, resize=resize)
        loader = loader_of(tmp_path, "viola", "train", 8, 24, **options)
        recorded = {}
        for batch in take(loader, 9):
            for t, pair in zip(batch["step"], batch["frames"]):
                recorded[t], recorded[t + 3] = pair
        loader = loader_of(tmp_path, "viola", "train", 8, 24, consecutive=2, **options)
        batches = take(loader, 6)
        assert {int(t) for b in batches for t in b["step"]} == set(range(6))  # t + 2k < 12
        for batch in batches:
            for t, frames in zip(batch["step"], batch["frames"]):
                assert np.array_equal(frames, [recorded[t + i] for i in (0, 3, 6)])
        loader = loader_of(tmp_path, "viola", "train", 8, 24, follow=2, **options)
        batches = take(loader, 9)
        assert {int(t) for b in batches for t in b["step"]} == set(range(9))  # t + k < 12
        for batch in batches:
            for t, frames in zip(batch["step"], batch["frames"]):
                assert np.array_equal(frames, [recorded[min(t + i, 11)] for i in (0, 3, 6, 9)])
    with pytest.raises(SystemExit, match="long enough for 4 frame pairs of 13 steps"):
        loader_of(tmp_path, "viola", "train", 8, 24, consecutive=4, **options)


def test_pictures_of_every_size(tmp_path):
    """resize=gpu hands over what was recorded and to() resizes; a large JPEG is decoded small."""
    shades = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3).astype(np.uint8)
    write_fake(
        str(tmp_path),
        "bridge",
        data_oxe.REGISTRY["bridge"],
        2,
        9,
        [tf.io.encode_png(shades).numpy()],
    )
    write_fake(
        str(tmp_path),
        "kuka",
        data_oxe.REGISTRY["kuka"],
        2,
        9,
        [tf.io.encode_jpeg(shades, quality=100).numpy()],
    )
    expected = cv2.resize(shades, (24, 24), interpolation=cv2.INTER_AREA).astype(float)
    for mix in ("bridge", "kuka"):
        frames = next(iter(loader_of(tmp_path, mix, "train", 4, 24)))["frames"]
        assert abs(frames - expected).mean() < 4
    native = loader_of(tmp_path, "bridge", "train", 4, 24, resize="gpu")
    assert np.array_equal(next(iter(native))["frames"][0, 1], shades)
    both = loader_of(tmp_path, "bridge,kuka", "train", 8, 24, resize="gpu")
    assert {x.shape[1:] for x in next(iter(both))["frames"]} == {(96, 128, 3), (24, 32, 3)}
    batch = next(both.to("cpu"))
    assert batch["frames"].shape == (8, 2, 24, 24, 3) and batch["frames"].dtype == torch.uint8
    assert abs(batch["frames"].float().numpy() - expected).mean() < 4


def test_batches_are_views_and_the_thread_gives_the_same(oxe):
    make = lambda: loader_of(oxe, "bridge,kuka", "train", 8, 24, shuffle_mb=0.1)
    plain, ahead = make(), make()
    for a, b in zip(take(plain, 5), take(ahead.to("cpu"), 5)):
        assert all(np.array_equal(a[k], b[k]) for k in a) and isinstance(b["frames"], torch.Tensor)
        assert (
            torch.from_numpy(a["frames"]).data_ptr() == a["frames"].ctypes.data
            and a["frames"].flags.writeable
        )
    assert plain.state_dict() == ahead.state_dict()  # not the position of the batch ahead
    before = threading.active_count()
    next(make().to("cpu"))  # leaves no thread behind
    assert threading.active_count() == before


# ------------------------------------------------------------ splits, ranks, resume
def test_splits_subsets_and_ranks(oxe, tmp_path):
    fake(tmp_path, "toto", episodes=30)  # two files
    make = lambda split="train", **k: loader_of(
        tmp_path, "toto", split, 8, 0, **{"val_fraction": 0.2, **k}
    )
    seen = lambda loader: {int(e) for b in take(loader, 60) for e in b["episode"]}
    train, val = seen(make()), seen(make("val"))
    assert train == set(range(24)) and val == set(range(24, 30)) == seen(
        make("val", episodes_per_task=2)
    )
    assert seen(make(episodes_per_task=3)) == {0, 1, 2}
    assert make(episodes_per_task=3).counts["toto"]["used"] == 3
    parts = [seen(make(rank=r, world=5)) for r in range(5)]  # more ranks than files
    assert set.union(*parts) == train and sum(map(len, parts)) == len(train)
    assert seen(make("val", rank=1, world=5)) == val
    held = dict(holdout="episode_metadata/file_path~scene_1/")  # write_fake has three scenes
    assert seen(make("val", **held)) == {e for e in range(30) if e % 3 == 1}
    scenes = make(**held)
    assert seen(scenes) == {e for e in range(30) if e % 3 != 1}
    assert scenes.counts["toto"] == {"recorded": 30, "train": 20, "val": 10, "used": 20}
    assert list((tmp_path / "toto/0.1.0").glob("nanolapa_*.json"))  # remembered for the next start
    with pytest.raises(SystemExit, match="no episodes left in split 'val'"):
        make("val", holdout="instruction~nowhere")


def test_what_the_stream_depends_on_is_compared(oxe):
    make = lambda world=1, rank=0, **k: loader_of(
        oxe, "bridge,toto", "train", 8 // world, 0, world=world, rank=rank, **k
    )
    state = make(holdout="episode_metadata/file_path~scene_1/").state_dict()
    for says, options in {
        "rank was 0, is 1": dict(world=2, rank=1),
        "chunk": dict(chunk=2),
        "pairs_per_episode": dict(pairs_per_episode=3),
        "horizon_s": dict(horizon_s=0.2),
    }.items():
        with pytest.raises(SystemExit, match=says):
            make(**options).load_state_dict(make(world=options.get("world", 1)).state_dict())
    with pytest.raises(SystemExit, match="holdout"):
        make(holdout="episode_metadata/file_path~scene_2/").load_state_dict(state)


@pytest.mark.parametrize(
    "mix, options",
    [
        ("bridge:2,kuka,roboturk", {}),
        ("toto", {"pairs_per_episode": 0}),
        ("droid,viola", {"rank": 1, "world": 2}),
        ("toto", {"image_size": 24, "min_motion": 5.0}),
    ],
)
def test_resume_is_exact_and_small(mix, options, oxe):
    make = lambda seed=0, **k: loader_of(
        oxe, mix, "train", 7, shuffle_mb=0.05, seed=seed, **{"image_size": 0, **options, **k}
    )
    whole = take(make(), 60)
    assert make().block_size < 30  # the run spans many blocks and epochs
    for stop in (1, 13, 47):
        first = make()
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 4096
        second = make()
        second.load_state_dict(state)
        for a, b in zip(whole[stop:], take(second, 10)):
            assert same(a, b)
    assert not same(whole[0], take(make(seed=1), 1)[0])
    assert [same(a, b) for a, b in zip(make().peek(2), whole)] == [True, True]
    with pytest.raises(SystemExit, match="world was"):
        make(world=3).load_state_dict(make().state_dict())


def test_a_stream_starts_about_where_other_many_ranks_left_it(oxe):
    make = lambda: loader_of(oxe, "bridge:2,kuka", "train", 7, shuffle_mb=0.05, image_size=0)
    places = lambda batches: [
        place for b in batches for place in zip(*(b[k] for k in ("dataset", "episode", "step")))
    ]
    whole, later = places(take(make(), 60)), make()
    later.skip(40)
    assert later.position[0] > 1
    first = places(take(later, 2))
    starts = [i for i in range(len(whole) - 14) if whole[i : i + 14] == first]
    assert len(starts) == 1 and abs(starts[0] - 40 * 7) < 1.5 * later.block_pairs


# ------------------------------------------------------------ faults
def records_of(path):
    return [r.numpy() for r in tf.data.TFRecordDataset(str(path))]


def rewrite(path, change):
    """Passes every episode's Example of a file through change(number, example.features.feature)."""
    records = records_of(path)
    with tf.io.TFRecordWriter(str(path)) as w:
        for i, record in enumerate(records):
            example = tf.train.Example.FromString(record)
            change(i, example.features.feature)
            w.write(example.SerializeToString())


def spoil(fault, path):
    feature = {
        "image": "steps/observation/image",
        "text": "steps/observation/natural_language_instruction",
        "action": "steps/action/world_vector",
    }
    if fault == "truncated":  # the last record of the file
        path.write_bytes(path.read_bytes()[:-500])
    elif fault == "corrupt":  # record 5, and what comes after it
        data, start = bytearray(path.read_bytes()), sum(len(r) + 16 for r in records_of(path)[:5])
        data[start + 200] ^= 0xFF
        path.write_bytes(data)
    elif fault == "image":

        def change(i, f):
            if i == 3:
                f[feature["image"]].bytes_list.value[:] = [
                    x[: len(x) // 2] for x in f[feature["image"]].bytes_list.value
                ]

        rewrite(path, change)
    elif fault == "text":
        rewrite(
            path,
            lambda i, f: (
                i == 3 and f[feature["text"]].bytes_list.value.__setitem__(slice(None), [b" "] * 12)
            ),
        )
    elif fault == "nan":
        rewrite(
            path,
            lambda i, f: (
                i == 3 and f[feature["action"]].float_list.value.__setitem__(4, float("nan"))
            ),
        )
    elif fault == "uneven":  # one number missing
        rewrite(path, lambda i, f: i == 3 and f[feature["action"]].float_list.value.pop())
    elif fault == "short":

        def change(i, f):
            if i == 3:
                for x in f.values():
                    kind = getattr(x, x.WhichOneof("kind"))
                    del kind.value[len(kind.value) // 12 * 4 :]

        rewrite(path, change)


@pytest.mark.parametrize(
    "fault, says, lost",
    [
        ("truncated", "unreadable", {9}),
        ("corrupt", "unreadable", {5, 6, 7, 8, 9}),
        ("image", "does not decode", set()),
        ("nan", "not finite", {3}),
        ("uneven", "unreadable", {3}),
    ],
)
def test_a_fault_is_named_counted_and_skipped(fault, says, lost, tmp_path, capsys):
    fake(tmp_path, "bridge", episodes=10)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")
    spoil(fault, path)
    make = lambda **k: loader_of(
        tmp_path, "bridge", "train", 8, 24, val_fraction=0, shuffle_mb=0.05, **k
    )
    loader = make(max_bad=0.5)
    seen = {int(e) for b in take(loader, 30) for e in b["episode"]}
    err = capsys.readouterr().err
    bad = {
        int(line.split(", episode ")[1].split()[0])
        for line in err.splitlines()
        if "skipped" in line
    }
    assert (
        says in err
        and str(path) in err
        and bad == (lost or {3})
        and len(err.splitlines()) == len(bad)
    )
    assert seen == set(range(10)) - (lost or {3})
    with pytest.raises(SystemExit, match="more than max_bad"):
        take(make(), 30)
    if fault == "image":  # resuming past it is exact too
        whole = take(make(max_bad=0.5), 20)
        second = make(max_bad=0.5)
        first = make(max_bad=0.5)
        take(first, 11)
        second.load_state_dict(first.state_dict())
        assert all(same(a, b) for a, b in zip(whole[11:], take(second, 9)))


@pytest.mark.parametrize(
    "fault, says", [("text", "1 without an instruction"), ("short", "1 shorter than a frame pair")]
)
def test_what_is_ordinary_in_oxe_is_counted_and_skipped_without_a_limit(
    fault, says, tmp_path, capsys
):
    fake(tmp_path, "bridge", episodes=10)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")
    spoil(fault, path)

    def make(**options):
        return loader_of(
            tmp_path, "bridge", "train", 8, 24, val_fraction=0, shuffle_mb=0.05, **options
        )

    loader = make(max_bad=0.0)
    whole = take(loader, 30)
    assert {int(e) for b in whole for e in b["episode"]} == set(range(10)) - {3}
    assert says in loader.summary() and capsys.readouterr().err.count(says) == 1
    first, second = make(max_bad=0.0), make(max_bad=0.0)
    take(first, 11)
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(whole[11:], take(second, 9)))
    if fault == "text":  # laq asks for no instruction
        assert 3 in {int(e) for b in take(make(demonstrations=False), 30) for e in b["episode"]}


def test_mostly_unfit_data_is_an_error(tmp_path, monkeypatch):
    """At the start, where a look at some episodes tells; else as soon as they were met."""
    fake(tmp_path, "bridge", episodes=10)
    folder = tmp_path / "bridge/0.1.0"
    loader = loader_of(tmp_path, "bridge", "train", 8, 0, val_fraction=0)
    (path,) = folder.glob("*.tfrecord*")
    key = "steps/observation/natural_language_instruction"
    rewrite(path, lambda i, f: f[key].bytes_list.value.__setitem__(slice(None), [b""] * 12))
    with pytest.raises(
        SystemExit, match="10 of 10 episodes of 'bridge' cannot be used.*instruction"
    ):
        take(loader, 5)
    (folder / "nanolapa_glance.json").unlink()
    with pytest.raises(
        SystemExit, match="none of 10 episodes of dataset 'bridge' has an instruction"
    ):
        loader_of(tmp_path, "bridge", "train", 8, 0, val_fraction=0)
    loader_of(tmp_path, "bridge", "train", 8, 0, val_fraction=0, demonstrations=False)
    with pytest.raises(SystemExit, match="none of 10 episodes of dataset 'bridge'.*long enough"):
        loader_of(tmp_path, "bridge", "train", 8, 0, horizon_s=20.0)


def test_an_iterator_is_dropped_while_episodes_are_reported(tmp_path):
    """Half of them are unfit and many are read ahead: nobody waits for the other."""
    fake(tmp_path, "bridge", episodes=20)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")
    key = "steps/observation/natural_language_instruction"
    rewrite(
        path, lambda i, f: i % 2 and f[key].bytes_list.value.__setitem__(slice(None), [b""] * 12)
    )
    loader = loader_of(tmp_path, "bridge", "train", 8, 0, val_fraction=0)
    assert loader.plans[0].pairs == 0.5 * 6  # which its share of a mix accounts for
    for _ in range(30):
        loader.pipeline = None, None
        assert len(next(iter(loader))["step"]) == 8


def test_what_is_read_beforehand_waits_for_its_file(tmp_path, monkeypatch, capsys):
    fake(tmp_path, "bridge", episodes=10)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")
    path.rename(tmp_path / "away")
    monkeypatch.setattr(data_oxe.time, "sleep", lambda seconds: (tmp_path / "away").rename(path))
    assert len(data_oxe.values_of(str(path), tf.strings.length)) == 10
    assert "trying again in 1 s" in capsys.readouterr().err


def test_failed_episodes_are_no_demonstrations(tmp_path, capsys):
    fake(tmp_path, "kuka", episodes=12, success=lambda episode: episode % 3 == 0)
    policy = loader_of(tmp_path, "kuka", "train", 8, 0, val_fraction=0)
    assert {int(e) for b in take(policy, 30) for e in b["episode"]} == {0, 3, 6, 9}
    assert "8 failed" in policy.summary()
    video = loader_of(tmp_path, "kuka", "train", 8, 0, val_fraction=0, demonstrations=False)
    assert {int(e) for b in take(video, 30) for e in b["episode"]} == set(range(12))


def test_a_file_out_of_reach_is_waited_for(tmp_path, monkeypatch, capsys):
    """A network that fails is no corrupt file: the stream waits, and goes on as if nothing were."""
    fake(tmp_path, "bridge", episodes=10)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")

    def make():
        return loader_of(tmp_path, "bridge", "train", 8, 0, val_fraction=0, shuffle_mb=0.05)

    whole, loader, pauses = take(make(), 20), make(), []
    path.rename(tmp_path / "away")

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            (tmp_path / "away").rename(path)

    monkeypatch.setattr(data_oxe.time, "sleep", pause)
    assert all(same(a, b) for a, b in zip(whole, take(loader, 20)))
    err = capsys.readouterr().err
    assert pauses == [1, 5] and "trying again in 5 s" in err and "skipped" not in err
    loader = make()
    path.rename(tmp_path / "away")
    monkeypatch.setattr(data_oxe.time, "sleep", pauses.append)
    with pytest.raises(SystemExit, match="cannot read .*check the network"):
        take(loader, 20)


def test_a_reader_that_stands_still_is_named(tmp_path, monkeypatch, capfd):
    """A pipe without a writer answers as a dead server does: not at all, not even with an error."""
    for name in ("bridge", "viola"):
        fake(tmp_path, name)
    (path,) = (tmp_path / "viola/0.1.0").glob("*.tfrecord*")
    loader = loader_of(tmp_path, "bridge,viola", "train", 8, 24)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(data_oxe.Stall, "warn_s", 1)
    monkeypatch.setattr(data_oxe.Stall, "exit_s", 2)
    for batches in (loader.to("cpu"), loader.peek(1)):
        with pytest.raises(SystemExit, match="reading 'viola' of .* stands still for 2 s; check"):
            next(batches)
        assert "reading 'viola'" in capfd.readouterr().err
    threading.Timer(1.5, path.write_bytes, (b"",)).start()  # ends all reading of the pipe
    with pytest.raises(SystemExit, match="Illegal seek"):
        data_oxe.values_of(str(path), lambda record: record)
    assert f"reading '{path}' takes more than 1 s" in capfd.readouterr().err
def test_blue_pictures_are_turned(tmp_path):
    """Datasets that store BGR come as RGB, in a mix with others too."""
    red = np.zeros((24, 24, 3), np.uint8)
    red[..., 0] = 200
    name = "utaustin_mutex"
    for folder, picture in ((name, red[..., ::-1]), ("viola", red)):
        png = tf.io.encode_png(np.ascontiguousarray(picture)).numpy()
        write_fake(str(tmp_path), folder, data_oxe.REGISTRY[folder], 2, 9, [png])
    for resize in ("cpu", "gpu"):
        loader = loader_of(tmp_path, f"{name},viola", "train", 16, 24, resize=resize)
        batch = next(iter(loader))
        assert set(batch["dataset"]) == {0, 1} and (batch["frames"] == red).all()


def test_a_broken_file_does_not_move_the_holdout(tmp_path):
    fake(tmp_path, "bridge", episodes=12)
    (path,) = (tmp_path / "bridge/0.1.0").glob("*.tfrecord*")
    whole, make = (
        path.read_bytes(),
        lambda: loader_of(
            tmp_path,
            "bridge",
            "val",
            8,
            0,
            max_bad=0.5,
            holdout="episode_metadata/file_path~scene_1/",
        ),
    )
    path.write_bytes(whole[: len(whole) // 2])
    assert make().counts["bridge"]["val"] < 4
    path.write_bytes(whole)
    assert make().counts["bridge"] == {"recorded": 12, "train": 8, "val": 4, "used": 4}
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="1 of 1 files of dataset 'bridge' are missing"):
        make()


def test_arguments_are_checked(oxe):
    for says, options in {
        "no readable|is not a regular": dict(holdout="instruction~("),
        "must be KEY~REGEX": dict(holdout="x"),
        "resize 'tpu'": dict(resize="tpu"),
        "max_bad 2": dict(max_bad=2.0),
        "min_motion": dict(min_motion=1, horizon_s=0.0),
        "3 episodes left in split 'train' for 9": dict(world=9),
        "moves by": dict(min_motion=250.0),
        "episodes_per_task -1": dict(episodes_per_task=-1),
    }.items():
        with pytest.raises(SystemExit, match=says):
            loader_of(oxe, "bridge", "train", 8, 24, **options)


def test_a_bucket_out_of_reach_is_said_so(monkeypatch):
    def gone(path):
        raise tf.errors.UnavailableError(None, None, "no route")

    monkeypatch.setattr(tf.io.gfile, "exists", gone)
    with pytest.raises(
        SystemExit,
        match="cannot reach 'gs://gresearch/robotics/bridge/.*features.json'.*check the network",
    ):
        loader_of("gs://gresearch/robotics", "bridge", "train", 8, 24)


# ------------------------------------------------------------ commands
def test_commands(oxe, tmp_path, capsys):
    data_oxe.list_datasets(str(oxe))
    out = capsys.readouterr().out
    assert "bridge  " in out and "train 4 episodes" in out and "mix oxe29: 29 datasets" in out
    data_oxe.inspect(str(oxe), "tidybot", out=str(tmp_path / "none"), image_size=24, batches=2)
    assert "state        float32  (64, 0)" in capsys.readouterr().out  # neither actions nor state
    data_oxe.inspect(str(oxe), "bridge,tidybot", out=str(tmp_path), image_size=24, batches=2)
    out = capsys.readouterr().out
    assert (
        "bridge: 4 episodes recorded, 4 train" in out.replace("3 train, 1 val", "4 train")
        and "50.0% of the pairs" in out
    )
    assert (tmp_path / "actions.png").stat().st_size > 5000 and (
        tmp_path / "contact_sheet.png"
    ).stat().st_size > 5000
    data_oxe.stats(str(oxe), "bridge")
    out = capsys.readouterr().out
    episodes = tfds.builder_from_directory(f"{oxe}/bridge/0.1.0").as_dataset(split="train")
    first = np.array([s["action"]["world_vector"][0] for e in episodes for s in e["steps"]])
    assert f"[ 0] q01 {np.percentile(first, 1):10.4g}" in out and f"std {first.std():10.4g}" in out
    (cached,) = (oxe / "bridge/0.1.0").glob("nanolapa_statistics.json")
    content = json.loads(cached.read_text())
    content["content"]["actions"]["mean"][0] = 1234.5
    cached.write_text(json.dumps(content))
    data_oxe.stats(str(oxe), "bridge")
    assert "mean       1234" in capsys.readouterr().out  # read from the cache
    content["fingerprint"]["bytes"] += 1
    cached.write_text(json.dumps(content))
    data_oxe.stats(str(oxe), "bridge")
    assert "1234" not in capsys.readouterr().out  # the data changed: read anew


def write_video(path, shade, seconds=2.0, fps=30):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".mp4" else "vp8", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        for t in range(round(seconds * fps)):
            image = np.full((48, 80, 3), shade, np.uint8)
            image[:, 16 + t % 48 : 20 + t % 48] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_from_videos(tmp_path, capsys):
    clips = tmp_path / "clips"
    (clips / "b").mkdir(parents=True)
    for i in range(6):
        write_video(clips / (f"b/{i}.webm" if i == 5 else f"{i}.mp4"), 20 * i)
    (clips / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "captions.csv").write_text(
        "".join(f'{x},"push, {x}"\n' for x in ["0", "1", "2", "3.mp4", "4", "b/5", "broken"])
    )
    args = (
        [str(clips), "clips"],
        dict(
            data=str(tmp_path / "data"),
            captions=str(tmp_path / "captions.csv"),
            fps=10.0,
            size=32,
            max_frames=15,
        ),
    )
    real, count = data_oxe.DatasetWriter.write, []

    def interrupted(self, example):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        real(self, example)

    data_oxe.DatasetWriter.write = interrupted
    per_shard, data_oxe.SHARD = data_oxe.SHARD, 2
    try:
        with pytest.raises(KeyboardInterrupt):
            data_oxe.from_videos(*args[0], **args[1])
    finally:
        data_oxe.DatasetWriter.write, data_oxe.SHARD = real, per_shard
    assert not (tmp_path / "data/clips/1.0.0").exists()
    data_oxe.from_videos(*args[0], **args[1])
    out, err = capsys.readouterr()
    assert (
        "continuing" in out
        and "12 episodes of 7 videos, 1 of them broken" in out
        and "broken.mp4" in err
    )
    loader = loader_of(tmp_path / "data", "clips", "train", 8, 32, val_fraction=0)
    batches = take(loader, 10)
    assert (
        loader.horizon["clips"] == {"steps": 5, "seconds": 0.5}
        and not batches[0]["has_action"].any()
    )
    assert {s for b in batches for s in b["instruction"]} == {
        f"push, {x}" for x in ["0", "1", "2", "3.mp4", "4", "b/5"]
    }
    assert {int(e) for b in batches for e in b["episode"]} == set(range(12))
    builder = tfds.builder_from_directory(str(tmp_path / "data/clips/1.0.0"))
    lengths = {}
    for e in builder.as_dataset(split="train"):
        meta = e["episode_metadata"]
        lengths[meta["file_path"].numpy().decode(), int(meta["start"])] = len(list(e["steps"]))
    files = ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "b/5.webm"]
    assert lengths == {(file, start): 10 for file in files for start in (0, 10)}
    with pytest.raises(SystemExit, match="have no caption"):
        data_oxe.from_videos(str(clips), "more", data=str(tmp_path), captions=__file__)


def test_an_interrupt_leaves_no_thread_that_hangs(oxe):
    """Ctrl-C while the background thread reads: the process ends at once."""
    code = (
        "import sys, data_oxe as d\n"
        "loader = d.Loader(d.DataConfig(sys.argv[1], 'bridge'), 'train', 8, 24)\n"
        "for b in loader.to('cpu'): print('x', flush=True)"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code, str(oxe)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert "KeyboardInterrupt" in err and "terminate called" not in err


# ------------------------------------------------------------ mixes
def test_published_mixes_multiply_sizes(tmp_path):
    """As in Octo and OpenVLA: a dataset of half an hour is not seen as often as one of days."""
    cfg = data_oxe.DataConfig(mix="rtx")
    names = list(data_oxe.parse_mix("rtx"))
    frames = {name: 1000.0 * (i + 1) for i, name in enumerate(names)}
    share = dict(zip(names, data_oxe.shares(cfg, frames)))
    assert share["berkeley_cable_routing"] / share["bridge_orig"] == pytest.approx(3 * 6 / 3)
    assert np.mean([*share.values()]) == pytest.approx(
        np.mean([n for n, _ in data_oxe.parse_mix("rtx").values()])
    )
    own = data_oxe.shares(
        data_oxe.DataConfig(mix="bridge:0.7,viola:0.3"), {"bridge": 9, "viola": 1}
    )
    assert own.tolist() == [0.7, 0.3]
    for i, name in enumerate(("viola", "toto")):
        fake(tmp_path, name, episodes=4 + 8 * i)
    loader = loader_of(
        tmp_path, "viola,toto", "train", 8, 0, weights="proportionate", val_fraction=0
    )
    assert loader.share == pytest.approx({"viola": 1 / 4, "toto": 3 / 4})
    assert "75.0% of the pairs" in loader.summary()


def test_motion_is_told_dataset_by_dataset(oxe):
    loader = loader_of(oxe, "bridge,toto,tidybot", "train", 8, 0)
    assert loader.motion_dims == {"bridge": [0, 1, 2, 3, 4, 5], "toto": [], "tidybot": []}


def test_another_recording_does_not_resume(oxe, tmp_path):
    """The same number of episodes, other data; the same data elsewhere does."""
    import shutil

    fake(tmp_path / "a", "bridge", length=12)
    fake(tmp_path / "b", "bridge", length=13)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    state = loader_of(tmp_path / "a", "bridge", "train", 8, 0).state_dict()
    loader_of(tmp_path / "c", "bridge", "train", 8, 0).load_state_dict(state)
    with pytest.raises(SystemExit, match="checksum of the recording was"):
        loader_of(tmp_path / "b", "bridge", "train", 8, 0).load_state_dict(state)


def test_lengths_are_looked_up_over_the_whole_dataset(tmp_path):
    """Long episodes at the end of the dataset count, too; what was seen is remembered."""
    entry = data_oxe.Entry(**rollout.MetaWorld.entry)
    with data_oxe.EpisodeWriter(str(tmp_path), "metaworld_corner4", entry, 8) as writer:
        for i in range(96):  # four files
            n = 20 if i < 48 else 60
            values = np.zeros((n, 4))
            writer.add(
                np.zeros((n, 8, 8, 3), np.uint8),
                values,
                values,
                values,
                np.zeros(n),
                "Do it",
                task="x",
                seed=i,
                success=True,
                file_path="",
            )
    for _ in range(2):
        (plan,) = loader_of(tmp_path, "metaworld_corner4", "train", 8, 0, val_fraction=0).plans
        assert plan.frames == 96 * 40
    assert (tmp_path / "metaworld_corner4/1.0.0/nanolapa_glance.json").exists()


def test_threads_are_this_process_s_share_of_the_cores(monkeypatch, oxe):
    monkeypatch.setattr(data_oxe.os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_of(oxe, "bridge", "train", 8, 0).threads == 3
    assert loader_of(oxe, "bridge", "train", 8, 0, threads=5).threads == 5


def test_another_version_on_disk_is_named(oxe, tmp_path):
    (tmp_path / "robo_net").mkdir()
    (tmp_path / "robo_net/0.1.0").symlink_to(oxe / "bridge/0.1.0")
    with pytest.raises(SystemExit, match="robo_net/1.0.0'.*there is version 0.1.0"):
        loader_of(tmp_path, "robo_net", "train", 8, 0)


def test_more_is_made_beside_reading(oxe):
    """What a stage adds to batches (flow) does not run in the thread that waits for them."""
    seen = set()

    def more(batch):
        seen.add(threading.current_thread().name)
        return {"twice": 2 * batch["step"]}

    loader = loader_of(oxe, "bridge", "train", 8, 0)
    reading = loader.batches

    def watched(position):
        for item in reading(position):
            seen.add(f"reads in {threading.current_thread().name}")
            yield item

    loader.batches = watched
    batch = next(loader.to("cpu", more))
    assert torch.equal(batch["twice"], 2 * batch["step"]) and len(seen) == 2
    names = {name.removeprefix("reads in ") for name in seen}
    assert len(names) == 2 and threading.current_thread().name not in names
