"""Open X-Embodiment / RLDS episodes on disk -> batches of frame pairs. Pure tf.data, one file.

    python data_oxe.py list    --data data                              # registry, and what is present
    python data_oxe.py inspect --data data --mix metaworld_corner4      # shapes, counts, ranges, contact sheet

As a module (the only code the stages share):

    loader = Loader("data", "bridge:0.7,fractal20220817_data:0.3", split="train", batch_size=64, image_size=224)
    for batch in loader: ...            # endless; loader.state_dict() / load_state_dict() to resume

Terms. A *trajectory* (episode) is a sequence of T *frames* (steps); step t holds the image seen before action t.
A batch is a dict of numpy arrays and one list:

    frames       uint8   (B, 2, H, W, 3)   frame t and frame t+k, k = the dataset's offset
    instruction  list of B str             '' where the dataset has none
    actions      float32 (B, C, A)         label actions t .. t+C-1, in the dataset's own units
    action_mask  bool    (B, C)            False past the end of the episode
    action_sum   float32 (B, A)            what was executed over t..t+k, accumulated by kind (see KINDS)
    state        float32 (B, Ds)           proprioception at t
    dataset, episode, step  int64 (B,)     index in the mix, episode number in the split, t
    has_action   bool    (B,)

A and Ds are the mix's maxima; narrower datasets are zero-padded on the right.
Letters below: B batch, T time, C chunk, A action width, Ds state width, N pairs an episode.

Why it is built so: nearly all the cost of RLDS is decoding images that nobody looks at, and tf.data's per-dataset
parallel readers. Here an episode is parsed flat, only the images of N random pairs are gathered, still encoded;
they are mixed, go through ONE shuffle buffer sized in bytes, and only what leaves it is decoded.
"""
import os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")            # unused here, and it greets on every start
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "4")     # the default of 64 MB is held per open file
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

tf.config.set_visible_devices([], "GPU")                       # the accelerator belongs to torch


# ---------------------------------------------------------------------------------------------- registry (data)
# One letter an action dimension says how executed actions accumulate over a frame pair t..t+k:
KINDS = {"d": "delta: sum over t..t+k-1", "p": "absolute position: value at t+k minus value at t",
         "g": "gripper or quaternion: last value", "v": "velocity: sum times dt"}


@dataclass(frozen=True)
class Entry:
    """Where things are in one dataset; keys are relative to a step. Source: features.json and the OXE transforms."""
    version: str
    image: str
    instruction: str
    action: tuple[tuple[str, str], ...]         # ((key, one KINDS letter a dimension), ...), concatenated
    state: tuple[tuple[str, int], ...]          # ((key, width), ...), concatenated
    hz: float                                   # control frequency, steps a second
    offset: int                                 # k, steps between the two frames of a pair
    executed: tuple[tuple[str, str], ...] = ()  # for action_sum, where it is not the labelled action


def _metaworld() -> Entry:
    return Entry("1.0.0", "observation/image", "language_instruction", (("action", "dddg"),),
                 (("observation/state", 4),), 80.0, 8, executed=(("executed_action", "dddg"),))


_RT1 = ("observation/image", "observation/natural_language_instruction")
REGISTRY: dict[str, Entry] = {
    **{f"metaworld_{camera}": _metaworld()
       for camera in ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")},
    "bridge": Entry("0.1.0", *_RT1, (("action/world_vector", "ddd"), ("action/rotation_delta", "ddd"),
                                     ("action/open_gripper", "g")), (("observation/state", 7),), 5.0, 5),
    "fractal20220817_data": Entry(
        "0.1.0", *_RT1, (("action/world_vector", "ddd"), ("action/rotation_delta", "ddd"),
                         ("action/gripper_closedness_action", "g")),
        (("observation/base_pose_tool_reached", 7), ("observation/gripper_closed", 1)), 3.0, 3),
    "language_table": Entry("0.1.0", "observation/rgb", "observation/instruction", (("action", "dd"),),
                            (("observation/effector_translation", 2),), 10.0, 10),
}


def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"data_oxe: {message}")


