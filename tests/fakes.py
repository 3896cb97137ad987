"""Small datasets in the schemas of the registry, for tests and the bench: random numbers, and
pictures of a moving texture."""
import io
import re

import cv2
import numpy as np
from common import ROOT  # noqa: F401  (finds the scripts)

import data_oxe
from data_oxe import DatasetWriter, Entry, columns_of, tf, tfds


def fake_frames(n: int = 64, size: int = 256, encoding: str = "jpeg") -> list[bytes]:
    """Encoded pictures of a moving smooth texture with a little noise; as JPEG some 25 KB, like a
    robot's camera."""
    rng = np.random.default_rng(0)
    wide = cv2.resize(rng.integers(0, 255, (24, 24, 3), np.uint8), (2 * size, 2 * size),
                      interpolation=cv2.INTER_CUBIC)
    out = []
    for t in range(n):
        left = 2 * t % size
        x = wide[t:t + size, left:left + size] + rng.normal(0, 3, (size, size, 3))
        x = np.clip(x, 0, 255).astype(np.uint8)
        encode = (lambda x: tf.io.encode_jpeg(x, quality=95)) if encoding == "jpeg" else \
            tf.io.encode_png
        out.append(encode(x).numpy())
    return out


def write_fake(data: str, name: str, entry: Entry, episodes: int, length: int, frames: list[bytes],
               seed: int = 0, success=lambda episode: True):
    """A small dataset in another one's schema: keys, widths, types and encodings as the registry
    declares them. frames: encoded, all of one size; raw pixels if the entry says raw."""
    step, fill = {}, []                                     # features; (key, function of t)
    rng = np.random.default_rng(seed)

    def add(key, feature, make):
        outer, _, inner = key.partition("/")                # a deeper '/' belongs to the name
        if inner:
            step.setdefault(outer, {})[inner] = feature
        else:
            step[outer] = feature
        fill.append((outer, inner, make))
    for i, camera in enumerate([entry.image, *entry.cameras.split()]):
        add_picture(add, camera, entry, frames[i:] + frames[:i])
    add_texts(add, entry, name)
    for spec in dict.fromkeys((entry.action, entry.state)):
        for part, (key, kinds) in zip(spec.split(), columns_of(spec)):
            storage = (part.split(":") + ["float32"])[2]
            add_numbers(add, rng, key, kinds, storage)
    for flag, at in (("is_first", 0), ("is_last", length - 1), ("is_terminal", length - 1)):
        add(flag, np.bool_, lambda t, at=at: t == at)
    features = {"steps": tfds.features.Dataset(step),
                "episode_metadata": {"file_path": tfds.features.Text()}}
    if entry.success:
        features[entry.success] = np.bool_
    with DatasetWriter(data, name, entry, features) as writer:
        for e in range(episodes):
            example = {"steps": [fake_step(fill, t) for t in range(length)],
                       "episode_metadata": {"file_path": f"scene_{e % 3}/episode_{e}"}}
            if entry.success:
                example[entry.success] = bool(success(e))
            writer.write(example)


def fake_step(fill: list, t: int) -> dict:
    step = {}
    for outer, inner, make in fill:
        if inner:
            step.setdefault(outer, {})[inner] = make(t)
        else:
            step[outer] = make(t)
    return step


def add_picture(add, key: str, entry: Entry, frames: list[bytes]):
    kind = entry.frame.split()[1]
    shape = tf.io.decode_image(frames[0], channels=3).shape
    if kind == "raw":
        pixels = [tf.io.decode_image(frame, channels=3).numpy() for frame in frames]
        add(key, tfds.features.Tensor(shape=shape, dtype=np.uint8),
            lambda t: pixels[t % len(frames)])
    else:
        encoding = None if kind == "?" else kind
        add(key, tfds.features.Image(shape=shape, encoding_format=encoding),
            lambda t: io.BytesIO(frames[t % len(frames)]))


def add_texts(add, entry: Entry, name: str):
    words = f"instruction of {name}"
    for part in entry.instruction.split():
        key, _, storage = part.partition(":")
        if storage:                                         # language_table: padded code points
            width = int(re.search(r"\[(\d+)]", storage)[1])
            points = np.zeros(width, np.int32)
            points[:len(words)] = [ord(c) for c in words]
            add(key, tfds.features.Tensor(shape=(width,), dtype=np.int32),
                lambda t, points=points: points)
        else:
            add(key, tfds.features.Text(), lambda t: words)


def add_numbers(add, rng, key: str, kinds: str, storage: str):
    shape = () if storage.endswith("()") else (len(kinds),)
    storage = storage.rstrip("()")
    dtype = {"zlib": np.float32, "bool": np.bool_}.get(storage) or np.dtype(storage).type
    feature = tfds.features.Tensor(shape=shape, dtype=dtype,
                                   encoding="zlib" if storage == "zlib" else "none")
    if dtype in (np.bool_, np.int64):
        add(key, feature, lambda t: rng.integers(0, 2, shape).astype(dtype))
    else:
        add(key, feature, lambda t: rng.standard_normal(shape).astype(dtype))


def write_mix(data: str, mix: str, episodes: int = 48, length: int = 40):
    """All datasets of a mix that are not there yet, with 256x256 JPEG pictures."""
    from dataclasses import replace
    from pathlib import Path
    frames = fake_frames()
    for name in data_oxe.parse_mix(mix):
        if not (Path(data) / name).exists():
            entry = replace(data_oxe.find_entry(data, name), frame="256x256 jpeg")
            write_fake(data, name, entry, episodes, length, frames)
            print(f"wrote {data}/{name}", flush=True)
