"""Open X-Embodiment / RLDS episodes on disk -> batches of frame pairs. Pure tf.data, one file.

    python data_oxe.py list    --data data                              # registry, and what is here
    python data_oxe.py inspect --data data --mix metaworld_corner4      # counts, ranges, pictures
    python data_oxe.py stats   --data data --mix bridge                 # percentiles, mean, std
    python data_oxe.py from-videos --videos clips --captions clips.csv --name clips --fps 10
    python data_oxe.py from-lerobot --source hub:lerobot/pusht --name pusht

As a module (the only code the stages share):

    cfg = DataConfig(data="data", mix="bridge:0.7,fractal20220817_data:0.3")
    loader = Loader(cfg, "train", batch_size=64, image_size=224)
    for batch in loader: ...            # endless, numpy; state_dict() / load_state_dict() to resume
    for batch in loader.to("cuda"): ... # the same as tensors, the next batch already on its way

Terms. A *trajectory* (episode) is a sequence of T *frames* (steps); step t holds the image seen
before action t. A batch is a dict of numpy arrays and one list:

    frames       uint8   (B, 2, H, W, 3)   frame t and frame t+k, k = the dataset's offset
    instruction  list of B str             '' where the dataset has none
    actions      float32 (B, C, A)         label actions t .. t+C-1, in the dataset's own units
    action_mask  bool    (B, C)            False past the end of the episode
    action_sum   float32 (B, A)            what they did over t..t+k, by kind (see KINDS)
    state        float32 (B, Ds)           proprioception at t
    dataset, episode, step  int64 (B,)     index in the mix, episode number in the split, t
    has_action   bool    (B,)
    views        uint8   (B, N-1, H, W, 3) frame t of further cameras, if cameras=N > 1 is asked
                                           for; black where a dataset has fewer

A and Ds are the mix's maxima; narrower datasets are zero-padded on the right. With resize="gpu"
`frames` keeps the decoded size: one array if all pictures of the batch agree, else a list of B
arrays (2, h, w, 3); to() resizes.
Letters below: B batch, T time, C chunk, A action width, Ds state width, N pairs an episode.

Why it is built so: nearly all the cost of RLDS is decoding images that nobody looks at, and
tf.data's per-dataset parallel readers. Here an episode is parsed flat, only the images of N random
pairs are gathered, still encoded; they are mixed and shuffled in ONE place of bounded size, and
only what leaves it is decoded.

    draw     the mix picks datasets, not pairs; a draw is the next episode of the dataset picked. So
             how far each dataset was read is a count that Python can make without reading,
             whatever the episodes hold.
    block    a number of draws, their pairs shuffled; blocks replace tf.data's shuffle buffer, whose
             content would have to be saved. A position is (block, pairs taken of it); a resume
             skips within the files that were open (eight in all, or one a dataset), and reads at
             most one block again.
    random   every random number is a function of (seed, what it is for); nothing depends on threads
             or on history.
    fault    readers report bad episodes to Python and give no pairs for them; nothing is dropped
             silently.
"""
import os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")             # unused here, and greets on start
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "4")      # 64 MB by default, per open file
import contextlib
import importlib
import io
import itertools
import json
import math
import re
import shutil
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Literal

import numpy as np


class Later:
    """A module that is imported at its first use: who reads no data, as a policy, needs neither."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(loaded(self.name), attribute)


@cache
def loaded(name: str):
    import tensorflow
    tensorflow.config.set_visible_devices([], "GPU")            # the accelerator belongs to torch
    tensorflow.get_logger().setLevel("ERROR")                   # warns of more than four Loaders
    return importlib.import_module(name)


tf, tfds = Later("tensorflow"), Later("tensorflow_datasets")


@dataclass
class DataConfig:
    """What every stage may say about its data; the stages' Configs inherit it."""

    data: str = "data"                      # folder or gs:// bucket with NAME/VERSION datasets
    mix: str = "metaworld_corner4"          # datasets or mixes: 'a:0.3,b:0.7', 'oxe29'; see `list`
    weights: Literal["given", "equal", "proportionate"] = "given"   # shares; the last: times frames
    val_fraction: float = 0.1               # share of episodes held out for validation
    holdout: str = ""                       # 'KEY~REGEX': hold out episodes whose KEY matches
    episodes_per_task: int = 0              # training episodes of each instruction; 0: all
    pairs_per_episode: int = 8              # samples drawn from an episode at each reading; 0: all
    shuffle_mb: float = 256.0               # encoded pictures held for shuffling
    resize: Literal["cpu", "gpu"] = "cpu"   # where pictures are resized
    threads: int = 0                        # decoding threads; 0: this process's share of the cores
    max_bad: float = 0.001                  # share of faulty episodes to skip before stopping


# One letter an action dimension says how actions accumulate over a frame pair t..t+k:
KINDS = {"d": "delta: sum over t..t+k-1", "p": "absolute position: value at t+k minus value at t",
         "g": "gripper or quaternion: last value", "v": "velocity: sum times dt",
         "u": "meaning not verified: last value, not counted as motion",
         "-": "stored, but no part of the action"}


@dataclass(frozen=True)
class Entry:
    """Where things are in one dataset; keys are relative to a step and may hold '/'. Source:
    features.json, the TFDS catalog and the OXE transforms of Octo and OpenVLA.

    In the specs, parts are separated by spaces, and `d*3,g` is `dddg`. Of a part's third field, the
    storage, only tests make use, to write such a dataset; a reader finds it in features.json:
    `float64`, `zlib` (compressed bytes), `bool()` (a scalar), `int32[512]` (code points).
    """
    version: str = "0.1.0"
    frame: str = ""             # recorded height x width and encoding ('?': no source says)
    image: str = "observation/image"                    # main camera
    instruction: str = "language_instruction"           # variants, one is drawn; '': there are none
    action: str = ""            # key:letters[:storage], one KINDS letter a stored dimension; where
                                # a dataset tells them apart, what was done, not what was commanded
    state: str = ""             # key:width[:storage]
    hz: float = 0               # control frequency, steps a second; 0 where no source says
    offset: int = 5             # k, steps between the two frames of a pair
    skip: int = 0               # leading steps that the dataset's own transform drops
    success: str = ""           # flat key of a bool, where some episodes are failures
    bgr: bool = False           # pictures are stored with red and blue exchanged
    cameras: str = ""           # keys of further cameras, as the wrist's; '': there are none


# What keeps an episode from use. Faults are named one by one and bounded by max_bad; the others are
# ordinary in Open X-Embodiment: they are counted.
UNREADABLE, SHORT, NO_TEXT, NOT_FINITE, UNDECODABLE, FAILED, UNEVEN = range(1, 8)
FAULTS = {UNREADABLE: "the record is unreadable (file truncated or corrupt)",
          NOT_FINITE: "an action or state is not finite",
          UNDECODABLE: "an image does not decode",
          UNEVEN: "the record is unreadable (its features differ in length)"}
UNFIT = {SHORT: "shorter than a frame pair", NO_TEXT: "without an instruction", FAILED: "failed"}
MOSTLY = 0.9                    # share of a dataset's episodes that may be unfit