def parse_mix(mix: str) -> list[tuple[str, float]]:
    """'bridge:0.7,language_table:0.3' -> [(name, weight)]; a missing weight is 1. Exits on unknown names."""
    out = []
    for part in mix.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in REGISTRY:
            fail(f"unknown dataset '{name}' in mix '{mix}'; known: {', '.join(REGISTRY)}")
        try:
            out.append((name, float(weight or 1.0)))
        except ValueError:
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' is not a number")
        if not 0 < out[-1][1] < float("inf"):
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' must be above 0")
    return out


# ---------------------------------------------------------------------------------------------- planning, in Python
@dataclass
class Plan:
    """One dataset of the mix: which files, which episodes, which features. Made before any TensorFlow graph."""
    name: str
    entry: Entry
    offset: int                 # k, steps
    files: list[str]            # TFRecord files with at least one kept episode
    first: list[int]            # episode number of each file's first record
    keep: np.ndarray            # bool, (episodes in the split,)
    features: dict              # flat key -> TFDS feature (shape, dtype, encoding)
    pair_bytes: int             # encoded size of one frame pair, from one record
    counts: dict[str, int]      # true numbers of episodes: train, val, used


def open_builder(data: str, name: str):
    """The dataset's folder DATA/NAME/VERSION as a TFDS builder; a local folder and gs:// alike."""
    path = f"{data.rstrip('/')}/{name}/{REGISTRY[name].version}"
    if not tf.io.gfile.exists(f"{path}/features.json"):
        fail(f"no dataset at '{path}' (features.json is missing); check --data '{data}' and the version, or record it: "
             f"python rollout.py --record --data {data}" if name.startswith("metaworld") else
             f"no dataset at '{path}' (features.json is missing); check --data '{data}', which should hold NAME/VERSION")
    return tfds.builder_from_directory(path)


def flat_features(builder) -> dict:
    """{'steps/observation/image': feature, ...} as TFDS writes an episode into a tf.train.Example."""
    out = {}

    def walk(prefix, feature):
        inner = feature.feature if isinstance(feature, tfds.features.Dataset) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            for key, value in inner.items():
                walk(f"{prefix}/{key}" if prefix else key, value)
        else:
            out[prefix] = inner
    walk("", builder.info.features)
    return out


def make_plan(data: str, name: str, split: str, horizon_s: float | None, val_fraction: float, max_episodes: int,
              episodes_per_task: int, rank: int, world: int) -> Plan:
    """Chooses episodes: val is the end of the split, train the rest; subsets and ranks come after, out of train."""
    entry, builder = REGISTRY[name], open_builder(data, name)
    features = flat_features(builder)
    wanted = [(entry.image, 3), (entry.instruction, None)] + [(k, len(s)) for k, s in entry.action + entry.executed]
    for key, width in wanted + list(entry.state):
        feature = features.get(f"steps/{key}")
        if feature is None:
            have = ", ".join(k.removeprefix("steps/") for k in features if k.startswith("steps/"))
            fail(f"dataset '{name}' has no step feature '{key}' in its features.json; it has: {have}")
        got = (feature.shape or (1,))[-1]
        if width is not None and got != width:
            fail(f"dataset '{name}': feature '{key}' is {got} wide, expected {width}")

    # the named split: TFDS knows the records of each shard, so nothing is counted by reading
    if "train" not in builder.info.splits:
        fail(f"dataset '{name}' has no split 'train'; it has: {', '.join(builder.info.splits)}")
    shards = builder.info.splits["train"].file_instructions
    starts = np.cumsum([0] + [s.take for s in shards])
    n = int(starts[-1])
    n_val = max(1, round(n * val_fraction)) if n > 1 and val_fraction > 0 else 0
    ids = np.arange(n - n_val, n) if split == "val" else np.arange(n - n_val)
    counts = {"train": n - n_val, "val": n_val}
    if split == "train":
        if episodes_per_task:
            ids = ids[first_per_task(name, entry, features, [s.filename for s in shards], ids, episodes_per_task)]
        if max_episodes:
            ids = ids[:max_episodes]
    counts["used"] = len(ids)
    if split == "train":
        ids = np.array_split(ids, world)[rank]
    if not len(ids):
        fail(f"dataset '{name}' has no episodes left in split '{split}' for rank {rank} of {world}: {n} recorded, "
             f"{counts['train']} train and {n_val} val at val_fraction {val_fraction}, {counts['used']} used")
    keep = np.zeros(n, bool)
    keep[ids] = True
    used = [i for i in range(len(shards)) if keep[starts[i]:starts[i + 1]].any()]
    files = [shards[i].filename for i in used]
    offset = entry.offset if horizon_s is None else round(horizon_s * entry.hz)
    if offset < (horizon_s != 0):
        fail(f"horizon {horizon_s} s is {offset} steps of '{name}' at {entry.hz} Hz; give 0 or at least {1 / entry.hz:.3f}")
    key, lengths = f"steps/{entry.image}", []
    for record in tf.data.TFRecordDataset(files).take(8):       # a look at the size of images and the length of episodes
        images = tf.io.parse_single_example(record, {key: _parser(features[key])})[key]
        lengths.append(tf.strings.length(images).numpy())
    if max(map(len, lengths)) <= offset:
        fail(f"dataset '{name}': a pair spans {offset} steps, episodes have {max(map(len, lengths))} or fewer; "
             f"shorten the horizon")
    pair_bytes = int(2 * np.mean(np.concatenate(lengths))) + 1
    return Plan(name, entry, offset, files, [int(starts[i]) for i in used], keep, features, pair_bytes, counts)