class Loader:
    """Endless iterator of batches (module docstring). Deterministic by seed; `iter()` starts at the
    position.

    split: 'train' or 'val'. batch_size: of this rank. image_size: of square frames; 0 leaves out
    `frames`, for statistics; resize 'gpu' hands over the decoded size and leaves resizing to to().
    horizon_s: seconds between the frames (None: each dataset's own offset; 0: the same frame twice,
    for policies). consecutive: frame pairs of a sample, (t, t+k), (t+k, t+2k) ..., all within the
    episode; frames are then (B, 1 + consecutive, H, W, 3). follow: frames after these, k apart and
    in `frames` too; beyond the episode's end they are its last. chunk: C. min_motion: drops pairs
    whose 16x16 thumbnails differ by less, mean absolute difference in grey levels. demonstrations:
    leaves out episodes without an instruction, where the dataset has them, and failed ones, where
    it says so. fraction: share of each dataset's episodes of train, the same choice on all ranks
    and with any seed; a smaller one is a part of it. at_most: instead of cfg's episodes_per_task,
    so many training episodes of each instruction, or as many as there are; without instructions a
    dataset is one task; 0: cfg's. cameras: N, how many a sample shows, see `views`. shuffle_mb:
    instead of cfg's.
    Ranks get disjoint episodes of train; val is the same on every rank. Errors of data and
    arguments exit with one line.
    """

    def __init__(self, cfg: DataConfig, split: str, batch_size: int, image_size: int, *,
                 horizon_s: float | None = None, chunk: int = 1, min_motion: float = 0.0,
                 demonstrations: bool = True, shuffle_mb: float | None = None, seed: int = 0,
                 rank: int = 0, world: int = 1, consecutive: int = 1, follow: int = 0,
                 fraction: float = 1.0, at_most: int = 0, cameras: int = 1):
        check(cfg, batch_size, chunk, min_motion, image_size, horizon_s, cameras)
        self.cfg, self.batch_size, self.image_size, self.chunk = cfg, batch_size, image_size, chunk
        self.min_motion, self.demonstrations = min_motion, demonstrations
        self.consecutive = consecutive
        self.views = cameras - 1
        self.shown = 1 + consecutive + follow                   # frames of a sample
        self.threads = cfg.threads or threads_here()
        plan_of = partial(make_plan, cfg, split=split, horizon_s=horizon_s, consecutive=consecutive,
                          follow=follow, demonstrations=demonstrations, fraction=fraction,
                          at_most=at_most, cameras=cameras, rank=rank, world=world)
        self.plans = [plan_of(name) for name in parse_mix(cfg.mix)]
        self.describe_mix()
        self.faults = Faults(self.plans, cfg.max_bad)
        self.seed = seed + 1_000_003 * rank if split == "train" else seed
        open_files = max(1, 8 // len(self.plans))
        self.records = Records(self.plans, self.seed, open_files)
        self.pipeline = None, None                              # what it starts with, iterable
        self.progress = tf.Variable([0, 0], dtype=tf.int64)     # draws begun, dataset of the last

        share = shares(cfg, {p.name: p.frames for p in self.plans})
        self.share = dict(zip(self.names, (share / share.sum()).tolist()))
        per_draw = share / [p.pairs for p in self.plans]        # a draw gives several pairs
        self.chance = np.cumsum(per_draw / per_draw.sum()).astype(np.float32)[:-1]
        pair_bytes = [p.pairs * p.pair_bytes for p in self.plans]
        held_mb = cfg.shuffle_mb if shuffle_mb is None else shuffle_mb
        block_bytes = 1e6 * held_mb / 2                         # the next block is read meanwhile
        draws = int(block_bytes / np.average(pair_bytes, weights=per_draw))
        self.block_size = max(1, min(draws, self.faults.episodes))
        self.block_pairs = self.block_size * np.average([p.pairs for p in self.plans],
                                                        weights=per_draw)
        self.position = (0, 0)                                  # block, pairs taken of it
        self.drawn = (0, np.zeros(len(self.plans), int))        # block, draws of each before it
        self.identity = {
            "world": world, "rank": rank, "split": split, "mix": cfg.mix, "weights": cfg.weights,
            "holdout": cfg.holdout, "batch_size": batch_size, "image_size": image_size,
            "horizon_s": horizon_s, "chunk": chunk, "min_motion": min_motion, "seed": seed,
            "demonstrations": demonstrations, "resize": cfg.resize,
            "pairs_per_episode": cfg.pairs_per_episode, "block": self.block_size,
            "episodes": [p.used for p in self.plans],
            "checksum of the recording": zlib.crc32(
                json.dumps([p.fingerprint for p in self.plans]).encode()),
            "checksum of the chosen episodes": zlib.crc32(
                b"".join(f.keep.tobytes() for p in self.plans for f in p.files))}
        if min_motion:                                          # or nothing would ever come
            self.check_motion()

    def describe_mix(self):
        """What the stages ask of a mix: names, widths, offsets, counts."""
        entries = {p.name: p.entry for p in self.plans}
        self.names = tuple(entries)
        self.action_dim = max(len(kinds_of(e.action)) for e in entries.values())
        self.state_dim = max(len(kinds_of(e.state)) for e in entries.values())
        self.motion_dims = {name: [i for i, c in enumerate(kinds_of(e.action))
                                   if c in "dpv"] for name, e in entries.items()}
        self.horizon = {p.name: {"steps": p.offset, "seconds": p.offset / p.entry.hz
                                 if p.entry.hz else None} for p in self.plans}
        self.counts = {p.name: p.counts for p in self.plans}
        self.source_size = {p.name: p.picture.shape[0] for p in self.plans}         # height

    def summary(self) -> str:
        """One line a dataset: true counts, pair offset, share of the mix."""
        lines = []
        for name, c in self.counts.items():
            seconds = self.horizon[name]["seconds"]
            lines.append(f"{name}: {c['recorded']} episodes recorded, {c['train']} train, "
                         f"{c['val']} val, {c['used']} used; pairs {self.horizon[name]['steps']} "
                         f"steps ({'? s' if seconds is None else f'{seconds:.2f} s'}) apart; "
                         f"{self.share[name]:.1%} of the pairs{self.faults.unfit(name)}")
        return "\n".join(lines)

    def __iter__(self):
        for batch, position in self.batches(self.position):
            self.position = position
            yield batch

    def peek(self, n: int):
        """The stream's first n batches, the same at every call; the position does not move. For
        validation."""
        return (batch for batch, _ in itertools.islice(self.read((0, 0)), n))

    def to(self, device, more=None):
        """As `iter()`, with torch tensors on `device`. One thread waits for the reader, one adds
        what `more`, fn(batch of arrays) -> further arrays, makes of a batch, pins it, sends it and
        resizes, while the consumer computes."""
        sender = Sender(device, self.image_size, more)
        for batch, position in ahead(self.read(self.position), sender.send):
            sender.keep(batch)
            self.position = position
            yield batch

    def state_dict(self) -> dict:
        """The position of the next batch, the bad episodes so far and what the stream depends
        on: a kilobyte."""
        drawn = self.draws_before(self.position[0])
        self.drawn = self.position[0], drawn
        bad = [[*which, where] for which, where in self.faults.bad.items()]
        return {"position": list(self.position), "drawn": drawn.tolist(), "bad": bad,
                **self.identity}

    def load_state_dict(self, state: dict):
        """Continues after the batches of `state`; exits when the stream would be another one."""
        for key, value in self.identity.items():
            if state.get(key) != value:
                fail(f"cannot resume the data stream: {key} was {state.get(key)!r}, is {value!r}")
        self.position = tuple(state["position"])
        self.drawn = self.position[0], np.array(state["drawn"])
        self.faults.bad = {(dataset, episode): where for dataset, episode, where in state["bad"]}

    def skip(self, batches: int):
        """Starts at the block that holds about the pair after so many batches."""
        self.position = int(batches * self.batch_size / self.block_pairs), 0

    # ---------------------------------------- the stream
    def choices(self, block):
        """Which dataset each draw of a block comes from, int64, a function of the seed and the
        block alone. Evenly spaced points in a random order, so that every block holds the shares,
        not only the long run."""
        seed = stateless_seed(self.seed, 1, block)
        order = tf.random.experimental.stateless_shuffle(tf.range(self.block_size), seed)
        jitter = tf.random.stateless_uniform([], seed)
        u = (tf.cast(order, tf.float32) + jitter) / self.block_size
        return tf.searchsorted(tf.constant(self.chance), u, side="right", out_type=tf.int64)

    def draws_before(self, block: int) -> np.ndarray:
        """How often each dataset was drawn before a block."""
        at, drawn = self.drawn
        if at > block:                                          # the count begins anew
            at, drawn = 0, np.zeros(len(self.plans), int)
        for b in range(at, block):
            chosen = self.choices(tf.constant(b, tf.int64)).numpy()
            drawn = drawn + np.bincount(chosen, minlength=len(self.plans))
        return drawn

    def encoded(self, position: tuple[int, int]):
        """The stream of pairs, pictures still encoded, from a position on: dicts as sample() makes
        them, with "block" and "place", its place in the block, in it."""
        block, taken = position
        drawn = self.draws_before(block)
        A = max(1, self.action_dim)                             # tf.data breaks at width 0
        streams = []
        for i, plan in enumerate(self.plans):
            read = Reader(plan, i, A, self.state_dim, self.seed, self.demonstrations,
                          self.views).parse
            streams.append(self.records.start_at(i, int(drawn[i])).map(no_autograph(read)))
        blocks = tf.data.Dataset.range(block, FOREVER)
        order = blocks.flat_map(no_autograph(self.choices_dataset)).map(no_autograph(self.begin))
        mixed = tf.data.Dataset.zip(order, streams[0]).map(no_autograph(lambda which, x: x))
        if len(streams) > 1:
            mixed = tf.data.Dataset.choose_from_datasets(streams, order)
        pairs = mixed.map(no_autograph(Sampler(self).sample))
        pairs = pairs.prefetch(self.block_size)                 # the next block, meanwhile
        windows = tf.data.Dataset.zip(blocks, pairs.window(self.block_size))
        ds = windows.flat_map(no_autograph(self.shuffled)).skip(taken)
        return ds.filter(no_autograph(self.faults.decodes)) if self.faults.undecodable else ds

    def choices_dataset(self, block):
        return tf.data.Dataset.from_tensor_slices(self.choices(block))

    def begin(self, dataset):
        """A draw begins: notes of which dataset."""
        now = self.progress.assign(tf.stack([self.progress[0] + 1, dataset]))
        with tf.control_dependencies([now]):
            return tf.identity(dataset)

    def shuffled(self, block, draws: dict):
        """A block's pairs in a random order. Encoded pictures move through, they are not copied."""
        seed = tf.random.stateless_uniform([], stateless_seed(self.seed, 2, block), None, None,
                                           tf.int64)
        pairs = tf.data.Dataset.zip(draws).unbatch()
        pairs = pairs.shuffle(tf.data.UNKNOWN_CARDINALITY, seed=seed,
                              reshuffle_each_iteration=False)
        return pairs.enumerate().map(
            no_autograph(lambda place, pair: {**pair, "block": block, "place": place}))

    def decoded(self, pair: dict) -> dict:
        """Last stage of the pipeline, in parallel: one encoded pair -> its frames."""
        pair = dict(pair)
        images = tf.unstack(pair.pop("images"), self.shown + self.views)
        images, views = images[:self.shown], images[self.shown:]
        if not self.image_size:
            return pair
        if views:
            pair["views"] = tf.stack([self.view(encoded) for encoded in views])
        if all(plan.offset == 0 for plan in self.plans):
            frames = tf.stack([self.picture(images[0])] * self.shown)
        else:
            frames = tf.stack([self.picture(image) for image in images])
        if self.min_motion:
            small = tf.image.resize(frames, (16, 16), "area")
            difference = tf.reduce_mean(tf.abs(small[1] - small[0]))
            pair["moved"] = difference >= self.min_motion
        if self.cfg.resize == "gpu":                            # flat, as sizes may differ
            pair["size"] = tf.shape(frames, tf.int64)[1:3]
            frames = tf.reshape(frames, [-1])
        return {**pair, "frames": frames}

    def picture(self, encoded):
        shapes = [plan.picture.shape or (None,) for plan in self.plans]
        largest = max(4096 if None in shape else max(shape) for shape in shapes)
        return decode_picture(encoded, self.image_size, largest, self.cfg.resize == "gpu")

    def view(self, encoded):
        """Of a further camera; black where there is none."""
        black = tf.zeros([self.image_size, self.image_size, 3], tf.uint8)
        return tf.cond(tf.equal(encoded, ""), lambda: black, lambda: self.picture(encoded))

    def tensors(self, position: tuple[int, int]):
        """The tf.data pipeline of batches from a position."""
        ds = self.encoded(position)
        ds = ds.map(no_autograph(self.decoded), num_parallel_calls=self.threads)
        if self.image_size and self.min_motion:
            ds = ds.filter(no_autograph(lambda pair: pair["moved"]))
        if self.image_size and self.cfg.resize == "gpu":
            ds = ds.padded_batch(self.batch_size, drop_remainder=True)
        else:
            ds = ds.batch(self.batch_size, drop_remainder=True)
        return self.frugal(ds)

    def frugal(self, ds):
        """Few threads, little memory, the same order always."""
        options = tf.data.Options()
        options.autotune.enabled = False                        # grows buffers until memory ends
        options.deterministic = True
        options.experimental_optimization.apply_default_optimizations = False       # no gain, slow
        options.threading.private_threadpool_size = self.threads
        options.threading.max_intra_op_parallelism = 1
        return ds.prefetch(2).with_options(options)

    def to_batch(self, item: dict) -> tuple[dict, tuple[int, int]]:
        """What the pipeline delivers -> (batch of the contract, position after it). Views, no
        copies."""
        numbers, floats = item["integers"], item["floats"]      # (B, 4), (B, C*A + A + Ds)
        B, C, A = len(numbers), self.chunk, max(1, self.action_dim)
        actions = floats[:, :C * A].reshape(B, C, A)
        has_action = np.array([bool(plan.entry.action) for plan in self.plans])
        batch = {"instruction": [s.decode("utf-8", "replace") for s in item["text"]],
                 "actions": actions[:, :, :self.action_dim],
                 "action_mask": np.arange(C) < numbers[:, 3:],
                 "action_sum": floats[:, C * A:C * A + self.action_dim],
                 "state": floats[:, C * A + A:],
                 "dataset": numbers[:, 0], "episode": numbers[:, 1], "step": numbers[:, 2],
                 "has_action": has_action[numbers[:, 0]]}
        if "frames" in item:
            frames = item["frames"]
            if "size" in item:
                frames = unpadded(frames, item["size"], self.shown)
            batch["frames"] = frames
            batch |= {"views": item["views"]} if self.views else {}
            bgr = np.array([plan.entry.bgr for plan in self.plans])
            for i in np.flatnonzero(bgr[batch["dataset"]]):
                swap_red_and_blue(frames[i])
                if self.views:
                    swap_red_and_blue(item["views"][i])
        block, place = (int(item[name][-1]) for name in ("block", "place"))
        return batch, (block, place + 1)

    def batches(self, position: tuple[int, int]):
        """Endless (batch, position after it) from a position. What breaks the pipeline, an image
        that does not decode or a file out of reach, lets it start again at the batch: without that
        pair, or when the file is back. The price is paid by those who have such data."""
        wait, errors = Patience(), (tf.errors.OpError, OutOfReach)      # at exit, globals are gone
        while True:
            try:
                for item in self.pipeline_from(position):
                    self.faults.read_reports()
                    arrays = {name: x._numpy() for name, x in item.items()}         # numpy() copies
                    batch, position = self.to_batch(arrays)
                    wait = Patience()
                    yield batch, position
            except errors as error:
                self.pipeline = None, None
                self.explain(error, position, wait)

    def read(self, position: tuple[int, int]):
        """batches() from a thread, so that who waits for one can tell that a reader stands still: a
        disk or server that answers nothing is no error of its own."""
        stall = Stall(self)
        return ahead(self.batches(position), lambda batch: batch, stall)

    def pipeline_from(self, position: tuple[int, int]):
        """Kept, as validation opens it again and again."""
        key = position, len(self.faults.undecodable)
        if self.pipeline[0] != key:
            self.pipeline = key, self.tensors(position)
        return self.pipeline[1]

    def explain(self, error: Exception, position: tuple[int, int], wait):
        """Returns where the pipeline may start again, after a pause if a file was out of reach."""
        try:
            self.faults.read_reports()                          # exits if too much was reported
        except OutOfReach as lost:
            error = lost
        if isinstance(error, OutOfReach):
            wait(error)
        elif not isinstance(error, (tf.errors.InvalidArgumentError, tf.errors.DataLossError)):
            wait(first_line(error))
        elif not self.blame(position):
            fail(f"reading broke off after batch position {position}: {first_line(error)}")

    def blame(self, position: tuple[int, int]) -> bool:
        """Finds the next pairs that do not decode and reports their episodes: at least one, as a
        batch just failed on it."""
        known, ahead_of = len(self.faults.undecodable), 4 * self.batch_size
        with contextlib.suppress(tf.errors.OpError):            # another fault: not an image's
            for pair in self.encoded(position):
                try:
                    self.decoded(pair)
                except tf.errors.InvalidArgumentError:
                    self.faults.undecodable.add((int(pair["block"]), int(pair["place"])))
                    self.faults.report(*pair["integers"][:2], UNDECODABLE)
                ahead_of -= len(self.faults.undecodable) > known
                if ahead_of <= 0:
                    break
        return len(self.faults.undecodable) > known

    def check_motion(self):
        sample = self.encoded((0, 0)).take(256)
        sample = sample.map(no_autograph(self.decoded), num_parallel_calls=self.threads)
        if not any(pair["moved"].numpy() for pair in sample):
            fail(f"none of the first 256 pairs moves by min_motion {self.min_motion} grey levels")


def check(cfg: DataConfig, batch_size, chunk, min_motion, image_size, horizon_s, cameras):
    if cfg.resize not in ("cpu", "gpu"):
        fail(f"resize '{cfg.resize}' must be cpu or gpu")
    if cfg.weights not in ("given", "equal", "proportionate"):
        fail(f"weights '{cfg.weights}' must be given, equal or proportionate")
    for name in ("pairs_per_episode", "episodes_per_task", "threads"):
        if getattr(cfg, name) < 0:
            fail(f"{name} {getattr(cfg, name)} must not be negative")
    if min(batch_size, chunk, cameras) < 1:
        fail(f"batch_size {batch_size}, chunk {chunk} and cameras {cameras} must be at least 1")
    if cameras > 1 and cfg.resize == "gpu":
        fail(f"cameras {cameras} need resize 'cpu': pictures of several cameras differ in size")
    if not 0 <= cfg.max_bad <= 1 or not 0 <= cfg.val_fraction < 1:
        fail(f"max_bad {cfg.max_bad} and val_fraction {cfg.val_fraction} are shares, from 0 to 1")
    if min_motion and (not image_size or horizon_s == 0):
        fail(f"min_motion {min_motion} needs pictures of two moments; image_size is {image_size}, "
             f"horizon_s {horizon_s}")


def check_cameras(plans: list, cameras: int):
    has = {plan.name: 1 + len(plan.entry.cameras.split()) for plan in plans}
    if cameras > max(has.values()):
        fail(f"cameras {cameras} are more than any dataset of the mix has: {has}; name the keys of "
             f"further ones as `cameras` of the entry")


def threads_here() -> int:
    """The cores that this job may use here, divided among its processes of torchrun; 16 at most."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, len(os.sched_getaffinity(0)) // processes))


def unpadded(frames: np.ndarray, size: np.ndarray, count: int):
    """Flat, padded pictures (B, n), count each, of sizes (B, 2) -> (B, count, h, w, 3), or a list
    where they differ."""
    if (size == size[0]).all():
        return frames.reshape(len(frames), count, *size[0], 3)
    shapes = [(count, h, w, 3) for h, w in size]
    return [x[:np.prod(shape)].reshape(shape) for x, shape in zip(frames, shapes)]


def swap_red_and_blue(pair: np.ndarray):
    """Of (count, h, w, 3), in place. TensorFlow's reverse took a third of the loader's time for a
    tenth of the pictures."""
    import cv2
    image = pair.reshape(-1, pair.shape[2], 3)
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


# ------------------------------------------------------------ an episode's pairs
class Sampler:
    """Draws the pairs of an episode; what differs between datasets stands in tables."""

    def __init__(self, loader: Loader):
        self.chunk, self.pairs = loader.chunk, loader.cfg.pairs_per_episode
        self.consecutive, self.shown = loader.consecutive, loader.shown
        self.width, self.seed = max(1, loader.action_dim), loader.seed
        self.report = loader.faults.report
        plans = loader.plans
        self.offset = tf.constant([p.offset for p in plans])
        self.skip = tf.constant([p.entry.skip for p in plans])
        has_text = [bool(p.entry.instruction) and loader.demonstrations for p in plans]
        self.has_text = tf.constant(has_text)
        self.factors = accumulation(plans, self.width)

    def sample(self, episode: dict) -> dict:
        """An episode as Reader gives it -> n encoded pairs; n is 0 where it is not used.

        "images" (n, frames + N-1): frames t, t+k ..., then further cameras at t; "text" (n,);
        "floats" (n, C*A + A + Ds): actions, action_sum, state, in one tensor, as tf.data
        charges by the tensor; "integers" int64 (n, 4): dataset, episode, t, steps left.
        """
        dataset, images = episode["dataset"], episode["images"]
        k, skip = self.offset[dataset], self.skip[dataset]
        T = tf.shape(images)[0]
        moments = k * tf.range(self.shown)                      # 0, k, 2k ...
        usable = self.usable(episode, T - k * self.consecutive - skip)  # starts t of whole pairs
        t = skip + self.starts(dataset, episode["draw"], usable)                    # (n,)
        n, C = tf.shape(t)[0], self.chunk

        steps = tf.minimum(t[:, None] + tf.range(C)[None], T - 1)                   # (n, C)
        actions = tf.gather(episode["action"], steps)                               # (n, C, A)
        actions = tf.reshape(actions, [n, C * self.width])
        motion = self.accumulated(episode["action"], dataset, t, k)                 # (n, A)
        state = tf.gather(episode["state"], t)                                      # (n, Ds)
        same = [tf.fill([n], x) for x in (dataset, episode["episode"])]
        integers = [*same, tf.cast(t, tf.int64), tf.cast(T - t, tf.int64)]
        shown = tf.minimum(t[:, None] + moments, T - 1)                             # (n, frames)
        pictures = [tf.gather(images, shown), tf.gather(episode["views"], t)]
        return {"images": tf.concat(pictures, 1), "text": tf.fill([n], episode["text"]),
                "floats": tf.concat([actions, motion, state], 1),
                "integers": tf.stack(integers, 1)}

    def usable(self, episode: dict, count):
        """count, the number of starts; none, which is reported, where the episode is not fit."""
        dataset, values = episode["dataset"], ("action", "state")
        no_text = tf.logical_and(tf.equal(episode["text"], ""), self.has_text[dataset])
        finite = tf.math.is_finite(sum(tf.reduce_sum(episode[name]) for name in values))
        fault = tf.where(finite, 0, NOT_FINITE)
        fault = tf.where(no_text, NO_TEXT, fault)
        fault = tf.where(episode["failed"], FAILED, fault)
        fault = tf.where(count <= 0, SHORT, fault)
        fault = tf.where(tf.size(episode["images"]) == 0, UNEVEN, fault)
        fault = tf.where(episode["empty"], UNREADABLE, fault)
        return tf.cond(fault > 0, lambda: self.report(dataset, episode["episode"], fault),
                       lambda: count)

    def starts(self, dataset, draw, usable):
        """Numbers of the starts that are used, (n,): one in each nth of the episode, or all."""
        if not self.pairs:
            return tf.range(usable)
        n = tf.minimum(usable, self.pairs)
        seed = stateless_seed(self.seed, 100 + dataset, draw)
        jitter = tf.random.stateless_uniform([n], seed)
        u = tf.range(tf.cast(n, tf.float32)) + jitter
        parts = tf.cast(tf.maximum(n, 1), tf.float32)
        u *= tf.cast(usable, tf.float32) / parts
        return tf.minimum(tf.cast(u, tf.int32), usable - 1)

    def accumulated(self, action, dataset, t, k):
        """What actions (T, A) did over t..t+k, by the kind of each dimension: (n, A)"""
        before = tf.pad(tf.cumsum(action), [[1, 0], [0, 0]])  # sums of steps < i
        total = tf.zeros([tf.shape(t)[0], self.width])
        for how, factor in self.factors.items():
            if how == "sum":
                value = tf.gather(before, t + k) - tf.gather(before, t)
            elif how == "last":
                value = tf.gather(action, tf.maximum(t + k - 1, 0))
            else:
                value = tf.gather(action, t + k) - tf.gather(action, t)
            total += value * factor[dataset]
        return total


def accumulation(plans: list, width: int) -> dict:
    """{'sum' | 'last' | 'change': factor (datasets, A)}, those that any dimension needs."""
    factors = {how: np.zeros((len(plans), width), np.float32) for how in ("sum", "last", "change")}
    how_of = {"d": "sum", "v": "sum", "p": "change", "g": "last", "u": "last"}
    for i, plan in enumerate(plans):
        for j, kind in enumerate(kinds_of(plan.entry.action)):
            dt = 1 / plan.entry.hz if kind == "v" and plan.entry.hz else 1.0
            factors[how_of[kind]][i, j] = dt
    return {how: tf.constant(factor) for how, factor in factors.items() if factor.any()}


class Reader:
    """Serialized episodes of one dataset -> the form common to all."""

    def __init__(self, plan, index: int, action_dim: int, state_dim: int, seed: int,
                 demonstrations: bool, views: int):
        self.plan, self.index, self.seed = plan, index, seed
        self.cameras, self.views = plan.entry.cameras.split()[:views], views
        self.action_dim, self.state_dim = action_dim, state_dim
        entry, features = plan.entry, plan.features
        self.image = f"steps/{entry.image}"
        self.specs = {"action": entry.action, "state": entry.state}
        keys = {entry.image, *self.cameras, *texts_of(entry)}
        keys |= {key for spec in self.specs.values() for key, _ in columns_of(spec)}
        self.wire = {f"steps/{key}": wire_of(features[f"steps/{key}"]) for key in keys}
        self.success = entry.success if demonstrations else ""
        self.widths = {key: 1 if wire.dtype == tf.string else int(np.prod(features[key].shape))
                       for key, wire in self.wire.items()}

    def parse(self, draw, item) -> dict:
        """(draw, (episode number, record)) -> dataset, draw, episode, is the record empty, did it
        fail, images (T,) and views (T, N-1) encoded, text, action (T, A), state (T, Ds). T is 0
        where it cannot be read."""
        episode, record = item
        wire, failed = dict(self.wire), tf.constant(False)
        if self.success:
            wire[self.success] = wire_of(self.plan.features[self.success])
        parsed = tf.io.parse_single_example(record, wire)
        T = tf.size(parsed[self.image]) // self.widths[self.image]
        sizes = tf.stack([tf.size(parsed[key]) for key in self.wire])
        widths = tf.constant([*self.widths.values()])
        whole = tf.reduce_all(tf.equal(sizes, widths * T))
        if self.success:                                        # of the episode, or its last step
            failed = tf.logical_not(tf.reduce_any(parsed[self.success][-1:] > 0))
        content = tf.cond(whole, lambda: self.content(parsed, draw, T), self.nothing)
        return {"dataset": tf.constant(self.index, tf.int64), "draw": draw, "episode": episode,
                "empty": tf.equal(record, ""), "failed": failed, **content}

    def nothing(self) -> dict:
        """Of an episode that cannot be read, as one whose features disagree in length."""
        return {"images": tf.zeros([0], tf.string), "views": tf.zeros([0, self.views], tf.string),
                "text": tf.constant(""), "action": tf.zeros([0, self.action_dim]),
                "state": tf.zeros([0, self.state_dim])}

    def content(self, parsed: dict, draw, T) -> dict:
        views = [self.pictures(parsed, f"steps/{camera}", T) for camera in self.cameras]
        views += [tf.fill([T], "")] * (self.views - len(views))         # cameras that it lacks
        out = {"images": self.pictures(parsed, self.image, T),
               "views": tf.stack(views, 1) if views else tf.zeros([T, 0], tf.string),
               "text": self.text(parsed, draw)}
        for name, spec in self.specs.items():
            x = read_columns(parsed, spec, self.plan.features, T)
            width = self.state_dim if name == "state" else self.action_dim
            missing = width - x.shape[1]
            out[name] = tf.pad(x, [[0, 0], [0, missing]]) if missing else x
        return out

    def pictures(self, parsed: dict, key: str, T):
        """(T,) encoded; raw pixels are PNG from here on."""
        images, feature = parsed[key], self.plan.features[key]
        if isinstance(feature, tfds.features.Image):
            return images
        pixels = tf.cast(as_numbers(images, feature), tf.uint8)
        return tf.io.encode_png(tf.reshape(pixels, [T, *feature.shape]), 0)

    def text(self, parsed: dict, draw):
        """The first step's instruction; of several variants any that is there."""
        keys = [f"steps/{key}" for key in texts_of(self.plan.entry)]
        texts = [tf.strings.strip(tf.strings.reduce_join(as_text(parsed[key][:self.widths[key]])))
                 for key in keys]
        if len(texts) < 2:
            return texts[0] if texts else tf.constant("")
        texts = tf.boolean_mask(texts, tf.not_equal(texts, ""))
        seed = stateless_seed(self.seed, 20_000 + self.index, draw)
        pick = tf.random.stateless_uniform([], seed, 0, tf.maximum(tf.size(texts), 1), tf.int32)
        return tf.concat([texts, [""]], 0)[pick]


def wire_of(feature):
    """How a step's feature lies in the episode's tf.train.Example: T strings, or T * width
    numbers."""
    dtype = tf.as_dtype(feature.get_serialized_info().np_dtype)
    wire = tf.string if dtype == tf.string else tf.float32 if dtype.is_floating else tf.int64
    return tf.io.FixedLenSequenceFeature([], wire, allow_missing=True)


def as_numbers(x, feature):
    """Undoes TFDS's byte or ZLIB encoding of a tensor feature (kuka): strings (n,) -> (n, ...)."""
    if x.dtype != tf.string:
        return x
    if feature._encoding.name == "ZLIB":                        # in no public attribute of TFDS
        x = tf.io.decode_compressed(x, "ZLIB")
    numbers = tf.io.decode_raw(x, tf.as_dtype(feature.np_dtype))
    return tf.reshape(numbers, [-1, *feature.shape])


def as_text(x):
    """Instruction as bytes, or as language_table's zero-padded Unicode code points int (512,)."""
    if x.dtype == tf.string:
        return x
    x = tf.cast(x, tf.int32)
    return tf.strings.unicode_encode(tf.boolean_mask(x, x > 0), "UTF-8")


def read_columns(parsed: dict, spec: str, features: dict, T):
    """Concatenates the features that a spec names, less the dropped dimensions: (T, width)."""
    parts = []
    for key, kinds in columns_of(spec):
        x = as_numbers(parsed[f"steps/{key}"], features[f"steps/{key}"])
        x = tf.reshape(tf.cast(x, tf.float32), [T, len(kinds)])
        used = [i for i, kind in enumerate(kinds) if kind != "-"]
        parts.append(x if len(used) == len(kinds) else tf.gather(x, used, axis=1))
    if not parts:
        return tf.zeros([T, 0])
    return tf.concat(parts, 1) if len(parts) > 1 else parts[0]


@cache
def columns_of(spec: str) -> list[tuple[str, str]]:
    """'action/xyz:d*3,- grip:g' -> [('action/xyz', 'ddd-'), ('grip', 'g')]; of states, 'key:7' ->
    ('key', 'sssssss')."""
    out = []
    for part in spec.split():
        key, kinds, *_ = part.split(":")
        kinds = f"s*{kinds}" if kinds.isdigit() else kinds
        repeated = re.sub(r"(.)\*(\d+),?", lambda m: m[1] * int(m[2]), kinds)
        out.append((key, repeated.replace(",", "")))
    return out


def texts_of(entry: Entry) -> list[str]:
    """The keys of the instruction's variants."""
    return [part.split(":")[0] for part in entry.instruction.split()]


def kinds_of(spec: str) -> str:
    """The letters of all used dimensions, in order."""
    return "".join(kinds for _, kinds in columns_of(spec)).replace("-", "")


# ------------------------------------------------------------ files to episodes
FOREVER = 1 << 40


def no_autograph(function):
    """Tracing 29 datasets takes a third."""
    return tf.autograph.experimental.do_not_convert(function)


def stateless_seed(seed: int, purpose, counter):
    """Seed of a stateless random op; different purposes never share numbers, nor do seeds below
    2**32."""
    purpose = tf.cast(purpose, tf.int64) * (1 << 32)
    high = tf.constant(seed, tf.int64) + purpose
    return tf.stack([high, tf.cast(counter, tf.int64)])


@dataclass
class File:
    """A TFRecord file of a dataset. Episodes are numbered through the split."""
    path: str
    first: int                  # number of its first episode
    keep: np.ndarray            # bool, one an episode: is it of this split, subset and rank


class Records:
    """Serialized episodes of each dataset, endless, from any draw on.

    In each epoch a dataset's files come in a fresh order, `open_files` at a time and in turn: a
    group. An unreadable record comes as an empty one, so that every file gives what was planned and
    the place of a draw is arithmetic. One traced function serves all datasets (tracing 29 takes
    seconds); what differs between them stands in tables, a row a file or a row a dataset.
    """

    def __init__(self, plans: list, seed: int, open_files: int):
        self.seed, self.open_files = seed, open_files
        files = [file for plan in plans for file in plan.files]
        kept = [np.flatnonzero(file.keep) for file in files]
        self.sizes = np.array([len(rows) for rows in kept])     # episodes that a file gives

        # a row a file: only start .. start + length of it is read
        start = np.array([rows[0] for rows in kept])
        length = np.array([rows[-1] + 1 for rows in kept]) - start
        first = np.array([file.first for file in files])
        offset = np.cumsum([0] + [len(file.keep) for file in files])[:-1]
        self.path = tf.constant([file.path for file in files])
        self.start, self.length = tf.constant(start), tf.constant(length)
        self.number = tf.constant(start + first)
        self.scattered = bool((self.sizes < length).any())
        self.mask = tf.constant(np.concatenate([file.keep for file in files]))
        self.mask_at = tf.constant(offset - first)              # + episode number

        # a row a dataset
        count = np.array([len(plan.files) for plan in plans])
        base = np.cumsum(count) - count
        self.count, self.base = tf.constant(count), tf.constant(base)
        self.groups = tf.constant(-(-count // open_files))      # of an epoch
        sizes = [self.sizes[b:b + n] for b, n in zip(base, count)]
        self.epoch = [int(its.sum()) for its in sizes]          # episodes
        numbers = [tf.TensorSpec([], tf.int64)] * 4
        self.stream = tf.function(self.stream_of, input_signature=numbers, autograph=False)

    def start_at(self, dataset: int, draw: int):
        """(draw, (episode number, record)) of one dataset, from its draw-th episode on."""
        epoch, left = divmod(draw, self.epoch[dataset])
        sizes = self.sizes[self.order(dataset, tf.constant(epoch, tf.int64)).numpy()]
        group = 0
        while left >= (size := int(sizes[self.members(group)].sum())):              # whole groups
            left, group = left - size, group + 1
        return self.stream(dataset, epoch * int(self.groups[dataset]) + group, left, draw)

    def members(self, group):
        """Which of an epoch's files are of its nth group."""
        return slice(group * self.open_files, (group + 1) * self.open_files)

    def order(self, dataset, epoch):
        """The rows of a dataset's files in an epoch's order."""
        seed = stateless_seed(self.seed, 10_000 + dataset, epoch)
        rows = tf.range(self.count[dataset])
        return self.base[dataset] + tf.random.experimental.stateless_shuffle(rows, seed)

    def stream_of(self, dataset, group, skip, draw):
        groups = tf.data.Dataset.range(group, FOREVER)
        records = groups.flat_map(no_autograph(lambda number: self.group(dataset, number)))
        return records.skip(skip).enumerate(draw)

    def group(self, dataset, number):
        """One group's episodes; not parallel: that costs gigabytes in a mix."""
        groups = self.groups[dataset]
        epoch, nth = number // groups, number % groups
        rows = self.order(dataset, epoch)[self.members(nth)]
        files = tf.data.Dataset.from_tensor_slices(rows)
        return files.interleave(no_autograph(self.file), cycle_length=self.open_files)

    def file(self, row):
        """(episode number, record) of one file's kept episodes."""
        path = self.path[row]
        records = tf.data.TFRecordDataset(path, buffer_size=0).ignore_errors()
        records = records.concatenate(tf.data.Dataset.from_tensors("").repeat())
        records = records.skip(self.start[row]).take(self.length[row])
        # ignore_errors would try a file that cannot be opened for ever; this fails there
        first_byte = tf.data.FixedLengthRecordDataset(path, 1, buffer_size=1).take(1)
        records = first_byte.skip(1).concatenate(records)
        records = records.enumerate(self.number[row])
        if not self.scattered:
            return records
        return records.filter(no_autograph(
            lambda episode, record: self.mask[self.mask_at[row] + episode]))


class Faults:
    """The ledger of episodes that are not used.

    Readers report to it from tf.data's threads, through a queue of TensorFlow's: a Python callback
    would need the GIL, which whoever drops an iterator holds while it waits for those threads.
    """

    def __init__(self, plans: list, max_bad: float):
        self.plans, self.max_bad = plans, max_bad
        self.episodes = sum(plan.used for plan in plans)
        self.queue = tf.queue.FIFOQueue(-1, [tf.int64], [[3]])     # dataset, episode, fault
        self.patience = 1000 + 4 * self.episodes                # reports since the last batch
        self.bad = {}                           # (dataset, episode): what is wrong
        self.undecodable = set()                # (block, place) of pairs
        self.unfit_episodes = [{} for _ in plans]               # episode: kind
        self.corrupt = set()                    # files that hold something unreadable

    def report(self, dataset, episode, fault):
        """-> int32, the number of pairs to draw: 0, or -1, an error that ends the pipeline, where
        reports come and no batch does."""
        told = tf.stack([dataset, episode, tf.cast(fault, tf.int64)])
        put = self.queue.enqueue([told])
        with tf.control_dependencies([] if put is None else [put]):
            return -tf.cast(self.queue.size() > self.patience, tf.int32)

    def read_reports(self):
        """Notes what was reported since. Exits where too little of the data is of use."""
        n = int(self.queue.size())
        if not n:
            return
        for dataset, episode, fault in self.queue.dequeue_many(n).numpy().tolist():
            if fault in UNFIT:
                self.note_unfit(dataset, episode, fault)
            elif (dataset, episode) not in self.bad:
                self.note_bad(dataset, episode, fault)
        for plan, unfit in zip(self.plans, self.unfit_episodes):
            if len(unfit) > MOSTLY * plan.used:
                fail(f"{len(unfit)} of {plan.used} episodes of '{plan.name}' cannot be used"
                     f"{self.unfit(plan.name)}; a frame pair spans {plan.offset + 1} steps")
        if len(self.bad) > self.max_bad * self.episodes or len(self.bad) >= self.episodes:
            fail(f"{len(self.bad)} bad episodes of {self.episodes}, more than max_bad "
                 f"{self.max_bad} allows; the last: {[*self.bad.values()][-1]}")

    def note_bad(self, dataset: int, episode: int, fault: int):
        """Raises OutOfReach where the record is not bad, but its file not to be had."""
        plan, file = self.plans[dataset], self.plans[dataset].file_of(episode)
        if fault == UNREADABLE and self.out_of_reach(file, episode - file.first):
            raise OutOfReach(f"'{file.path}'")
        where = (f"{file.path}, record {episode - file.first}, "
                 f"episode {episode} of {plan.name}: {FAULTS[fault]}")
        self.bad[dataset, episode] = where
        print(f"data_oxe: skipped {'a pair of ' if fault == UNDECODABLE else ''}{where}",
              file=sys.stderr, flush=True)

    def note_unfit(self, dataset: int, episode: int, kind: int):
        """Says so at the 1st, 10th, 100th ... of a dataset."""
        unfit, name = self.unfit_episodes[dataset], self.plans[dataset].name
        if episode not in unfit:
            unfit[episode] = kind
            if re.fullmatch("10*", str(len(unfit))):
                print(f"data_oxe: {name}{self.unfit(name)}", file=sys.stderr, flush=True)

    def out_of_reach(self, file: File, record: int) -> bool:
        """Of a record that came empty: is it there after all, or its file not to be had (network,
        permission)? Then it is not corrupt."""
        if file.path in self.corrupt:
            return False
        try:
            for i, content in enumerate(tf.data.TFRecordDataset(file.path)):
                if i == record and content != b"":
                    return True
        except tf.errors.DataLossError:                         # here, or at a record before it
            pass
        except tf.errors.OpError:
            return True
        self.corrupt.add(file.path)
        return False

    def unfit(self, name: str) -> str:
        """', skipped so far: 3 shorter than a frame pair', of a dataset, or ''."""
        i = [plan.name for plan in self.plans].index(name)
        kinds = list(self.unfit_episodes[i].values())
        told = [f"{kinds.count(kind)} {UNFIT[kind]}" for kind in sorted(set(kinds))]
        return f"; skipped so far: {', '.join(told)}" if told else ""

    def decodes(self, pair: dict):
        """Is a pair none of those that are known not to decode?"""
        bad = tf.constant(sorted(self.undecodable), tf.int64)   # (n, 2)
        here = tf.stack([pair["block"], pair["place"]])
        return ~tf.reduce_any(tf.reduce_all(bad == here, 1))


class OutOfReach(Exception):
    """A file that cannot be read now: network, permission, credentials."""


def first_line(error: Exception) -> str:
    said, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {said}"


class Patience:
    """Waits longer each time it is called; exits after some minutes."""

    def __init__(self):
        self.pauses = iter((1, 5, 20, 60, 120))

    def __call__(self, reason):
        pause = next(self.pauses, None)
        if pause is None:
            fail(f"cannot read {reason}; check the network and your credentials, then --resume")
        print(f"data_oxe: cannot read {reason}; trying again in {pause} s", file=sys.stderr,
              flush=True)
        time.sleep(pause)


class Stall:
    """Called each second in which a batch is waited for, with their number: warns of a reader that
    has stood still for a minute, exits after ten."""

    warn_s, exit_s = 60, 600

    def __init__(self, loader: Loader):
        self.loader, self.draws, self.since = loader, 0, 0

    def __call__(self, waited: int):
        draws, dataset = self.loader.progress.numpy().tolist()
        if draws != self.draws or not draws or waited == 1:      # reads, or begins
            self.draws, self.since = draws, waited
        still, data = waited - self.since, self.loader.cfg.data
        told = f"reading '{self.loader.names[dataset]}' of '{data}' stands still for {still} s"
        if still == self.warn_s:
            print(f"data_oxe: {told}", file=sys.stderr, flush=True)
        if still >= self.exit_s:
            fail(f"{told}; check the disk or server that it lies on, then --resume")


@contextlib.contextmanager
def told_if_slow(path: str):
    """Says so where a file takes more than a minute, before there is a batch to wait for."""
    what = f"data_oxe: reading '{path}' takes more than {Stall.warn_s} s"
    timer = threading.Timer(Stall.warn_s, print, (what,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def values_of(path: str, parse, count: int = -1) -> list:
    """parse(record) of the first `count` records of a file (-1: all), as numpy, up to a corrupt
    one. A file that is out of reach is tried again from its start."""
    wait = Patience()
    while True:
        values = []
        try:
            parsed = tf.data.TFRecordDataset(path).take(count).map(no_autograph(parse))
            with told_if_slow(path):
                for value in parsed.as_numpy_iterator():
                    values.append(value)
            return values
        except tf.errors.DataLossError:
            return values
        except tf.errors.InvalidArgumentError as error:
            fail(f"a record of '{path}' does not fit features.json ({first_line(error)})")
        except tf.errors.OpError as error:
            wait(f"'{path}' ({first_line(error)})")


# ------------------------------------------------------------ decoding
def decode_picture(encoded, size: int, largest: int, native: bool):
    """One encoded frame -> uint8 (size, size, 3), or as decoded if `native`. JPEG is decoded at the
    smallest of 1, 1/2, 1/4, 1/8 that covers `size`, which skips work; resizing is bilinear, by area
    where a picture shrinks to half or less. largest: side of the mix's pictures, pixels."""
    ratios = [r for r in (1, 2, 4, 8) if largest >= size * r]   # those that any picture may need
    image = decode_jpeg(encoded, size, ratios) if len(ratios) > 1 else decode_any(encoded)
    if native:
        return image
    height, width = tf.unstack(tf.shape(image)[:2])
    fits = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
    image = tf.cond(fits, lambda: image, lambda: resized(image, size))
    return tf.ensure_shape(image, (size, size, 3))


def decode_any(encoded):
    """PNG, JPEG and others: the bytes tell."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def decode_jpeg(encoded, size: int, ratios: list[int]):
    """A JPEG at the ratio that covers `size`; another format whole."""
    def jpeg():
        side = tf.reduce_min(tf.io.extract_jpeg_shape(encoded)[:2])
        ratio = tf.maximum(side // size, 1)
        nth = tf.searchsorted(ratios, [ratio], side="right")[0] - 1
        return tf.switch_case(nth, [decode_at(encoded, r) for r in ratios])
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), b"\xff\xd8\xff")
    return tf.cond(is_jpeg, jpeg, lambda: decode_any(encoded))


def decode_at(encoded, ratio: int):
    return lambda: tf.io.decode_jpeg(encoded, channels=3, ratio=ratio)


def resized(image, size: int):
    images, shape = image[None], tf.shape(image)
    shrinks = tf.minimum(shape[0], shape[1]) >= 2 * size
    out = tf.cond(                                              # float32 is faster than uint8 here
        shrinks, lambda: tf.image.resize(images, (size, size), "area"),
        lambda: tf.image.resize(tf.cast(images, tf.float32), (size, size), "bilinear"))
    return tf.cast(out[0] + 0.5, tf.uint8)


# ------------------------------------------------------------ planning, in Python
@dataclass
class Plan:
    """One dataset of the mix: which files, which episodes, which features. Made before any
    TensorFlow graph."""
    name: str
    entry: Entry
    offset: int                 # k, steps
    files: list[File]           # those with at least one kept episode
    features: dict              # flat key -> TFDS feature (shape, dtype, encoding)
    counts: dict[str, int]      # true numbers of episodes: recorded, train, val, used
    pairs: float                # mean number of pairs a draw gives, from a look at some episodes
    frames: float               # estimated number of frames of the used episodes, likewise
    pair_bytes: float           # encoded size of a sample's pictures, likewise
    fingerprint: list           # of the recording: bytes, episodes of each file

    @property
    def picture(self):
        return self.features[f"steps/{self.entry.image}"]

    @cached_property
    def used(self) -> int:
        """Episodes of this rank."""
        return int(sum(file.keep.sum() for file in self.files))

    def file_of(self, episode: int) -> File:
        return [file for file in self.files if file.first <= episode][-1]


def make_plan(cfg: DataConfig, name: str, *, split: str, horizon_s: float | None, consecutive: int,
              follow: int, demonstrations: bool, fraction: float, at_most: int, cameras: int,
              rank: int, world: int) -> Plan:
    """One dataset of the mix, from its metadata: which episodes, which features, how far apart."""
    entry = find_entry(cfg.data, name)
    builder = open_builder(cfg.data, name, entry)
    features = flat_features(builder)
    views = entry.cameras.split()[:cameras - 1]
    check_features(name, entry, features, views)
    shards = complete_shards(builder, name)
    ids, counts = choose_episodes(cfg, name, builder, entry, features, split, fraction, at_most,
                                  world)
    if split == "train":
        ids = np.array_split(ids, world)[rank]                  # ranges: few files do not matter
    offset = pair_offset(name, entry, horizon_s)
    lengths, sizes, fit = glance(name, builder, shards, entry, features)
    span = consecutive * offset
    starts = np.array(lengths) - span - entry.skip
    usable = np.clip(starts, 0, cfg.pairs_per_episode or None)
    if not usable.any():
        fail(f"none of {len(lengths)} episodes of dataset '{name}', of at most {max(lengths)} "
             f"steps, is long enough for {consecutive} frame pairs of {span + 1} steps; give a "
             f"shorter horizon")
    if demonstrations and not any(fit):
        fail(f"none of {len(lengths)} episodes of dataset '{name}' has an instruction and success; "
             f"leave it out of --mix")
    pairs = (usable * fit if demonstrations else usable).mean()
    info = builder.info.splits["train"]
    return Plan(name, entry, offset, files_of(shards, ids), features, counts, max(pairs, 0.1),
                float(np.mean(lengths)) * counts["used"],
                (1 + consecutive + follow + len(views)) * float(np.mean(sizes)),
                [info.num_bytes, list(info.shard_lengths)])


def choose_episodes(cfg: DataConfig, name: str, builder, entry: Entry, features: dict, split: str,
                    fraction: float, at_most: int, world: int) -> tuple[np.ndarray, dict]:
    """-> numbers of the episodes to use, true counts of each sub-split.

    val is the end of the dataset, or what `holdout` matches; train is the rest. Subsets come after,
    out of train, so that val is the same for all of them.
    """
    n = builder.info.splits["train"].num_examples
    if cfg.holdout:
        held, readable = held_out(cfg.holdout, builder, entry, features)
    else:
        divides = n > 1 and cfg.val_fraction > 0
        n_val = max(1, round(n * cfg.val_fraction)) if divides else 0
        held = np.arange(n) >= n - n_val
        readable = np.ones(n, bool)
    train = np.flatnonzero(readable & ~held)
    val = np.flatnonzero(readable & held)
    ids = val if split == "val" else train
    if split == "train" and (per_task := at_most or cfg.episodes_per_task):
        ids = first_per_task(name, builder, entry, features, ids, per_task, strict=not at_most)
    if split == "train" and fraction < 1:
        draws = np.random.default_rng(zlib.crc32(name.encode())).random(n)[ids]
        count = max(1, round(fraction * len(ids)))
        lowest = np.argsort(draws)[:count]
        ids = np.sort(ids[lowest])
    counts = {"recorded": n, "train": len(train), "val": len(val), "used": len(ids)}
    needed = world if split == "train" else 1                   # asked of all ranks alike
    if len(ids) < needed:
        rule = f"holdout {cfg.holdout!r}" if cfg.holdout else f"val_fraction {cfg.val_fraction}"
        fail(f"dataset '{name}' has {len(ids) or 'no'} episodes left in split '{split}' for "
             f"{needed} processes: {n} recorded, {len(train)} train and {len(val)} val at {rule}, "
             f"{len(ids)} used")
    return ids, counts


def held_out(holdout: str, builder, entry: Entry, features: dict) -> tuple[np.ndarray, np.ndarray]:
    """-> which episodes match, which can be read; an unreadable one belongs to neither side."""
    key, tilde, pattern = holdout.partition("~")
    if not tilde:
        fail(f"holdout '{holdout}' must be KEY~REGEX, such as instruction~drawer or "
             f"episode_metadata/file_path~kitchen")
    if key == "instruction" and entry.instruction:
        key = f"steps/{texts_of(entry)[0]}"
    values = episode_values(builder, features, key)
    try:
        held = np.array([bool(re.search(pattern, value or "")) for value in values])
    except re.error as error:
        fail(f"holdout '{holdout}': '{pattern}' is not a regular expression ({error})")
    return held, np.array([value is not None for value in values])


def first_per_task(name: str, builder, entry: Entry, features: dict, ids: np.ndarray,
                   per_task: int, strict: bool) -> np.ndarray:
    """The first `per_task` of the episodes `ids` of each instruction. strict: exits where there are
    fewer, or no instructions."""
    if not entry.instruction:
        if not strict:
            return ids[:per_task]
        fail(f"dataset '{name}' has no instructions to count --episodes-per-task by")
    texts = episode_values(builder, features, f"steps/{texts_of(entry)[0]}")
    seen, chosen = {}, []
    for i in ids:
        if texts[i] is not None:
            seen[texts[i]] = seen.get(texts[i], 0) + 1
            if seen[texts[i]] <= per_task:
                chosen.append(i)
    short = {text: count for text, count in seen.items() if count < per_task}
    if short and strict:
        fail(f"dataset '{name}' has fewer than {per_task} training episodes of some tasks: {short}")
    return np.asarray(chosen)


def pair_offset(name: str, entry: Entry, horizon_s: float | None) -> int:
    """Steps between the two frames of a pair; 0 at horizon 0, for policies."""
    if horizon_s is None:
        return entry.offset
    if horizon_s and not entry.hz:
        fail(f"the control frequency of '{name}' is not known, so horizon {horizon_s} s has no "
             f"number of steps; leave it out ({entry.offset} steps) or put hz into its entry")
    offset = round(horizon_s * entry.hz)
    if horizon_s and offset < 1:
        fail(f"horizon {horizon_s} s is {offset} steps of '{name}' at {entry.hz} Hz; give 0 or at "
             f"least {1 / entry.hz:.3f}")
    return offset


def complete_shards(builder, name: str) -> list:
    """The files of the split 'train', whose records TFDS knows: nothing is counted by reading."""
    if "train" not in builder.info.splits:
        fail(f"dataset '{name}' has no split 'train'; it has: {', '.join(builder.info.splits)}")
    shards = builder.info.splits["train"].file_instructions
    present = set(tf.io.gfile.listdir(str(builder.data_dir)))
    missing = [s.filename for s in shards if os.path.basename(s.filename) not in present]
    if missing:
        fail(f"{len(missing)} of {len(shards)} files of dataset '{name}' are missing, the first is "
             f"'{missing[0]}'")
    return shards


def files_of(shards: list, ids: np.ndarray) -> list[File]:
    """The files that hold any of the episodes `ids`."""
    starts = np.cumsum([0] + [shard.take for shard in shards])
    keep = np.zeros(starts[-1], bool)
    keep[ids] = True
    files = [File(shard.filename, int(start), keep[start:start + shard.take])
             for shard, start in zip(shards, starts)]
    return [file for file in files if file.keep.any()]


def glance(name: str, builder, shards: list, entry: Entry, features: dict) -> tuple:
    """Of some 32 readable episodes of up to nine files that are spread over the dataset: lengths,
    mean encoded sizes of their images, and whether they have an instruction and success, where the
    dataset says so. The same on every rank, and remembered."""
    key, texts = f"steps/{entry.image}", [f"steps/{text}" for text in texts_of(entry)]
    success = [entry.success] if entry.success else []
    remembered, remember = side_file(builder, "glance", keys=[key, *texts, *success])
    if remembered is not None:
        return remembered
    wire = {k: wire_of(features[k]) for k in (key, *texts, *success)}
    pixels = int(np.prod([x or 1 for x in features[key].shape]))

    def look(record):
        parsed = tf.io.parse_single_example(record, wire)
        images, fit = parsed[key], tf.constant(True)
        encoded = images.dtype == tf.string
        if texts:
            words = [tf.strings.reduce_join(as_text(parsed[key])) for key in texts]
            words = [tf.strings.strip(each) for each in words]
            fit = tf.reduce_any(tf.not_equal(words, ""))
        if success:
            fit = tf.logical_and(fit, tf.reduce_any(parsed[entry.success][-1:] > 0))
        if encoded:
            return tf.size(images), tf.reduce_mean(tf.strings.length(images)), fit
        return tf.size(images) // pixels, pixels, fit
    chosen = shards[::math.ceil(len(shards) / 8)]
    of_each = math.ceil(32 / len(chosen))
    seen = [x for shard in chosen for x in values_of(shard.filename, look, of_each)]
    if not any(length for length, _, _ in seen):
        fail(f"dataset '{name}' has no readable episode in its {len(shards)} files, the first is "
             f"'{shards[0].filename}'")
    columns = zip((int, float, bool), zip(*seen))               # lengths, sizes, fit
    found = tuple([kind(x) for x in column] for kind, column in columns)
    remember(found)
    return found


def episode_values(builder, features: dict, key: str) -> list[str | None]:
    """A feature of every episode as text, of a step feature its first step's; None where the record
    is unreadable. Reads the dataset once, then remembers it; files with something unreadable are
    read again."""
    if key not in features:
        fail(f"dataset '{builder.name}' has no feature '{key}' in its features.json; it has: "
             f"{', '.join(features)}")
    what = f"values_{re.sub(r'[^a-z_]+', '_', key)}"
    remembered, remember = side_file(builder, what, key=key)
    feature, width = features[key], int(np.prod(features[key].shape))

    def value(record):
        x = tf.io.parse_single_example(record, {key: wire_of(feature)})[key][:width]
        is_text = x.dtype == tf.string or width > 1
        return tf.strings.reduce_join(as_text(x) if is_text else tf.strings.as_string(x))
    from tqdm import tqdm
    shards, values, read = builder.info.splits["train"].file_instructions, [], 0
    for shard in tqdm(shards, desc=f"{builder.name}: {key}", unit="file", disable=None):
        known = (remembered or [])[len(values):len(values) + shard.take]
        if not known or None in known:
            known = [x.decode("utf-8", "replace") for x in values_of(shard.filename, value)]
            known += [None] * (shard.take - len(known))         # the reader will report these
            read += 1
        values += known
    if read:
        remember(values)
    return values


def world_of(data: str, name: str) -> tuple[str, list[str]]:
    """World and tasks that a recording of rollout.py holds: its files are WORLD/TASK/SEED."""
    builder = open_builder(data, name, find_entry(data, name))
    features = flat_features(builder)
    if "episode_metadata/task" not in features:
        fail(f"dataset '{name}' was not recorded by rollout.py (it has no feature "
             f"'episode_metadata/task'), so there is no world to act in")
    paths = episode_values(builder, features, "episode_metadata/file_path")
    places = [path.rsplit("/", 2) for path in paths if path]
    return places[0][0], sorted({task for _, task, _ in places})


def side_file(builder, what: str, **depends):
    """-> (content or None, function that writes it): JSON beside the data, or in ~/.cache/nanolapa
    where that cannot be written. It counts as long as its fingerprint (the split's size and files,
    and `depends`) is that of the data."""
    split = builder.info.splits["train"]
    fingerprint = dict(bytes=split.num_bytes, shards=split.shard_lengths, **depends)
    here = f"{builder.data_dir}/nanolapa_{what}.json"
    home = Path.home() / f".cache/nanolapa/{builder.name}-{builder.version}-{what}.json"

    def write(content):
        text = json.dumps({"fingerprint": fingerprint, "content": content})
        partial = f"{here}.{os.getpid()}.partial"
        try:
            with tf.io.gfile.GFile(partial, "w") as file:
                file.write(text)
            tf.io.gfile.rename(partial, here, overwrite=True)
        except tf.errors.OpError:
            home.parent.mkdir(parents=True, exist_ok=True)
            partial = home.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(text)
            partial.rename(home)
    for path in (here, str(home)):
        if tf.io.gfile.exists(path):
            saved = json.loads(tf.io.gfile.GFile(path).read())
            if saved["fingerprint"] == fingerprint:
                return saved["content"], write
    return None, write


def open_builder(data: str, name: str, entry: Entry):
    """The dataset's folder DATA/NAME/VERSION as a TFDS builder; a local folder and gs:// alike."""
    folder = f"{data.rstrip('/')}/{name}"
    path = f"{folder}/{entry.version}"
    if not reach(tf.io.gfile.exists, f"{path}/features.json"):
        versions = reach(tf.io.gfile.glob, f"{folder}/*/features.json")
        there = [path.split("/")[-2] for path in versions]
        other = f"; there is version {', '.join(there)}" if there else ""
        fail(f"no dataset at '{path}' (features.json is missing){other}; check --data '{data}', "
             f"which should hold NAME/VERSION")
    return tfds.builder_from_directory(path)


def flat_features(builder) -> dict:
    """{'steps/observation/image': feature, ...} as TFDS writes an episode into a
    tf.train.Example."""
    out, left = {}, [("", builder.info.features)]
    while left:
        prefix, feature = left.pop(0)
        inner = feature.feature if isinstance(feature, tfds.features.Dataset) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            start = f"{prefix}/" if prefix else ""
            left = [(start + key, value) for key, value in inner.items()] + left
        else:
            out[prefix] = inner
    return out


def check_features(name: str, entry: Entry, features: dict, views=()):
    """The registry (or entry.json) against the dataset's own features.json: every key there, of
    the declared width. views: keys of further cameras that are used."""
    unknown = set(kinds_of(entry.action)) - KINDS.keys()
    if unknown:
        fail(f"dataset '{name}': its entry has action letters {sorted(unknown)}, known are "
             f"{', '.join(KINDS)}")
    if entry.success and entry.success not in features:
        fail(f"dataset '{name}' has no feature '{entry.success}' in its features.json, which "
             f"should say what episodes succeeded; it has: {', '.join(features)}")
    wanted = [(key, None) for key in (entry.image, *views, *texts_of(entry))]
    for spec in (entry.action, entry.state):
        wanted += [(key, len(kinds)) for key, kinds in columns_of(spec)]
    for key, width in wanted:
        feature = features.get(f"steps/{key}")
        if feature is None:
            have = [k.removeprefix("steps/") for k in features if k.startswith("steps/")]
            fail(f"dataset '{name}' has no step feature '{key}' in its features.json; it has: "
                 f"{', '.join(have)}")
        if width is not None and int(np.prod(feature.shape)) != width:
            fail(f"dataset '{name}': feature '{key}' is {int(np.prod(feature.shape))} wide, "
                 f"expected {width}")


def parse_mix(mix: str) -> dict[str, tuple[float, str]]:
    """'bridge:0.7,language_table:0.3' or 'oxe29' or both -> {name: (number, the published mix whose
    numbers multiply sizes, or '')}; a missing number is 1."""
    out = {}
    for part in mix.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            value = float(weight or 1.0)
        except ValueError:
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' is not a number")
        if not 0 < value < float("inf"):
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' must be above 0")
        members = parse_mix(MIXES[name]) if name in MIXES else {name: (1.0, "")}
        for member, (own, published) in members.items():
            if member in out:
                fail(f"dataset '{member}' stands twice in mix '{mix}'")
            if name in PUBLISHED:
                published = name
            out[member] = value * own, published
    return out


def shares(cfg: DataConfig, frames: dict[str, float]) -> np.ndarray:
    """What each dataset of the mix counts, (datasets,), given their estimated frames.

    A number in a mix is a share of the pairs, except in the published mixes, where it multiplies
    the dataset's size, as in Octo and OpenVLA; so that such a mix can stand beside other names, its
    members count as their numbers do on average. 'proportionate' multiplies all numbers by sizes.
    """
    members = parse_mix(cfg.mix)
    if cfg.weights == "equal":
        return np.ones(len(members))
    sized = {name: number * frames[name] for name, (number, _) in members.items()}
    if cfg.weights == "proportionate":
        return np.array([*sized.values()])
    out = []
    for name, (number, published) in members.items():
        if published:
            beside = [n for n, (_, other) in members.items() if other == published]
            mean_number = np.mean([members[n][0] for n in beside])
            number = sized[name] / np.mean([sized[n] for n in beside]) * mean_number
        out.append(number)
    return np.array(out)


def find_entry(data: str, name: str) -> Entry:
    """The registry's entry, or the one that lies beside a dataset of one's own
    (DATA/NAME/VERSION/entry.json)."""
    if name in REGISTRY:
        return REGISTRY[name]
    folder = f"{data.rstrip('/')}/{name}"
    own = sorted(reach(tf.io.gfile.glob, f"{folder}/*/entry.json"))
    if not own:
        record = ""
        if name.startswith("metaworld_"):
            record = f"; record it: python rollout.py --record --data {data}"
        fail(f"unknown dataset '{name}': not in the registry (python data_oxe.py list), nor is "
             f"there '{folder}/VERSION/entry.json'{record}")
    try:
        stored = json.loads(tf.io.gfile.GFile(own[-1]).read())
        stored["skip"] = stored.pop("first", stored.get("skip", 0))     # as it was called
        stored["action"] = stored.pop("executed", "") or stored.get("action", "")       # likewise
        return Entry(**stored)
    except (TypeError, ValueError) as error:
        fail(f"'{own[-1]}' is not an Entry: {error}")


def reach(look, path: str):
    """look(path), for tf.io.gfile's exists and glob: a bucket out of reach is an error, not an
    absence."""
    try:
        return look(path)
    except tf.errors.OpError as error:
        fail(f"cannot reach '{path}' ({type(error).__name__}); check the network, the bucket's "
             f"name in --data and your credentials (gcloud auth application-default login), or "
             f"copy the dataset to a local folder")


def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"data_oxe: {message}")


# ------------------------------------------------------------ a reader may stop here: to the device
class Sender:
    """Sends batches to a device. Copies have a stream of their own, so that they do not queue
    behind the step's kernels."""

    def __init__(self, device, image_size: int, more):
        import torch
        self.device, self.image_size, self.more = torch.device(device), image_size, more
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None

    def send(self, batch: dict) -> dict:
        if self.more:
            batch = {**batch, **self.more(batch)}
        if not self.stream:
            return to_device(batch, self.device, self.image_size)
        import torch
        with torch.cuda.stream(self.stream):
            batch = to_device(batch, self.device, self.image_size)
        self.stream.synchronize()
        return batch

    def keep(self, batch: dict):
        """Tells the allocator that the consumer's stream uses the batch."""
        if self.stream:
            import torch
            for x in batch.values():
                if torch.is_tensor(x):
                    x.record_stream(torch.cuda.current_stream(self.device))


def to_device(batch: dict, device, image_size: int) -> dict:
    """The arrays of a batch as torch tensors on `device`, through pinned memory; frames uint8
    (B, 2, S, S, 3). Frames of other sizes are resized there (bilinear, antialiased), so pictures
    cross the bus as recorded."""
    import torch
    arrays = {name: x for name, x in batch.items() if isinstance(x, np.ndarray)}
    out = batch | {name: send(x, device) for name, x in arrays.items()}
    frames = batch.get("frames")
    if isinstance(frames, list):
        common = len(frames), len(frames[0]), image_size, image_size, 3
        out["frames"] = torch.empty(common, dtype=torch.uint8, device=device)
        for shape in {x.shape for x in frames}:                 # one resize for all pairs of a size
            rows = [i for i, x in enumerate(frames) if x.shape == shape]
            same = send(np.stack([frames[i] for i in rows]), device)
            out["frames"][rows] = resize_to(same, image_size)
    elif frames is not None:
        out["frames"] = resize_to(out["frames"], image_size)
    return out


def send(x: np.ndarray, device):
    import torch
    device, x = torch.device(device), torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def resize_to(frames, size: int):
    """uint8 tensor (..., H, W, 3) -> uint8 (..., size, size, 3), bilinear, antialiased; as it is if
    it fits already."""
    import torch
    if frames.shape[-3:-1] == (size, size):
        return frames
    x = frames.reshape(-1, *frames.shape[-3:])
    x = x.permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = x.round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).reshape(*frames.shape[:-3], size, size, 3)


def ahead(batches, transform, waiting=None):
    """Runs `batches` (of (batch, position)) in one background thread, one transformed batch ahead
    of the consumer, who calls waiting(seconds so far) each second in which there is none."""
    queue, stop, waited = Queue(1), threading.Event(), 0

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(Full):
                return queue.put(item, timeout=0.1)

    def work():
        try:
            with contextlib.closing(batches):                   # ends the thread that it may have
                for batch, position in batches:
                    put((transform(batch), position))
                    if stop.is_set():
                        return
            put(StopIteration())
        except BaseException as error:                          # its message is the main thread's
            put(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = queue.get(timeout=1 if waiting else None)
            except Empty:
                waited += 1
                waiting(waited)
                continue
            waited = 0
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if not waited:                                          # else it may never end
            thread.join(timeout=30)                             # it ends with the batch it is at


# ------------------------------------------------------------ writing
SHARD = 24                      # episodes a file
FRAMING = 16                    # bytes that a TFRecord has besides its content


class DatasetWriter:
    """Writes episodes as an RLDS dataset that `tfds.builder_from_directory` reads, with entry.json
    for find_entry().

    Everything goes to DATA/NAME/.VERSION.partial and is renamed on a clean exit, so a dataset is
    whole or absent. With `settings`, all that the episodes depend on, for JSON, those written so
    far stay whatever ends it, and a writer goes on after them: `kept` is the metadata of each, a
    dict. Exits where they were written with other settings.
    """

    def __init__(self, data: str, name: str, entry: Entry, features: dict,
                 settings: dict | None = None):
        if "://" in data:
            fail(f"--data '{data}': datasets are written to a local folder; copy them to the "
                 f"bucket afterwards")
        self.name, self.entry = name, entry
        self.features = tfds.features.FeaturesDict(features)
        self.final = Path(data) / name / entry.version
        self.partial = self.final.with_name(f".{self.final.name}.partial")
        if self.final.exists():
            fail(f"'{self.final}' exists already; remove it or write to another --data folder")
        self.resumes = settings is not None
        if not self.resumes:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        if self.resumes:
            self.begin(settings)
        self.shard, self.lengths, self.kept = None, [], []      # open file, episodes of each
        self.find_episodes()
        if self.kept:
            print(f"continuing '{self.partial}': {len(self.kept)} episodes are there")

    def begin(self, settings: dict):
        path, now = self.partial / "options.json", json.loads(json.dumps(settings))
        begun = json.loads((path.exists() and path.read_text()) or "null")
        if begun is None:
            path.write_text(json.dumps(now, indent=1))
        elif begun != now:
            differ = [f"{key} {begun.get(key)!r}, not {now.get(key)!r}"
                      for key in {**begun, **now} if begun.get(key) != now.get(key)]
            fail(f"'{self.partial}' was begun with other options ({'; '.join(differ)}); use those, "
                 f"or remove it")

    def find_episodes(self):
        """Fills `lengths` and `kept`; a file is cut off where its last episode is torn."""
        wire = {f"episode_metadata/{key}": tf.io.FixedLenFeature([], wire_of(feature).dtype)
                for key, feature in self.features["episode_metadata"].items()}

        def parse(record):
            return {**tf.io.parse_single_example(record, wire), "bytes": tf.strings.length(record)}
        for path in sorted(self.partial.glob(f"{self.name}-train.tfrecord-*")):
            rows = values_of(str(path), parse)
            os.truncate(path, sum(row["bytes"] + FRAMING for row in rows))
            if not rows:
                path.unlink()
                continue
            self.lengths.append(len(rows))
            for row in rows:
                self.kept.append({key.rpartition("/")[2]: x.decode() if isinstance(x, bytes) else x
                                  for key, x in row.items()})

    def __enter__(self):
        return self

    def write(self, example: dict):
        """Adds an episode, which is on disk afterwards."""
        record = self.features.serialize_example(example)
        try:
            if not self.shard:
                path = self.partial / f"{self.name}-train.tfrecord-{len(self.lengths):05d}"
                self.shard = tf.io.TFRecordWriter(str(path))
                self.lengths.append(0)
            self.shard.write(record)
            self.shard.flush()
            self.lengths[-1] += 1
            if self.lengths[-1] == SHARD:
                self.shard = self.shard.close()
        except (OSError, tf.errors.OpError) as error:
            self.full(error)

    def full(self, error: Exception):
        fail(f"cannot write to '{self.partial}' ({first_line(error)}); make room there")

    def __exit__(self, kind, value, traceback):
        written = sum(self.lengths)
        if kind is None:
            try:
                if self.shard:
                    self.shard.close()
                self.finish()
            except (OSError, tf.errors.OpError) as error:
                self.full(error)
        elif written and self.resumes:
            print(f"data_oxe: {written} episodes stay in '{self.partial}'; the same command goes "
                  f"on after them", file=sys.stderr)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self):
        """Writes what tfds wants to know of the files, and gives the dataset its name."""
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=self.name, version=tfds.core.Version(self.entry.version),
            data_dir=str(self.partial), module_name="")
        info = tfds.core.DatasetInfo(builder=identity, description="Written by nanoLAPA.",
                                     features=self.features)
        info.set_file_format("tfrecord")
        files = tfds.core.ShardedFileTemplate(
            data_dir=self.partial, dataset_name=self.name, split="train",
            filetype_suffix="tfrecord", template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}")
        size = sum(path.stat().st_size for path in self.partial.glob("*.tfrecord-*"))
        split = tfds.core.SplitInfo("train", self.lengths, size, files)
        info.set_splits(tfds.core.splits.SplitDict([split]))
        info.write_to_directory(self.partial)
        (self.partial / "entry.json").write_text(json.dumps(asdict(self.entry), indent=1))
        self.partial.rename(self.final)


class EpisodeWriter(DatasetWriter):
    """Episodes of a simulator. entry: with keys action, executed_action and observation/state (no
    state: ''). cameras: further ones; their pictures go to observation/image_CAMERA."""

    def __init__(self, data: str, name: str, entry: Entry, image_size: int,
                 cameras: tuple[str, ...] = (), settings: dict | None = None):
        f = tfds.features
        action = f.Tensor(shape=(len(kinds_of(entry.action)),), dtype=np.float32)
        image = f.Image(shape=(image_size, image_size, 3), encoding_format="png")
        observation = {"image": image, **{f"image_{camera}": image for camera in cameras}}
        if entry.state:
            observation["state"] = f.Tensor(shape=(len(kinds_of(entry.state)),), dtype=np.float32)
        metadata = {"task": f.Text(), "seed": np.int64, "success": np.bool_, "file_path": f.Text()}
        steps = {"observation": observation, "action": action,
                 "executed_action": action, "language_instruction": f.Text(),
                 "reward": np.float32, "discount": np.float32,
                 "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_}
        features = {"episode_metadata": metadata, "steps": f.Dataset(steps)}
        keys = " ".join(f"observation/image_{camera}" for camera in cameras)
        super().__init__(data, name, replace(entry, cameras=keys), features, settings)

    def add(self, images, state, action, executed_action, reward, instruction: str, *, task: str,
            seed: int, success: bool, file_path: str, further: dict | None = None):
        """One episode: images T encoded PNGs (bytes) or uint8 (T, H, W, 3), `further` as many of
        each further camera; state (T, Ds); actions (T, A); reward (T,)."""
        pictures = {"image": images, **{f"image_{k}": x for k, x in (further or {}).items()}}
        steps, last = [], len(images) - 1
        for t in range(len(images)):
            observation = {key: x[t] for key, x in pictures.items()}
            if self.entry.state:
                observation["state"] = np.float32(state[t])
            steps.append({
                "observation": observation,
                "action": np.float32(action[t]), "executed_action": np.float32(executed_action[t]),
                "language_instruction": instruction,
                "reward": np.float32(reward[t]), "discount": np.float32(1),
                "is_first": t == 0, "is_last": t == last,
                "is_terminal": bool(success and t == last)})
        metadata = dict(task=task, seed=seed, success=success, file_path=file_path)
        self.write({"steps": steps, "episode_metadata": metadata})


# ------------------------------------------------------------ commands
def list_datasets(data: str = "data"):
    """The registry, which of it lies in the folder (or bucket) --data, and the mixes."""
    folder = data.rstrip("/")
    entries = reach(tf.io.gfile.glob, f"{folder}/*/*/entry.json")
    own = {path.split("/")[-3] for path in entries}
    for name in [*REGISTRY, *sorted(own - set(REGISTRY))]:
        entry, here = find_entry(data, name), "-"
        if reach(tf.io.gfile.exists, f"{folder}/{name}/{entry.version}/features.json"):
            info = tfds.builder_from_directory(f"{folder}/{name}/{entry.version}").info
            splits = [f"{k} {s.num_examples} episodes" for k, s in info.splits.items()]
            here = f"{', '.join(splits)}, {info.dataset_size / 1e6:.0f} MB"
        print(f"{name:59s} {entry.version}  {entry.frame:13s}{' bgr' if entry.bgr else '    '} "
              f"{entry.hz:5.4g} Hz  pair {entry.offset:2d} steps  "
              f"action {len(kinds_of(entry.action)):2d}  state {len(kinds_of(entry.state)):2d}  "
              f"{here}")
    for name in MIXES:
        how = ", numbers multiply sizes" if name in PUBLISHED else ""
        print(f"mix {name}: {len(parse_mix(name))} datasets{how}")


def inspect(data: str = "data", mix: str = "metaworld_corner4", weights: str = "given",
            split: str = "train", holdout: str = "", horizon_s: float | None = None,
            image_size: int = 128, batches: int = 8, seed: int = 0, out: str = "runs/inspect"):
    """Prints counts, shapes and ranges of a mix; saves a histogram of every action dimension and a
    contact sheet."""
    import matplotlib
    matplotlib.use("Agg")
    cfg = DataConfig(data=data, mix=mix, weights=weights, holdout=holdout, shuffle_mb=64)
    loader = Loader(cfg, split, 32, image_size, chunk=8, horizon_s=horizon_s, demonstrations=False,
                    seed=seed)
    rows = list(loader.peek(batches))
    print(loader.summary())                                     # with what these batches skipped
    for key in rows[0]:
        if key == "instruction":
            texts = sorted({text for batch in rows for text in batch[key]})
            print(f"{key:12s} {len(texts)} different in {32 * len(rows)} samples: {texts[:8]}")
            continue
        x = np.concatenate([batch[key] for batch in rows])
        span = "none"
        if x.size:
            span = f"min {x.min():.3g} mean {x.mean():.3g} max {x.max():.3g}"
        print(f"{key:12s} {str(x.dtype):8s} {str(x.shape):22s} {span}")
    Path(out).mkdir(parents=True, exist_ok=True)
    if loader.action_dim:
        plot_actions(loader, rows).savefig(f"{out}/actions.png", dpi=90)
        print(f"histogram of first actions and of action_sum: {out}/actions.png")
    plot_contact_sheet(loader, rows[0]).savefig(f"{out}/contact_sheet.png", dpi=80)
    print(f"contact sheet (frame t | frame t+k): {out}/contact_sheet.png")


def plot_actions(loader: Loader, rows: list):
    """Histograms of the first action and of action_sum, a column a dimension."""
    import matplotlib.pyplot as plt
    index = np.concatenate([batch["dataset"] for batch in rows])
    values = {"action": np.concatenate([batch["actions"][:, 0] for batch in rows]),
              "action_sum": np.concatenate([batch["action_sum"] for batch in rows])}
    A = loader.action_dim
    fig, axes = plt.subplots(2, A, figsize=(2.2 * A, 4.4), squeeze=False)
    for line, (label, x) in zip(axes, values.items()):
        for i, ax in enumerate(line):
            for d, plan in enumerate(loader.plans):
                kinds = kinds_of(plan.entry.action)
                if i < len(kinds) and (index == d).any():
                    ax.hist(x[index == d, i], 40, histtype="step", density=True,
                            label=f"{plan.name[:18]} {kinds[i]}")
            ax.set_title(f"{label}[{i}]", fontsize=8)
            ax.set_yticks([])
            ax.tick_params(labelsize=6)
    if len(loader.plans) <= 6:
        axes[0, 0].legend(fontsize=5)
    fig.tight_layout()
    return fig


def plot_contact_sheet(loader: Loader, batch: dict):
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(4, 6, figsize=(15, 8))
    for i, ax in enumerate(axes.flat):
        frames = batch["frames"][i]
        ax.imshow(np.concatenate(frames, axis=1))
        ax.set_axis_off()
        change = np.abs(np.diff(frames.astype(float), axis=0)).mean()
        moved = " ".join(f"{v:.2g}" for v in batch["action_sum"][i, :3])
        moved = moved if batch["has_action"][i] else "no action"
        name = loader.names[batch["dataset"][i]][:30]
        ax.set_title(f"{name} ep {batch['episode'][i]} t {batch['step'][i]}\n"
                     f"{batch['instruction'][i][:40]}\n"
                     f"mean |difference| {change:.1f}, sum {moved}", fontsize=7)
    fig.tight_layout()
    return fig


def statistics(data: str, name: str) -> dict:
    """{'actions' | 'state': {'count', 'q01', 'q99', 'mean', 'std': list of one number a dimension}}
    of split 'train', the percentiles of at most two million random steps; read once, then cached
    beside the data (side_file)."""
    entry = find_entry(data, name)
    builder = open_builder(data, name, entry)
    features = flat_features(builder)
    check_features(name, entry, features)
    specs = {"actions": entry.action, "state": entry.state}
    remembered, remember = side_file(builder, "statistics", **specs)
    if remembered is not None:
        return remembered
    rows = {what: [] for what, spec in specs.items() if spec}
    wire = {f"steps/{key}": wire_of(features[f"steps/{key}"])
            for spec in specs.values() for key, _ in columns_of(spec)}

    def parse(record):
        parsed = tf.io.parse_single_example(record, wire)
        return {what: read_columns(parsed, specs[what], features, -1) for what in rows}
    from tqdm import tqdm
    shards, lost = builder.info.splits["train"].file_instructions, 0
    for shard in tqdm(shards if rows else (), desc=name, unit="file", disable=None):
        episodes = values_of(shard.filename, parse)
        if len(episodes) < shard.take:
            print(f"data_oxe: {shard.take - len(episodes)} unreadable episodes in {shard.filename}",
                  file=sys.stderr)
        for what in rows:
            width = len(kinds_of(specs[what]))
            nothing = np.zeros((0, width))
            x = np.concatenate([nothing, *(episode[what] for episode in episodes)])
            good = x[np.isfinite(x).all(1)].astype(np.float64)
            lost += len(x) - len(good)
            rng = np.random.default_rng(len(rows[what]))
            at_most = max(1000, 2_000_000 // len(shards))
            some = rng.permutation(len(good))[:at_most]
            squares = (good ** 2).sum(0)
            rows[what].append((len(good), good.sum(0), squares, good[some].astype(np.float32)))
    if lost:
        print(f"data_oxe: {name}: left out {lost} rows that are not finite", file=sys.stderr)
    out = {what: merged(parts) for what, parts in rows.items()}
    remember(out)
    return out


def merged(parts: list) -> dict:
    """Statistics of all files from those of each: (count, sum, sum of squares, sample)."""
    count, total, squares = (sum(part[i] for part in parts) for i in range(3))
    sample = np.concatenate([part[3] for part in parts])
    q01, q99 = np.percentile(sample, [1, 99], axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean ** 2, 0))
    return dict(count=count, q01=q01.tolist(), q99=q99.tolist(), mean=mean.tolist(),
                std=deviation.tolist())


def stats(data: str = "data", mix: str = "metaworld_corner4"):
    """Prints 1st and 99th percentile, mean and standard deviation of every action and state
    dimension."""
    for name in parse_mix(mix):
        for what, s in statistics(data, name).items():
            print(f"{name} {what}, {s['count']} steps")
            for i, row in enumerate(zip(s["q01"], s["q99"], s["mean"], s["std"])):
                print(f"  [{i:2d}] q01 {row[0]:10.4g}  q99 {row[1]:10.4g}  mean {row[2]:10.4g}  "
                      f"std {row[3]:10.4g}")


def from_videos(videos: str, name: str, data: str = "data", captions: str = "", fps: float = 10.0,
                size: int = 256, max_frames: int = 600):
    """Makes an RLDS dataset of a folder of MP4 or WebM files: frames at --fps, the centre square
    resized to --size.

    --captions: CSV without header, lines FILE,CAPTION (FILE relative to --videos, its ending may be
    left out); without it there are no instructions. Videos longer than --max-frames become several
    episodes. Files go in in a random order, so that the val split is a fair sample. An interrupted
    run goes on where it was.
    """
    import av
    from tqdm import tqdm
    endings = (".mp4", ".webm", ".mkv", ".mov", ".avi")
    everything = sorted(Path(videos).rglob("*"))
    paths = [path for path in everything if path.suffix.lower() in endings]
    files = {str(path.relative_to(videos)): path for path in paths}
    if not files:
        fail(f"no video files ({', '.join(endings)}) in --videos '{videos}'")
    check_new_name(name)
    if not 0 < fps <= 240 or size < 16 or max_frames < 2:
        fail(f"--fps {fps} must be in (0, 240], --size {size} at least 16, "
             f"--max-frames {max_frames} at least 2")
    texts, broken = read_captions(captions, files), []
    entry = Entry("1.0.0", f"{size}x{size} jpeg", hz=fps, offset=max(1, round(fps / 2)),
                  instruction="language_instruction" if captions else "")
    told = zlib.crc32(repr(sorted(texts.items())).encode())
    options = dict(fps=fps, size=size, max_frames=max_frames, captions=told)
    with DatasetWriter(data, name, entry, features_of_videos(size), options) as writer:
        clips = {(clip["file_path"], clip["start"]) for clip in writer.kept}
        whole = {clip["file_path"] for clip in writer.kept if clip["is_last_clip"]}
        order = np.random.default_rng(0).permutation(list(files)).tolist()
        left = [key for key in order if key not in whole]
        for key in tqdm(left, desc=name, unit="video", disable=None):
            try:
                for start, frames, is_last in video_clips(files[key], fps, size, max_frames):
                    if len(frames) <= entry.offset:
                        raise ValueError(f"it has {len(frames)} frames at {fps:g} fps, a frame "
                                         f"pair spans {entry.offset + 1}")
                    if (key, start) not in clips:
                        writer.write(clip_episode(frames, texts.get(key, ""), key, start, is_last))
                        clips.add((key, start))
            except (av.FFmpegError, ValueError) as error:
                broken.append(key)
                print(f"data_oxe: left out '{files[key]}', or the rest of it: {error}",
                      file=sys.stderr)
        if not clips:
            fail(f"none of the {len(files)} videos in '{videos}' could be read")
    print(f"{writer.final}: {len(clips)} episodes of {len(files)} videos, {len(broken)} of them "
          f"broken; use it as --data {data} --mix {name}")


def check_new_name(name: str):
    if name in REGISTRY or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        fail(f"--name '{name}' must be a new one, of lower-case letters, digits and '_'")


def features_of_videos(size: int) -> dict:
    f = tfds.features
    image = f.Image(shape=(size, size, 3), encoding_format="jpeg")
    steps = {"observation": {"image": image}, "language_instruction": f.Text(),
             "is_first": np.bool_, "is_last": np.bool_}
    metadata = {"file_path": f.Text(), "start": np.int64, "is_last_clip": np.bool_}
    return {"steps": f.Dataset(steps), "episode_metadata": metadata}


def clip_episode(frames: list[bytes], text: str, path: str, start: int, is_last: bool) -> dict:
    steps = [{"observation": {"image": io.BytesIO(frame)}, "language_instruction": text,
              "is_first": t == 0, "is_last": t == len(frames) - 1}
             for t, frame in enumerate(frames)]
    metadata = {"file_path": path, "start": start, "is_last_clip": is_last}
    return {"steps": steps, "episode_metadata": metadata}


def read_captions(captions: str, files: dict) -> dict[str, str]:
    """{file: caption}; {} without a CSV."""
    import csv
    if not captions:
        return {}
    if not Path(captions).is_file():
        fail(f"no captions at '{captions}'")
    with open(captions, newline="", encoding="utf-8") as file:
        told = {row[0]: row[1].strip() for row in csv.reader(file) if len(row) > 1}
    texts = {}
    for key in files:
        bare = str(Path(key).with_suffix(""))
        texts[key] = told.get(key) or told.get(bare, "")
    missing = [key for key in files if not texts[key]]
    if missing:
        fail(f"{len(missing)} of {len(files)} videos have no caption in '{captions}', the first is "
             f"'{missing[0]}'")
    return texts


def video_clips(path: Path, fps: float, size: int, max_frames: int):
    """A video as clips of at most max_frames JPEG frames: (first frame's number, [bytes], whether
    the last clip). Raises av.FFmpegError, ValueError."""
    frames, number = [], 0
    for encoded in frames_at(path, fps, size):
        frames.append(encoded)
        number += 1
        if len(frames) >= 2 * max_frames:                       # the rest is halved: no tiny clip
            yield number - len(frames), frames[:max_frames], False
            frames = frames[max_frames:]
    half = -(-len(frames) // 2) if len(frames) > max_frames else 0
    if half:
        yield number - len(frames), frames[:half], False
    yield number - len(frames) + half, frames[half:], True


def frames_at(path: Path, fps: float, size: int):
    """The frames on screen at n/fps seconds, as JPEG bytes of their centre square."""
    import av
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        number, shown, start = 0, None, None
        for frame in itertools.chain(container.decode(stream), [None]):     # None: the end, when
            if frame is not None and frame.time is None:        # the last frame is still shown
                raise ValueError("its frames have no times")
            if shown is not None:
                until = frame.time - start if frame is not None else shown.time - start + 1e-6
                encoded = jpeg_square(shown, size) if number / fps < until - 1e-9 else None
                while number / fps < until - 1e-9:
                    yield encoded
                    number += 1
            elif frame is not None:
                start = frame.time
            shown = frame


def jpeg_square(frame, size: int) -> bytes:
    x = frame.to_ndarray(format="bgr24")
    h, w = x.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return jpeg(x[top:top + side, left:left + side], size)


def jpeg(picture: np.ndarray, size: int) -> bytes:
    """uint8 (H, W, 3), blue first -> JPEG of size x size."""
    import cv2
    shrinks = min(picture.shape[:2]) > size
    x = cv2.resize(picture, (size, size),
                   interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


# ------------------------------------------------------------ LeRobot's datasets
def from_lerobot(source: str, name: str, data: str = "data", cameras: tuple[str, ...] = (),
                 size: int = 256, fps: float = 0.0, kinds: str = ""):
    """Makes an RLDS dataset of a LeRobotDataset of version 2 or 3: a folder, or hub:NAME of the
    Hugging Face hub.

    --cameras: which, by their names after 'observation.images.'; the first becomes
    observation/image, another NAME observation/image_NAME; without it all. Pictures are resized to
    --size x --size, as the loader does with any. --fps: fewer steps a second than recorded; of the
    actions that fall into one step, deltas are added, velocities averaged, and of others the last
    stays. --kinds: a letter an action dimension, p*6,g (see KINDS); without it all are absolute
    positions. A picture that is not there at its row's time makes its episode faulty; such are
    named and left out. Episodes go in in a random order, so that the val split is a fair sample. An
    interrupted run goes on where it was.
    """
    import av
    from tqdm import tqdm
    recorded = LeRobotFolder(fetch(source))
    stride, widths = recorded.stride(fps), recorded.widths()
    keys = recorded.choose(cameras)
    kinds = kinds_of(f"action:{kinds or 'p' * widths['action']}")
    if len(kinds) != widths["action"] or set(kinds) - KINDS.keys():
        fail(f"--kinds '{kinds}' must be {widths['action']} letters of {', '.join(KINDS)}, one a "
             f"dimension of the action")
    check_new_name(name)
    if size < 16:
        fail(f"--size {size} must be at least 16")
    hz = recorded.fps / stride
    entry = Entry("1.0.0", f"{size}x{size} jpeg", action=f"action:{kinds}", hz=hz,
                  state=f"observation/state:{widths['state']}" if widths["state"] else "",
                  instruction="language_instruction" if any(recorded.tasks.values()) else "",
                  offset=max(1, round(hz / 2)),
                  success="episode_metadata/success" if recorded.tells_success else "",
                  cameras=" ".join(f"observation/{image}" for image in list(keys)[1:]))
    features = features_of_lerobot(list(keys), widths, size, recorded.tells_success)
    options = dict(source=source, cameras=list(keys.values()), size=size, stride=stride,
                   kinds=kinds)
    broken = 0
    with DatasetWriter(data, name, entry, features, options) as writer:
        done = {episode["episode_index"] for episode in writer.kept}
        order = np.random.default_rng(0).permutation(sorted(recorded.episodes)).tolist()
        left = [number for number in order if number not in done]
        for number in tqdm(left, desc=name, unit="episode", disable=None):
            try:
                episode = lerobot_episode(recorded, number, keys, size, stride, kinds)
            except (av.FFmpegError, OSError, KeyError, ValueError) as error:
                broken += 1
                print(f"data_oxe: left out episode {number} of '{source}': "
                      f"{type(error).__name__}: {error}", file=sys.stderr)
                continue
            writer.write(episode)
        if broken == len(order):
            fail(f"none of the {broken} episodes of '{source}' could be read")
    print(f"{writer.final}: {len(order) - broken} episodes at {hz:g} steps a second, {broken} left "
          f"out as faulty; cameras {', '.join(keys)}; action {kinds}; use it as --data {data} "
          f"--mix {name}")


class LeRobotFolder:
    """A LeRobotDataset on disk: version 2 has files of one episode each, version 3 of many.

    fps; tasks {number: sentence}; episodes {number: where it is}; tells_success.
    """

    def __init__(self, folder: Path):
        self.folder, info = folder, folder / "meta/info.json"
        if not info.is_file():
            fail(f"no LeRobotDataset at '{folder}': it has no meta/info.json")
        try:
            self.info = json.loads(info.read_text())
            self.version, self.fps = self.info["codebase_version"], float(self.info["fps"])
            self.features = self.info["features"]
        except (KeyError, ValueError) as error:
            fail(f"'{info}' is damaged ({type(error).__name__}: {error})")
        self.is_new = self.version.startswith("v3.")
        if not self.is_new and not self.version.startswith("v2."):
            fail(f"'{folder}' is a LeRobotDataset of version {self.version}; known are v2 and v3")
        self.tells_success = "next.success" in self.features
        rows = self.rows("meta/tasks")
        text = next(name for name in rows[0] if name != "task_index") if rows else ""
        self.tasks = {row["task_index"]: row[text] for row in rows}
        self.episodes = {row["episode_index"]: row for row in self.rows("meta/episodes")}
        if not self.episodes:
            fail(f"'{folder}' has no episodes")

    def rows(self, name: str) -> list[dict]:
        """Of a table of meta/: lines of JSON in version 2, Parquet in version 3. Without
        statistics, which nothing reads here."""
        import pyarrow.parquet as parquet
        try:
            if not self.is_new:
                lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
                return [json.loads(line) for line in lines]
            path = self.folder / name
            path = path if path.is_dir() else path.with_suffix(".parquet")
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            fail(f"'{self.folder}': {name} is missing or damaged ({error})")
        kept = [column for column in table.column_names if not column.startswith("stats/")]
        return table.select(kept).to_pylist()

    def widths(self) -> dict[str, int]:
        """Of action and state; 0: there is none."""
        shapes = {what: self.features.get(key, {}).get("shape", [0])
                  for what, key in (("action", "action"), ("state", "observation.state"))}
        for what, shape in shapes.items():
            if len(shape) != 1:
                fail(f"'{self.folder}': its {what} has shape {shape}, expected one dimension")
        if not shapes["action"][0]:
            fail(f"'{self.folder}' has no feature 'action'; it has: {', '.join(self.features)}")
        return {what: shape[0] for what, shape in shapes.items()}

    def stride(self, fps: float) -> int:
        """Recorded steps in one of 1/fps seconds."""
        stride = round(self.fps / fps) if fps else 1
        if stride < 1 or abs(stride * (fps or self.fps) - self.fps) > 1e-3:
            fail(f"--fps {fps:g} must divide the {self.fps:g} that were recorded")
        return stride

    def choose(self, cameras: tuple) -> dict[str, str]:
        """{'image': key of the first camera, 'image_NAME': key of another}"""
        known = {key.removeprefix("observation.").removeprefix("images."): key
                 for key, feature in self.features.items()
                 if feature["dtype"] in ("video", "image")
                 and not (feature.get("info") or {}).get("is_depth_map")}
        if not known:
            fail(f"'{self.folder}' has no camera; its features are {', '.join(self.features)}")
        for name in cameras:
            if name not in known:
                fail(f"'{self.folder}' has no camera '{name}'; it has: {', '.join(known)}")
        chosen = [(re.sub(r"[^a-zA-Z0-9]", "_", name), known[name]) for name in cameras or known]
        names = [name for name, _ in chosen]
        if len(set(names)) < len(names):
            fail(f"cameras of '{self.folder}' would have the same name, in {', '.join(names)}; "
                 f"choose with --cameras")
        return {f"image_{name}" if number else "image": key
                for number, (name, key) in enumerate(chosen)}

    def table(self, episode: int, keys: list[str]) -> dict[str, list]:
        """Columns of an episode, in order of time."""
        import pyarrow.parquet as parquet
        where, only = self.episodes[episode], None
        if self.is_new:
            only = [("episode_index", "=", episode)]
            path = "data/chunk-{:03d}/file-{:03d}.parquet".format(
                where["data/chunk_index"], where["data/file_index"])
        else:
            path = f"data/{self.chunk(episode)}/episode_{episode:06d}.parquet"
        names = [*keys, "timestamp", "frame_index", "task_index"]
        table = parquet.read_table(self.folder / path, columns=names, filters=only)
        if missing := set(names) - set(table.column_names):
            raise ValueError(f"'{path}' has no column {sorted(missing)[0]}")
        if len(table) != where["length"]:
            raise ValueError(f"'{path}' has {len(table)} rows of it, meta/episodes says "
                             f"{where['length']}")
        return table.sort_by("frame_index").to_pydict()

    def chunk(self, episode: int) -> str:
        return f"chunk-{episode // self.info.get('chunks_size', 1000):03d}"

    def video(self, episode: int, key: str) -> tuple[Path, float]:
        """Path, and the second at which the episode begins in it."""
        if not self.is_new:
            path = f"videos/{self.chunk(episode)}/{key}/episode_{episode:06d}.mp4"
            return self.folder / path, 0.0
        at = {name: self.episodes[episode][f"videos/{key}/{name}"]
              for name in ("chunk_index", "file_index", "from_timestamp")}
        path = f"videos/{key}/chunk-{at['chunk_index']:03d}/file-{at['file_index']:03d}.mp4"
        return self.folder / path, at["from_timestamp"]


def fetch(source: str) -> Path:
    """--source, a folder, or hub:NAME, which is downloaded."""
    if not source.startswith("hub:"):
        return Path(source)
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(source[4:], repo_type="dataset"))
    except Exception as error:                                  # the client fails in many ways
        fail(f"--source '{source}' cannot be downloaded ({first_line(error)}); check the name, "
             f"the network and `hf auth login`, or give a folder")


def features_of_lerobot(images: list[str], widths: dict, size: int, tells_success: bool) -> dict:
    f = tfds.features
    observation = {image: f.Image(shape=(size, size, 3), encoding_format="jpeg")
                   for image in images}
    if widths["state"]:
        observation["state"] = f.Tensor(shape=(widths["state"],), dtype=np.float32)
    steps = {"observation": observation, "language_instruction": f.Text(),
             "action": f.Tensor(shape=(widths["action"],), dtype=np.float32),
             "is_first": np.bool_, "is_last": np.bool_}
    metadata = {"episode_index": np.int64, "file_path": f.Text()}
    if tells_success:
        metadata["success"] = np.bool_
    return {"steps": f.Dataset(steps), "episode_metadata": metadata}


def lerobot_episode(recorded: LeRobotFolder, number: int, keys: dict, size: int, stride: int,
                    kinds: str) -> dict:
    """Raises av.FFmpegError, OSError, KeyError, ValueError where it is faulty."""
    columns = ["action", *(key for key in ("observation.state", "next.success")
                           if key in recorded.features)]
    stored = [key for key in keys.values() if recorded.features[key]["dtype"] == "image"]
    table = recorded.table(number, columns + stored)
    action = merged_actions(np.float32(table["action"]).reshape(-1, len(kinds)), stride, kinds)
    seconds, images = np.float64(table["timestamp"]).reshape(-1)[::stride], {}
    for image, key in keys.items():
        if key in stored:
            cells = table[key][::stride]
            images[image] = [picture_of((cell or {}).get("bytes"), size) for cell in cells]
            continue
        path, start = recorded.video(number, key)
        images[image] = list(pictures_at(path, start + seconds, size, 0.25 / recorded.fps))
    steps, last = [], len(action) - 1
    for t in range(len(action)):
        observation = {image: io.BytesIO(pictures[t]) for image, pictures in images.items()}
        if "observation.state" in table:
            state = np.float32(table["observation.state"][t * stride]).reshape(-1)
            observation["state"] = state
        steps.append({"observation": observation, "action": action[t],
                      "language_instruction": recorded.tasks[table["task_index"][t * stride]],
                      "is_first": t == 0, "is_last": t == last})
    metadata = {"episode_index": number, "file_path": f"{recorded.folder.name}/{number}"}
    if recorded.tells_success:
        metadata["success"] = bool(np.any(table["next.success"]))
    return {"steps": steps, "episode_metadata": metadata}


def merged_actions(action: np.ndarray, stride: int, kinds: str) -> np.ndarray:
    """(T, A) -> (T / stride, A): each step's action stands for those that it replaces."""
    letters, merged = np.array(list(kinds)), []
    for at in range(0, len(action), stride):
        group = action[at:at + stride]
        merged.append(np.select([letters == "d", letters == "v"],
                                [group.sum(0), group.mean(0)], group[-1]))
    return np.stack(merged)


def pictures_at(path: Path, seconds: np.ndarray, size: int, tolerance: float):
    """The pictures of a video at these ascending seconds, as JPEG bytes."""
    import av
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"'{path}' has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(int(seconds[0] / stream.time_base), stream=stream)   # a key frame before it
        frames, time = container.decode(stream), -1.0
        for row, wanted in enumerate(seconds):
            while time < wanted - tolerance:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"'{path}' ends at {max(time, 0):.3f} s, but row {row} wants "
                                     f"the picture at {wanted:.3f} s")
                time = frame.time
            if time > wanted + tolerance:
                raise ValueError(f"'{path}' has no picture at {wanted:.3f} s, which row {row} "
                                 f"wants; the next is at {time:.3f} s")
            yield jpeg(frame.to_ndarray(format="bgr24"), size)


def picture_of(encoded: bytes | None, size: int) -> bytes:
    """A picture that stands in the table."""
    import cv2
    picture = None
    if encoded:
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("a picture of its table is missing or broken")
    return jpeg(picture, size)


# ------------------------------------------------------------ registry and mixes (data)
NATURAL = "observation/natural_language_instruction"
WORLD = "action/world_vector:ddd action/rotation_delta:ddd"
GRIPPER = " action/gripper_closedness_action:g"
REGISTRY: dict[str, Entry] = {
    "fractal20220817_data": Entry(
        frame="256x320 jpeg", instruction=NATURAL, action=WORLD + GRIPPER,
        state="observation/base_pose_tool_reached:7 observation/gripper_closed:1", hz=3, offset=3),
    "kuka": Entry(
        frame="512x640 jpeg", instruction=NATURAL, action=WORLD + GRIPPER,
        state=("observation/clip_function_input/base_pose_tool_reached:7:zlib "
               "observation/gripper_closed:1:zlib"),
        hz=10, success="success"),
    "bridge": Entry(
        frame="480x640 ?", instruction=NATURAL, action=WORLD + " action/open_gripper:g:bool()",
        state="observation/state:7", hz=5, skip=1),
    "bridge_orig": Entry(
        frame="256x256 jpeg", version="1.0.0", image="observation/image_0",
        action="action:ddddddg", state="observation/state:7", hz=5, skip=1),
    "taco_play": Entry(
        frame="150x200 ?", image="observation/rgb_static", instruction=NATURAL,
        action="action/rel_actions_world:ddddddg", state="observation/robot_obs:15", hz=15,
        cameras="observation/rgb_gripper"),
    "jaco_play": Entry(
        frame="224x224 ?", instruction=NATURAL,
        action="action/world_vector:ddd action/gripper_closedness_action:g",
        state="observation/end_effector_cartesian_pos:7", hz=10, cameras="observation/image_wrist"),
    "berkeley_cable_routing": Entry(
        frame="128x128 ?", instruction=NATURAL,
        action="action/world_vector:vvv action/rotation_delta:vvv",
        state="observation/robot_state:7", hz=10, cameras="observation/wrist45_image"),
    "roboturk": Entry(
        frame="480x640 ?", image="observation/front_rgb", instruction=NATURAL,
        action=WORLD + GRIPPER, hz=10),
    "nyu_door_opening_surprising_effectiveness": Entry(
        frame="720x960 ?", instruction=NATURAL,
        action=("action/world_vector:vvv action/rotation_delta:vvv "
                "action/gripper_closedness_action:g"),
        hz=3),
    "viola": Entry(
        frame="224x224 ?", image="observation/agentview_rgb", instruction=NATURAL,
        action=WORLD + GRIPPER + ":float32()",
        state="observation/joint_states:7 observation/gripper_states:1", hz=20,
        cameras="observation/eye_in_hand_rgb"),
    "berkeley_autolab_ur5": Entry(
        frame="480x640 ?", instruction=NATURAL, action=WORLD + GRIPPER + ":float32()",
        state="observation/robot_state:15", hz=5, cameras="observation/hand_image"),
    "toto": Entry(
        frame="480x640 ?", instruction=NATURAL,
        action="action/world_vector:uuu action/rotation_delta:uuu action/open_gripper:g:bool()",
        state="observation/state:7", hz=30),
    "language_table": Entry(
        frame="360x640 jpeg", image="observation/rgb",
        instruction="observation/instruction:int32[512]", action="action:dd",
        state="observation/effector_translation:2", hz=10, offset=10),
    "stanford_hydra_dataset_converted_externally_to_rlds": Entry(
        frame="240x320 png", action="action:ddddddg", state="observation/state:27", hz=10,
        bgr=True, cameras="observation/wrist_image"),
    "austin_buds_dataset_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:ddddddg", state="observation/state:24", hz=20,
        cameras="observation/wrist_image"),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:-*7,d*6,g,-", state="observation/state:13", hz=3),
    "furniture_bench_dataset_converted_externally_to_rlds": Entry(
        frame="224x224 jpeg", action="action:d*3,g*5", state="observation/state:35", hz=10,
        cameras="observation/wrist_image"),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Entry(
        frame="480x640 png", action="action:u*6,g,-", state="observation/state:21", hz=2),
    "austin_sailor_dataset_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:ddddddg", state="observation/state:8", hz=20,
        cameras="observation/wrist_image"),
    "austin_sirius_dataset_converted_externally_to_rlds": Entry(
        frame="84x84 png", action="action:ddddddg", state="observation/state:8", hz=20,
        cameras="observation/wrist_image"),
    "bc_z": Entry(
        frame="171x213 jpeg", instruction=NATURAL,
        action=("action/future/xyz_residual:d*3,-*27 "
                "action/future/axis_angle_residual:d*3,-*27 "
                "action/future/target_close:g,-*9:int64"),
        state=("observation/present/xyz:3 observation/present/axis_angle:3 "
               "observation/present/sensed_close:1"),
        hz=10),
    "dlr_edan_shared_control_converted_externally_to_rlds": Entry(
        frame="360x640 png", action="action:d*6,g", state="observation/state:7", hz=5),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Entry(
        frame="360x640 png", action="action:u*3,g*5", state="observation/state:20", hz=20,
        cameras="observation/wrist_image"),
    "utaustin_mutex": Entry(
        frame="128x128 png", action="action:ddddddg", state="observation/state:24", hz=20,
        bgr=True, cameras="observation/wrist_image"),
    "berkeley_fanuc_manipulation": Entry(
        frame="224x224 png", action="action:dddddd",
        state="observation/end_effector_state:7 observation/state:13", hz=10, bgr=True,
        cameras="observation/wrist_image"),
    "cmu_stretch": Entry(
        frame="128x128 png", action="action:u*6,g,-", state="observation/state:4", hz=10),
    "cmu_play_fusion": Entry(
        frame="128x128 png", action="action:d*3,g*5,-", state="observation/state:8", hz=5),
    "droid": Entry(
        frame="180x320 jpeg", version="1.0.1", image="observation/exterior_image_1_left",
        instruction="language_instruction language_instruction_2 language_instruction_3",
        action=("action_dict/cartesian_velocity:vvvvvv:float64 "
                "action_dict/gripper_position:g:float64"),
        state="observation/cartesian_position:6:float64 observation/gripper_position:1:float64",
        hz=15, cameras="observation/wrist_image_left"),
    "fmb": Entry(
        frame="256x256 jpeg", version="0.0.1", image="observation/image_side_1",
        action="action:d*6,g",
        state="observation/eef_pose:7 observation/state_gripper_pose:1:float32()", hz=10,
        cameras="observation/image_wrist_1"),
    "dobbe": Entry(
        frame="256x256 jpeg", version="0.0.1", image="observation/wrist_image",
        action="action:u*6,g", state="observation/state:7", hz=3.75),
    "robo_set": Entry(
        frame="240x424 jpeg", version="0.0.1", image="observation/image_left",
        action="action:u*7,g", state="observation/state:8", hz=5,
        cameras="observation/image_wrist"),
    "columbia_cairlab_pusht_real": Entry(
        frame="240x320 ?", instruction=NATURAL, action=WORLD + GRIPPER + ":float32()",
        state="observation/robot_state:2", hz=10, cameras="observation/wrist_image"),
    "asu_table_top_converted_externally_to_rlds": Entry(
        frame="224x224 png", action="action:p*6,g",
        state="ground_truth_states/EE:6 observation/state:7", hz=12.5),
    "berkeley_gnm_cory_hall": Entry(
        frame="64x85 png", action="action:dd:float64", state="observation/state:3:float64", hz=5),
    "berkeley_gnm_recon": Entry(
        frame="120x160 png", action="action:dd:float64", state="observation/state:3:float64", hz=3),
    "berkeley_gnm_sac_son": Entry(
        frame="120x160 png", action="action:dd:float64", state="observation/state:3:float64",
        hz=10),
    "berkeley_mvp_converted_externally_to_rlds": Entry(
        frame="480x640 png", image="observation/hand_image", action="action:d*7,g",
        state="observation/pose:7 observation/gripper:1:bool()", hz=5),
    "berkeley_rpt_converted_externally_to_rlds": Entry(
        frame="480x640 png", image="observation/hand_image", action="action:d*7,g",
        state="observation/joint_pos:7 observation/gripper:1:bool()", hz=30),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": Entry(
        frame="480x640 png", image="observation/highres_image", action="action:u*6,g,-", hz=10),
    "cmu_playing_with_food": Entry(
        frame="480x640 png", version="1.0.0", action="action:p*3,g*5", state="observation/state:6",
        hz=15),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": Entry(
        frame="480x640 png", action="action:d*6,u", state="observation/state:12", hz=10),
    "dlr_sara_pour_converted_externally_to_rlds": Entry(
        frame="480x640 png", action="action:u*6,g", state="observation/state:6", hz=10),
    "imperialcollege_sawyer_wrist_cam": Entry(
        frame="64x64 png", action="action:d*6,g,-", state="observation/state:1", hz=10,
        cameras="observation/wrist_image"),
    "kaist_nonprehensile_converted_externally_to_rlds": Entry(
        frame="480x640 png", action="action:d*6,-*14", state="observation/state:21", hz=10),
    "maniskill_dataset_converted_externally_to_rlds": Entry(
        frame="256x256 png", action="action:ddddddg",
        state="observation/tcp_pose:7 observation/state:18", hz=20,
        cameras="observation/wrist_image"),
    "nyu_rot_dataset_converted_externally_to_rlds": Entry(
        frame="84x84 png", action="action:d*3,u*3,g", state="observation/state:7", hz=3),
    "robo_net": Entry(
        frame="240x320 jpeg", version="1.0.0", action="action:d*4,g", state="observation/state:5",
        hz=1, offset=10),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:u*4",
        state="observation/ee_position:3 observation/ee_orientation:4 observation/state:8", hz=20),
    "stanford_mask_vit_converted_externally_to_rlds": Entry(
        frame="480x480 png", action="action:d*4,g", state="observation/end_effector_pose:5"),
    "stanford_robocook_converted_externally_to_rlds": Entry(
        frame="256x256 jpeg", image="observation/image_1", action="action:v*7",
        state="observation/state:7", hz=5),
    "tokyo_u_lsmo_converted_externally_to_rlds": Entry(
        frame="120x120 png", action="action:u*6,g", state="observation/state:13", hz=10),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": Entry(
        frame="224x224 png", action="action:v*3,g", state="observation/state:7", hz=3),
    "uiuc_d3field": Entry(
        frame="360x640 png", image="observation/image_1", action="action:ddd",
        state="observation/state:16", hz=1),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:u*6,g,-", state="observation/state:7", hz=10),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": Entry(
        frame="128x128 png", action="action:u*6,g,-", state="observation/state:7", hz=10),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": Entry(
        frame="256x256 png", action="action:u*6,g,u*6,g",
        state="observation/pose_l:6 observation/pose_r:6", hz=10),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": Entry(
        frame="224x224 png", action="action:p*6,g", state="observation/end_effector_pose:6", hz=10,
        cameras="observation/hand_image"),
    "spoc": Entry(
        frame="224x384 jpeg", version="0.0.1", action="action:u*9",
        state="observation/last_agent_location:6 observation/relative_arm_location_metadata:4",
        hz=10),
    "tidybot": Entry(
        frame="360x640 jpeg", version="0.0.1"),
    "vima_converted_externally_to_rlds": Entry(
        frame="128x256 raw", version="0.0.1", instruction="multimodal_instruction",
        action=("action/pose0_position:ppp action/pose0_rotation:gggg "
                "action/pose1_position:ppp action/pose1_rotation:gggg"),
        offset=1),
}
RLDS = "_converted_externally_to_rlds"
# Source: Octo and OpenVLA for the published ones, whose numbers multiply a dataset's size; oxe29:
# 29 datasets alike.
PUBLISHED = {"rtx", "oxe_magic_soup", "oxe_magic_soup_plus", "octo_magic_soup"}
MIXES = {
    "rtx": (
        "fractal20220817_data:0.5409,kuka:0.8341,bridge_orig,taco_play:2,jaco_play:2,"
        "berkeley_cable_routing:3,roboturk,viola:2,berkeley_autolab_ur5,toto"),
    "oxe_magic_soup": (
        "fractal20220817_data:0.5409,kuka:0.8341,bridge_orig,taco_play:2,jaco_play,"
        "berkeley_cable_routing,roboturk:2,viola:2,berkeley_autolab_ur5:2,toto,"
        f"language_table:0.1,stanford_hydra_dataset{RLDS}:2,austin_buds_dataset{RLDS},"
        f"nyu_franka_play_dataset{RLDS}:3,furniture_bench_dataset{RLDS}:0.1,"
        f"ucsd_kitchen_dataset{RLDS}:2,austin_sailor_dataset{RLDS},"
        f"austin_sirius_dataset{RLDS},dlr_edan_shared_control{RLDS},"
        f"iamlab_cmu_pickup_insert{RLDS},utaustin_mutex,berkeley_fanuc_manipulation:2,"
        "cmu_stretch"),
    "oxe_magic_soup_plus": (
        "oxe_magic_soup,bc_z:0.2,fmb,dobbe:0.2,droid:0.06"),
    "octo_magic_soup": (
        "oxe_magic_soup,nyu_door_opening_surprising_effectiveness,bc_z:0.2"),
    "oxe29": (
        "language_table,bridge,fractal20220817_data,robo_net,droid,berkeley_autolab_ur5,"
        "jaco_play,kuka,taco_play,roboturk,bc_z,berkeley_cable_routing,"
        "columbia_cairlab_pusht_real,berkeley_fanuc_manipulation,uiuc_d3field,"
        f"ucsd_kitchen_dataset{RLDS},ucsd_pick_and_place_dataset{RLDS},"
        f"furniture_bench_dataset{RLDS},maniskill_dataset{RLDS},robo_set,"
        f"stanford_hydra_dataset{RLDS},stanford_robocook{RLDS},spoc,tidybot,toto,viola,"
        f"vima{RLDS},utaustin_mutex,fmb"),
}


if __name__ == "__main__":
    import tyro
    tyro.extras.subcommand_cli_from_dict({"list": list_datasets, "inspect": inspect, "stats": stats,
                                          "from-videos": from_videos, "from-lerobot": from_lerobot},
                                         description=__doc__)