def first_per_task(name, entry, features, files, ids, per_task) -> np.ndarray:
    """Positions in `ids` of the first `per_task` episodes of each instruction. Reads instructions until the end."""
    key, seen, out = f"steps/{entry.instruction}", {}, []
    dataset = tf.data.TFRecordDataset(files).take(int(ids[-1]) + 1)
    dataset = dataset.map(lambda r: _text(tf.io.parse_single_example(r, {key: _parser(features[key])})[key][0]))
    for i, text in enumerate(dataset.as_numpy_iterator()):
        seen[text] = seen.get(text, 0) + 1
        if seen[text] <= per_task:
            out.append(i)
    short = {t.decode(): c for t, c in seen.items() if c < per_task}
    if short:
        fail(f"dataset '{name}' has fewer than {per_task} training episodes of some tasks: {short}")
    return np.searchsorted(ids, np.asarray(out))


# ---------------------------------------------------------------------------------------------- reading, in TensorFlow
def _parser(feature):
    dtype = tf.as_dtype(feature.np_dtype)
    if isinstance(feature, tfds.features.Image) or dtype == tf.string:
        return tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    wire = tf.float32 if dtype.is_floating else tf.int64        # what tf.train.Example can hold
    return tf.io.FixedLenSequenceFeature(feature.shape, wire, allow_missing=True)


def _text(x):
    """Instruction as bytes, or as language_table's zero-padded Unicode code points int (512,)."""
    if x.dtype == tf.string:
        return x
    x = tf.cast(x, tf.int32)
    return tf.strings.unicode_encode(tf.boolean_mask(x, x > 0), "UTF-8")


def _episode_reader(plan: Plan, pairs_per_episode: int, chunk: int, A: int, Ds: int, seed: int, index: int):
    """-> fn(record, episode number, epoch) -> Dataset of N encoded pairs; random numbers are stateless."""
    entry, k = plan.entry, plan.offset
    keys = {entry.image, entry.instruction, *(x for x, _ in entry.action + entry.executed), *(x for x, _ in entry.state)}
    spec = {f"steps/{x}": _parser(plan.features[f"steps/{x}"]) for x in keys}
    letters = "".join(s for _, s in entry.executed or entry.action)

    def columns(parsed, parts, T):
        """Concatenates the named features: (T, width)."""
        if not parts:
            return tf.zeros([T, 0])
        return tf.concat([tf.reshape(tf.cast(parsed[f"steps/{x}"], tf.float32), [T, -1]) for x, _ in parts], 1)

    def read(record, episode, epoch):
        parsed = tf.io.parse_single_example(record, spec)
        images = parsed[f"steps/{entry.image}"]                                             # (T,) encoded
        T = tf.shape(images)[0]
        usable = T - k                                                                      # starts t with t+k < T
        n = tf.where(usable > 0, pairs_per_episode, 0)
        t = tf.random.stateless_uniform([n], (seed + 7919 * index, episode * 131071 + epoch), 0,
                                        tf.cast(tf.maximum(usable, 1), tf.int64), tf.int64)  # (N,)
        t32 = tf.cast(t, tf.int32)
        action = columns(parsed, entry.action, T)                                           # (T, a)
        done = columns(parsed, entry.executed or entry.action, T)
        at = t32[:, None] + tf.range(chunk)[None]                                           # (N, C)
        chunks = tf.gather(action, tf.minimum(at, T - 1))                                   # (N, C, a)
        total = tf.concat([tf.zeros_like(done[:1]), tf.cumsum(done)], 0)                    # sum of steps < i
        summed = tf.gather(total, t32 + k) - tf.gather(total, t32)
        by_kind = {"d": summed, "v": summed / entry.hz,
                   "p": tf.gather(done, t32 + k) - tf.gather(done, t32),
                   "g": tf.gather(done, tf.maximum(t32 + k - 1, 0))}
        action_sum = (tf.stack([by_kind[c][:, i] for i, c in enumerate(letters)], 1) if letters
                      else tf.zeros([n, 0]))
        pad = lambda x, width: tf.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[0, width - tf.shape(x)[-1]]])
        text = parsed[f"steps/{entry.instruction}"][0]
        return tf.data.Dataset.from_tensor_slices({
            "frames": tf.gather(images, tf.stack([t32, t32 + k], 1)),                       # (N, 2) encoded
            "instruction": tf.fill([n], _text(text)),
            "actions": tf.ensure_shape(pad(chunks, A), [None, chunk, A]),
            "action_mask": at < T,
            "action_sum": tf.ensure_shape(pad(action_sum, A), [None, A]),
            "state": tf.ensure_shape(pad(tf.gather(columns(parsed, entry.state, T), t32), Ds), [None, Ds]),
            "dataset": tf.fill([n], tf.constant(index, tf.int64)), "episode": tf.fill([n], episode), "step": t,
            "has_action": tf.fill([n], bool(entry.action)),
        })
    return read


def _pair_stream(plan: Plan, read, seed: int):
    """Endless encoded pairs of one dataset: epochs of shuffled files, a few open at a time, kept episodes only."""
    keep = tf.constant(plan.keep)
    files, first = tf.constant(plan.files), tf.constant(plan.first, tf.int64)

    def epoch(e):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(plan.files)), (tf.constant(seed, tf.int64), e))
        records = tf.data.Dataset.from_tensor_slices(order).interleave(   # not parallel: that costs gigabytes in a mix
            lambda i: tf.data.TFRecordDataset(files[i]).enumerate(first[i]), cycle_length=min(8, len(plan.files)))
        records = records.filter(lambda i, record: keep[i])
        return records.flat_map(lambda i, record: read(record, i, e))
    return tf.data.Dataset.range(1 << 40).flat_map(epoch)


def _decode(size: int, same: bool):
    def frame(encoded):
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)            # PNG or JPEG, by its bytes
        shape = tf.shape(image)
        right = tf.logical_and(shape[0] == size, shape[1] == size)
        image = tf.cond(right, lambda: image, lambda: tf.cast(tf.round(tf.image.resize(
            image, (size, size), "area" if size < 512 else "bilinear")), tf.uint8))
        return tf.ensure_shape(image, (size, size, 3))

    def decode(item):
        if not size:
            return {k: v for k, v in item.items() if k != "frames"}
        a = frame(item["frames"][0])
        return {**item, "frames": tf.stack([a, a if same else frame(item["frames"][1])])}   # (2, H, W, 3)
    return decode


class Loader:
    """Endless iterator of batches (module docstring). Deterministic by seed; `iter()` starts at the position.
    image_size 0 leaves out `frames`, for statistics.

    data: folder or gs:// bucket that holds NAME/VERSION; mix: 'name:weight,...'; split: 'train' or 'val'.
    batch_size: of this rank; horizon_s: seconds between the frames (None: each dataset's own offset; 0: the same
    frame twice, for policies). episodes_per_task counts episodes of equal instruction. Ranks get disjoint episodes
    of train; val is the same on every rank. Errors of data and arguments exit with one line.
    """

    def __init__(self, data: str, mix: str, split: str, batch_size: int, image_size: int, *, chunk: int = 1,
                 horizon_s: float | None = None, pairs_per_episode: int = 8, val_fraction: float = 0.1,
                 max_episodes: int = 0, episodes_per_task: int = 0, shuffle_mb: float = 64.0, threads: int = 2,
                 seed: int = 0, rank: int = 0, world: int = 1):
        names, weights = zip(*parse_mix(mix))
        self.plans = [make_plan(data, n, split, horizon_s, val_fraction, max_episodes, episodes_per_task, rank, world)
                      for n in names]
        self.names, self.batch_size, self.position = names, batch_size, 0
        self.action_dim = max(sum(len(s) for _, s in p.entry.action) for p in self.plans)
        self.state_dim = max(sum(w for _, w in p.entry.state) for p in self.plans)
        letters = ["".join(s for _, s in p.entry.executed or p.entry.action) for p in self.plans]
        self.motion_dims = [i for i in range(self.action_dim) if any(x[i:i + 1] in "dpv" and x[i:] for x in letters)]
        self.horizon = {p.name: {"steps": p.offset, "seconds": p.offset / p.entry.hz} for p in self.plans}
        self.counts = {p.name: p.counts for p in self.plans}
        self.source_size = {p.name: p.features[f"steps/{p.entry.image}"].shape[0] for p in self.plans}  # recorded height
        self._identity = dict(mix=mix, split=split, batch_size=batch_size, seed=seed, world=world)
        seed = seed + 1_000_003 * rank if split == "train" else seed
        streams = [_pair_stream(p, _episode_reader(p, pairs_per_episode, chunk, self.action_dim, self.state_dim, seed, i),
                                seed + i) for i, p in enumerate(self.plans)]
        mixed = streams[0] if len(streams) == 1 else tf.data.Dataset.sample_from_datasets(
            streams, list(np.array(weights) / sum(weights)), seed=seed, rerandomize_each_iteration=False)
        mean_bytes = np.average([p.pair_bytes for p in self.plans], weights=weights)
        buffer = max(batch_size, int(shuffle_mb * 1e6 / mean_bytes))
        self._encoded = mixed.shuffle(buffer, seed=seed, reshuffle_each_iteration=False)
        self._decode = _decode(image_size, same=all(p.offset == 0 for p in self.plans))
        self._threads = threads

    def __iter__(self):
        for batch in self._batches(self.position):
            self.position += 1
            yield batch

    def first(self, n: int):
        """The stream's first n batches, the same at every call; the position does not move. For validation."""
        return islice(self._batches(0), n)

    def _batches(self, position: int):
        # skip() stands before the decoder: resuming reads the stream again from its start, but decodes none of it
        ds = self._encoded.skip(position * self.batch_size)
        ds = ds.map(self._decode, num_parallel_calls=self._threads).batch(self.batch_size, drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.autotune.enabled = False                        # autotune grows buffers until memory ends
        options.deterministic = True
        options.threading.private_threadpool_size = self._threads
        options.threading.max_intra_op_parallelism = 1
        for batch in ds.with_options(options):
            batch = {k: v.numpy() for k, v in batch.items()}
            batch["instruction"] = [s.decode("utf-8", "replace") for s in batch["instruction"]]
            yield batch

    def state_dict(self) -> dict:
        """A few bytes: the number of batches handed out, and what the stream depends on."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: dict):
        """Continues after the batches of `state`; exits when the stream would be another one."""
        for key, value in self._identity.items():
            if state[key] != value:
                fail(f"cannot resume the data stream: {key} was {state[key]!r}, is {value!r}")
        self.position = state["position"]


# ---------------------------------------------------------------------------------------------- writing
class EpisodeWriter:
    """Writes episodes as an RLDS dataset that `tfds.builder_from_directory` reads.

    Everything goes to DATA/NAME/.VERSION.partial and is renamed on a clean exit, so a dataset is whole or absent.
    """

    def __init__(self, data: str, name: str, image_size: int, action_dim: int, state_dim: int, per_shard: int = 16):
        self.final = Path(data) / name / REGISTRY[name].version
        self.partial = self.final.with_name(f".{self.final.name}.partial")
        if self.final.exists():
            fail(f"'{self.final}' exists already; remove it or record to another --data folder")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        f = tfds.features
        vector = lambda n: f.Tensor(shape=(n,), dtype=np.float32)
        features = f.FeaturesDict({
            "episode_metadata": {"task": f.Text(), "seed": np.int64, "success": np.bool_, "file_path": f.Text()},
            "steps": f.Dataset({
                "observation": {"image": f.Image(shape=(image_size, image_size, 3), encoding_format="png"),
                                "state": vector(state_dim)},
                "action": vector(action_dim), "executed_action": vector(action_dim), "language_instruction": f.Text(),
                "reward": np.float32, "discount": np.float32,
                "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_})})
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version(REGISTRY[name].version), data_dir=str(self.partial), module_name="")
        info = tfds.core.DatasetInfo(builder=identity, features=features, description="Recorded by nanoLAPA.")
        self.writer = tfds.core.SequentialWriter(info, per_shard)
        self.writer.initialize_splits(["train"])

    def __enter__(self):
        return self

    def add(self, images, state, action, executed_action, reward, instruction: str, *, task: str, seed: int,
            success: bool, file_path: str):
        """One episode: images T encoded PNGs (bytes) or uint8 (T, H, W, 3); state (T, Ds); actions (T, A); reward (T,)."""
        T = len(images)
        steps = [{"observation": {"image": images[t], "state": np.float32(state[t])},
                  "action": np.float32(action[t]), "executed_action": np.float32(executed_action[t]),
                  "language_instruction": instruction, "reward": np.float32(reward[t]), "discount": np.float32(1),
                  "is_first": t == 0, "is_last": t == T - 1, "is_terminal": bool(success and t == T - 1)}
                 for t in range(T)]
        self.writer.add_examples({"train": [{"steps": steps, "episode_metadata": dict(
            task=task, seed=seed, success=success, file_path=file_path)}]})

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.writer.close_all()
            self.partial.rename(self.final)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- commands
def list_datasets(data: str = "data"):
    """The registry, and which of it lies in the folder (or bucket) --data."""
    for name, entry in REGISTRY.items():
        path = f"{data.rstrip('/')}/{name}/{entry.version}"
        if tf.io.gfile.exists(f"{path}/features.json"):
            info = tfds.builder_from_directory(path).info
            here = ", ".join(f"{k} {s.num_examples} episodes" for k, s in info.splits.items())
            here += f", {info.dataset_size / 1e6:.0f} MB"
        else:
            here = "-"
        print(f"{name:24s} {entry.version}  {entry.hz:5.1f} Hz  pair {entry.offset} steps  {here}")


def inspect(data: str = "data", mix: str = "metaworld_corner4", image_size: int = 128, batches: int = 8,
            out: str = "runs/inspect"):
    """Prints counts, shapes and ranges of a mix and saves a contact sheet of frame pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    loader = Loader(data, mix, "train", 32, image_size, chunk=8)
    for name, c in loader.counts.items():
        print(f"{name}: {c['train']} train + {c['val']} val episodes, pairs {loader.horizon[name]['steps']} steps "
              f"({loader.horizon[name]['seconds']:.2f} s) apart")
    rows = list(loader.first(batches))
    for key in rows[0]:
        if key == "instruction":
            texts = sorted({s for b in rows for s in b[key]})
            print(f"{key:12s} {len(texts)} different in {32 * batches} samples: {texts[:8]}")
        else:
            x = np.concatenate([b[key] for b in rows])
            print(f"{key:12s} {str(x.dtype):8s} {str(x.shape):22s} min {x.min():.3g} mean {x.mean():.3g} max {x.max():.3g}")
    fig, axes = plt.subplots(4, 6, figsize=(15, 7))
    b = rows[0]
    for i, ax in enumerate(axes.flat):
        ax.imshow(np.concatenate(b["frames"][i], axis=1))
        ax.set_axis_off()
        motion = np.abs(np.diff(b["frames"][i].astype(float), axis=0)).mean()
        ax.set_title(f"{loader.names[b['dataset'][i]]} ep {b['episode'][i]} t {b['step'][i]}\n"
                     f"{b['instruction'][i][:36]}\nmean |difference| {motion:.1f}", fontsize=7)
    Path(out).mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(f"{out}/contact_sheet.png", dpi=80)
    print(f"contact sheet (frame t | frame t+k): {out}/contact_sheet.png")


if __name__ == "__main__":
    import tyro
    tyro.extras.subcommand_cli_from_dict({"list": list_datasets, "inspect": inspect}, description=__doc__)
