"""Stage 4: run a policy, or a scripted expert, in a simulator: success rates, videos, episodes.

    python rollout.py --record --episodes 30 --data data                # experts -> RLDS
    python rollout.py --policy runs/finetune/policy --episodes 50       # success, a GIF a task
    torchrun --nproc_per_node=2 rollout.py --policy POLICY              # episodes divided
    python rollout.py --compare latent=runs/a none=runs/b               # a table of evaluations

In: a policy/ folder as finetune.py exports it (policy.pt2, tokenizer, manifest.json `policy.v1`).
Out: OUT/results.json and OUT/TASK.gif; OUT/episodes_RANK.jsonl holds the episodes as they end (OUT
is a folder that all processes of torchrun see). With --record DATA/WORLD_CAMERA/VERSION, which
data_oxe.py reads; with --record --distract 0.5 DATA/WORLD_CAMERA_distract50/VERSION.

Simulation runs in spawned worker processes that never import TensorFlow: its libraries and Mesa's
renderer crash in one process.

Worlds: Meta-World (arXiv 1910.10897). Letters: T time, C chunk, A action width, Ds state width.
"""
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")   # before the workers load torch: one core each
SEEDS = 10_000                              # environment seeds in a block
EVALUATION = 1_000_000_000                  # first seed of evaluations; recordings stay below
TRIES = 20                                  # seeds an expert may fail at for one episode


@dataclass
class Config:
    world: str = "metaworld"                # simulator, a name of WORLDS
    tasks: tuple[str, ...] = (              # of the world
        "button-press-topdown", "drawer-open", "window-open", "door-open", "faucet-open",
        "faucet-close")
    episodes: int = 20                      # episodes a task; when recording, successful ones
    camera: str = ""                        # view; '': corner4, or the one a policy learned from
    max_steps: int = 200                    # steps after which an episode has failed
    stock: bool = False                     # render as Meta-World ships it, ten times slower
    distract: float = 0.0                   # 0..1: camera shakes, background moves, light drifts
    seed: int = 0                           # block of 10,000 environment seeds
    workers: int = 0                        # simulation processes; 0: one a core, if memory allows

    # evaluation
    policy: str = "runs/finetune/policy"    # folder that finetune.py exported
    out: str = "runs/rollout"               # where results and videos go
    replan: int = 0                         # actions executed of each predicted chunk; 0: all
    compare: tuple[str, ...] = ()           # finished evaluations NAME=FOLDER, instead of running

    # recording
    record: bool = False                    # record the scripted experts instead of evaluating
    data: str = "data"                      # where the dataset goes
    image_size: int = 64                    # pixels a side of recorded pictures
    noise: float = 0.2                      # deviation of a slow random push on actions in -1..1


# ------------------------------------------------------------ worlds
class MetaWorld:
    """One Meta-World task, in a worker process.

    reset(seed) is reproducible to the pixel; step(action (A,)) -> reward, success; state float32
    (Ds,); image(size) -> uint8 (size, size, 3); background(size) -> bool (size, size), where there
    is neither robot nor object; expert() -> what the scripted policy commands, (A,)

    Pictures differ from stock Meta-World: no shadows, reflections or multisampling, rendered at
    twice the size and averaged. Ten times faster on a CPU, but scores on pixels are not comparable
    with published ones.
    """

    cameras = "corner4", "corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV"
    action_dim, state_dim = 4, 4            # xyz and gripper: commanded; measured
    pushed = np.array([1, 1, 1, 0])         # action dimensions that the random push moves
    longest = 500                           # steps that the simulator allows
    scenery = "world", "tablelink", "RetainingWall"         # bodies: floor, table, walls
    entry = dict(                           # as data_oxe.Entry: how recorded episodes are read
        version="1.0.0", action="action:dddg", executed="executed_action:dddg",
        state="observation/state:4", hz=80, offset=8)

    @staticmethod
    def sentences() -> dict[str, str]:
        return METAWORLD_SENTENCES

    def __init__(self, task: str, camera: str, stock: bool):
        import mujoco
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
        self.camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera == "corner4":
            env.model.cam_pos[self.camera] = [0.75, 0.075, 0.7]
        bodies = [env.model.body(i).name for i in env.model.body_rootid[env.model.geom_bodyid]]
        self.scenery_geoms = np.flatnonzero(np.isin(bodies, self.scenery))
        self.renderers = {}

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

    def image(self, size: int) -> np.ndarray:
        x = self.render(size).reshape(size, self.scale, size, self.scale, 3).mean((1, 3))
        return np.ascontiguousarray(x.round().astype(np.uint8))

    def background(self, size: int) -> np.ndarray:
        from mujoco import mjtObj
        ids, kinds = np.moveaxis(self.render(size, segmented=True), -1, 0)
        scenery = (kinds == int(mjtObj.mjOBJ_GEOM)) & np.isin(ids, self.scenery_geoms)
        scenery |= kinds == -1                              # nothing is there
        return scenery.reshape(size, self.scale, size, self.scale).all((1, 3))

    def render(self, size: int, segmented: bool = False) -> np.ndarray:
        """A picture at `scale` times the size; `segmented`: id and kind of what is seen, (.., 2)"""
        import mujoco
        scale = self.scale
        if size not in self.renderers:
            buffer = self.env.model.vis.global_
            buffer.offwidth = max(buffer.offwidth, scale * size)
            buffer.offheight = max(buffer.offheight, scale * size)
            self.renderers[size] = mujoco.Renderer(self.env.model, scale * size, scale * size)
        renderer = self.renderers[size]
        if segmented:
            renderer.enable_segmentation_rendering()
        renderer.update_scene(self.env.data, camera=self.camera)
        x = renderer.render()[::-1, ::-1]                   # its cameras stand on their heads
        renderer.disable_segmentation_rendering()
        return x


WORLDS = {"metaworld": MetaWorld}


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
        shake = np.c_[np.eye(2), walks[:2] / 16 * len(x)]
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
            inside = np.exp(-((away / self.radius[i]) ** 2).sum(0) ** 2)
            texture = 0.7 + 0.3 * np.sin(np.tensordot(self.stripes[i], away, 1))
            opacity = 0.8 * self.level * inside * background
            x += opacity[..., None] * (texture[..., None] * self.color[i] - x)
        return x


@cache
def world_at(name: str, task: str, camera: str, stock: bool):
    """A worker's simulator of a task; built once, as that takes a second."""
    return WORLDS[name](task, camera, stock)


def view(world, size: int, distraction: Distraction, step: int) -> np.ndarray:
    """What the camera shows at a step, uint8 (size, size, 3)."""
    image = world.image(size)
    return distraction(image, world.background(size), step) if distraction.level else image


# ------------------------------------------------------------ evaluation
def policy_episode(task: str, seed: int, cfg: Config, spec: dict, tokens, film: bool) -> dict:
    """One closed-loop episode; with `film` also its frames at 160 px, 20 a second.

    spec: of load_manifest. tokens: ids and mask of the task's sentence, lists of L.
    """
    import torch
    policy, world = policy_at(cfg.policy), world_at(cfg.world, task, spec["camera"], cfg.stock)
    rng = np.random.default_rng(seed)
    distraction = Distraction((seed, *task.encode()), cfg.distract)
    ids, mask = (torch.tensor([x]) for x in tokens)                     # (1, L) each
    frames, queue, success, steps = [], [], False, 0
    world.reset(seed)
    while steps < cfg.max_steps and not success:
        if not queue:
            image = view(world, spec["source_size"], distraction, steps)
            image = torch.from_numpy(as_loaded(image, spec))
            state = torch.from_numpy(world.state)
            noise = rng.standard_normal((1, spec["chunk"], spec["action_dim"]), np.float32)
            with torch.inference_mode():
                chunk = policy(image[None], state[None], ids, mask, torch.from_numpy(noise))
            queue = list(chunk[0].numpy()[:cfg.replan or None])         # of C actions
        if film and steps % 4 == 0:
            frames.append(view(world, 160, distraction, steps))
        _, success = world.step(queue.pop(0))
        steps += 1
    if film:
        frames += [view(world, 160, distraction, steps)] * 10
    return dict(task=task, seed=seed, success=success, steps=steps, frames=frames)


def as_loaded(image: np.ndarray, spec: dict) -> np.ndarray:
    """A rendered picture at the policy's size, resized as the loader resized the recorded ones."""
    size = spec["image_size"]
    if image.shape[0] == size:
        return image
    if spec["config"]["resize"] == "gpu":
        import torch
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    shrinks = image.shape[0] >= 2 * size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how)


def evaluate(cfg: Config):
    """Closed loop on seeds that recording never uses; prints and writes success per task with 95%
    intervals. Under torchrun, processes take every nth episode and meet when all are done."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    spec, out = load_manifest(cfg), Path(cfg.out)
    tokens = tokenize(cfg, spec)
    first = EVALUATION + cfg.seed * SEEDS
    jobs = [(policy_episode, task, seed, cfg, spec, tokens[task], seed == first)
            for seed in range(first, first + cfg.episodes) for task in cfg.tasks]
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"episodes_{rank}.jsonl").open("w") as log:
        for result in run_jobs(jobs[rank::processes], workers_here(cfg), "rollout"):
            if frames := result.pop("frames"):
                write_video(out / f"{result['task']}.gif", frames, result)
            log.write(json.dumps(result) + "\n")
            log.flush()
    if processes > 1:
        dist.barrier()
    if rank == 0:
        logs = [out / f"episodes_{i}.jsonl" for i in range(processes)]
        results = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        summarize(results, cfg, spec)


def summarize(results: list[dict], cfg: Config, spec: dict):
    """Prints success per task with its 95% interval and writes OUT/results.json."""
    table = {}
    for task in [*cfg.tasks, "all"]:
        mine = [r for r in results if task in (r["task"], "all")]
        successes, n = sum(r["success"] for r in mine), len(mine)
        low, high = wilson(successes, n)
        rate = successes / n
        table[task] = dict(successes=successes, episodes=n, rate=rate, low=low, high=high)
        print(f"{task:24s} {successes:4d}/{n:<4d} {rate:.2f}  [{low:.2f}, {high:.2f}]")
    seeds = [r["seed"] for r in results]
    results = sorted(results, key=lambda r: (r["task"], r["seed"]))
    write_json(Path(cfg.out) / "results.json", {
        "tasks": table, "policy": cfg.policy, "policy_manifest": spec, "config": asdict(cfg),
        "seeds": [min(seeds), max(seeds)], "episodes": results})
    print(f"results and videos: {cfg.out}")


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927)."""
    p, d = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / d
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


# ------------------------------------------------------------ recording
def expert_success(task: str, seeds: list[int], cfg: Config) -> dict | None:
    """The first successful scripted episode of several seeds, with how many were "tried"."""
    for tried, seed in enumerate(seeds, 1):
        episode = expert_episode(task, seed, cfg)
        if episode["success"]:
            return {**episode, "tried": tried}
    return None


def expert_episode(task: str, seed: int, cfg: Config) -> dict:
    """One scripted episode under a slow random push. `action`, the label, is what the expert
    commanded; `executed_action` what was done. Pictures are PNG."""
    world, rng = world_at(cfg.world, task, cfg.camera, cfg.stock), np.random.default_rng(seed)
    push, steps, finished = np.zeros(world.action_dim), [], None
    distraction = Distraction((seed, *task.encode()), cfg.distract)
    world.reset(seed)
    while len(steps) < cfg.max_steps:
        draw = rng.standard_normal(world.action_dim) * world.pushed
        push = 0.9 * push + cfg.noise * math.sqrt(1 - 0.9 ** 2) * draw
        command = world.expert()
        executed = np.clip(command + push, -1, 1)
        image, state = view(world, cfg.image_size, distraction, len(steps)), world.state
        reward, success = world.step(executed)
        png = iio.imwrite("<bytes>", image, extension=".png", compress_level=3)
        steps.append((png, state, command, executed, reward))
        if finished is None and success:
            finished = len(steps)
        if finished is not None and len(steps) >= finished + 5:         # a few frames of the end
            break
    names = "images", "state", "action", "executed_action", "reward"
    return {**dict(zip(names, zip(*steps))), "seed": seed, "success": finished is not None}


def record(cfg: Config):
    """Scripted experts -> RLDS, tasks alternating, so that any stretch of the dataset holds all of
    them. An episode that fails is replaced by another seed's, or else left out and named."""
    from data_oxe import Entry, EpisodeWriter               # imports TensorFlow: not in the workers
    world, name = WORLDS[cfg.world], f"{cfg.world}_{cfg.camera}"
    if cfg.distract:
        name += f"_distract{round(100 * cfg.distract)}"     # percent: names hold no dot
    entry = Entry(frame=f"{cfg.image_size}x{cfg.image_size} png", **world.entry)
    block = range(cfg.seed * SEEDS, (cfg.seed + 1) * SEEDS)
    jobs = [(expert_success, task, list(block[i::cfg.episodes][:TRIES]), cfg)
            for i in range(cfg.episodes) for task in cfg.tasks]
    written, tried, steps, began = dict.fromkeys(cfg.tasks, 0), 0, 0, time.time()
    with EpisodeWriter(cfg.data, name, entry, cfg.image_size) as writer:
        for (_, task, seeds, _), episode in zip(jobs, run_jobs(jobs, workers_here(cfg), "record")):
            if episode is None:
                failed = (f"the expert failed at '{task}' with all of the {len(seeds)} seeds "
                          f"{seeds[0]} to {seeds[-1]} at noise {cfg.noise}")
                if not written[task]:
                    fail(f"{failed}; lower --noise or leave the task out")
                print(f"rollout: {failed}; left out", file=sys.stderr)
                continue
            written[task] += 1
            tried, steps = tried + episode.pop("tried"), steps + len(episode["images"])
            writer.add(**episode, instruction=world.sentences()[task], task=task,
                       file_path=f"{cfg.world}/{task}/{episode['seed']}")
    print(f"recorded {sum(written.values())} of {len(jobs)} episodes ({tried} tried), "
          f"{steps} steps in {time.time() - began:.0f} s: {cfg.data}/{name}")


# ------------------------------------------------------------ main
def main(cfg: Config):
    check(cfg)
    if cfg.compare:
        compare(cfg)
    elif cfg.record:
        record(cfg)
    else:
        evaluate(cfg)


# ------------------------------------------------------------ a reader may stop here
def check(cfg: Config):
    """Exits where settings do not go together; fills in the world's first camera for recording."""
    if cfg.world not in WORLDS:
        fail(f"unknown --world '{cfg.world}'; known: {', '.join(WORLDS)}")
    world = WORLDS[cfg.world]
    sentences = world.sentences()
    unknown = [task for task in cfg.tasks or [""] if task not in sentences]
    if unknown:
        fail(f"unknown task '{unknown[0]}'; known: {', '.join(sentences)}")
    if cfg.record and not cfg.camera:
        cfg.camera = world.cameras[0]
    if cfg.camera and cfg.camera not in world.cameras:
        fail(f"unknown camera '{cfg.camera}'; known: {', '.join(world.cameras)}")
    if not 0 <= cfg.seed < EVALUATION // SEEDS:
        fail(f"--seed {cfg.seed} must be in 0..{EVALUATION // SEEDS - 1}, so that recording and "
             f"evaluation share no environment seed")
    if not 1 <= cfg.episodes <= SEEDS // 5:
        fail(f"--episodes {cfg.episodes} must be in 1..{SEEDS // 5} (a block has {SEEDS} seeds; "
             f"recording may need spare ones)")
    if not 1 <= cfg.max_steps <= world.longest:
        fail(f"--max-steps {cfg.max_steps} must be in 1..{world.longest}, the simulator's limit")
    if not 0 <= cfg.distract <= 1 or cfg.distract != round(cfg.distract, 2):
        fail(f"--distract {cfg.distract} must be in 0..1, with two decimals at most")
    if min(cfg.replan, cfg.workers) < 0:
        fail(f"--replan {cfg.replan} and --workers {cfg.workers} must not be negative")
    if cfg.record and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--record starts its own processes (--workers); run it with python, not torchrun")


# ------------------------------------------------------------ worker processes
def run_jobs(jobs: list[tuple], workers: int, label: str):
    """Yields the results of jobs (function, *arguments) in their order. Where a worker dies, what
    was not yielded runs again in new ones; exits where none was yielded in between."""
    done, broken_at = 0, 0
    silent = int(os.environ.get("RANK", 0)) > 0
    with tqdm(total=len(jobs), desc=label, unit="episode", mininterval=2, disable=silent) as bar:
        while done < len(jobs):
            pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
            try:
                for future in [pool.submit(*job) for job in jobs[done:]]:
                    result = future.result()
                    done += 1
                    bar.update()
                    yield result
            except BrokenProcessPool:
                died = f"a simulation process died after {done} of {len(jobs)} episodes, see above"
                if broken_at == done:
                    fail(f"{died}; if nothing is, memory may have run out: fewer --workers than "
                         f"{workers}")
                bar.write(f"rollout: {died}; going on in new ones", file=sys.stderr)
                broken_at = done
            finally:
                pool.shutdown(cancel_futures=True)


def start_worker():
    """Runs once in each worker. A renderer that cannot start ends it, which run_jobs reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's
    try:
        import mujoco
        mujoco.GLContext(64, 64).free()
    except Exception as error:                              # bindings fail in many ways
        print(f"no renderer at MUJOCO_GL={os.environ['MUJOCO_GL']} ({type(error).__name__}: "
              f"{error}); rendering needs EGL or OSMesa: apt-get install libegl1 libegl-mesa0 "
              f"libgl1-mesa-dri", file=sys.stderr, flush=True)
        os._exit(1)


def workers_here(cfg: Config) -> int:
    """--workers, or one a core of this process's share, as long as memory holds them: each has its
    own copy of the policy, and one more while it is loaded."""
    if cfg.workers:
        return cfg.workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")               # a job's, where there is one
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    policy = 0 if cfg.record else (Path(cfg.policy) / "policy.pt2").stat().st_size
    fit = int(0.8 * memory / (1e9 + 2 * policy))
    return max(1, min(len(os.sched_getaffinity(0)), fit) // processes)


@cache
def policy_at(folder: str):
    """A worker's copy of policy.pt2."""
    import torch
    torch.set_num_threads(1)
    return open_program(f"{folder}/policy.pt2")[0].module()


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


def load_manifest(cfg: Config) -> dict:
    """policy/manifest.json, with "camera" and "source_size", the side of the pictures that the
    policy learned from. Exits with the two values where schema or widths do not fit the world."""
    folder, world = Path(cfg.policy), WORLDS[cfg.world]
    path = folder / "manifest.json"
    if not path.exists():
        fail(f"no policy at '{folder}' (manifest.json is missing); finetune.py writes one to "
             f"OUT/policy")
    check_sums(folder)
    try:
        spec = json.loads(path.read_text())
    except ValueError as error:
        fail(f"'{path}' is damaged ({error})")
    wanted = {"schema": "policy.v1", "action_dim": world.action_dim, "state_dim": world.state_dim}
    for key, here in wanted.items():
        if spec.get(key) != here:
            fail(f"policy '{folder}': {key} is {spec.get(key)!r}, {cfg.world} needs {here!r}")
    sizes = {name.removeprefix(f"{cfg.world}_").partition("_distract")[0]: size
             for name, size in spec["datasets"].items() if name.startswith(f"{cfg.world}_")}
    if not spec["units_of"].startswith(f"{cfg.world}_"):
        fail(f"policy '{folder}' acts in the units of '{spec['units_of']}', the first dataset of "
             f"its mix, not of a {cfg.world}_CAMERA dataset: train it with such a one first")
    first_camera = next(iter(sizes))
    camera = cfg.camera or first_camera
    if camera not in sizes:
        warn(f"policy '{folder}' has not seen camera {camera}, only {', '.join(sizes)}")
    open_program(folder / "policy.pt2")                     # faults are told here, not in workers
    return {**spec, "camera": camera, "source_size": sizes.get(camera, sizes[first_camera])}


def tokenize(cfg: Config, spec: dict) -> dict[str, tuple]:
    """{task: (ids, mask) of its sentence}"""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(cfg.policy, trust_remote_code=False)
    sentences = WORLDS[cfg.world].sentences()
    tokens = {task: tokenizer(sentences[task], padding="max_length", max_length=spec["text_len"],
                              truncation=True, padding_side="right") for task in cfg.tasks}
    return {task: (x["input_ids"], x["attention_mask"]) for task, x in tokens.items()}


def write_video(path: Path, frames: list, result: dict):
    """A GIF at real speed with the outcome written on every frame."""
    outcome = "success" if result["success"] else "failure"
    text, images = f"{result['task']}\n{outcome}, {result['steps']} steps", []
    for frame in frames:
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).multiline_text((4, 3), text, fill=(255, 255, 255), stroke_width=1,
                                             stroke_fill=(0, 0, 0))
        images.append(np.asarray(image))
    iio.imwrite(path, np.stack(images), duration=50, loop=0)


def write_json(path: Path, value: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


def compare(cfg: Config):
    """Prints success per task of several evaluations side by side and writes OUT/results.json."""
    arms = dict(read_arm(item) for item in cfg.compare)
    first, one = next(iter(arms.items()))
    for name, arm in arms.items():
        if list(arm["tasks"]) != list(one["tasks"]):
            fail(f"--compare: '{name}' was evaluated on other tasks than '{first}'")
        if arm["evaluation_seeds"] != one["evaluation_seeds"]:
            fail(f"--compare: evaluation seeds of '{name}' are {arm['evaluation_seeds']}, of "
                 f"'{first}' {one['evaluation_seeds']}")
        if arm["distract"] != one["distract"]:
            fail(f"--compare: '{name}' was evaluated at --distract {arm['distract']}, '{first}' at "
                 f"{one['distract']}")
    rows = [["success rate [95% interval]", *arms]]
    for task, column in one["tasks"].items():
        cells = [arm["tasks"][task] for arm in arms.values()]
        cells = [f"{c['rate']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in cells]
        rows.append([f"{task} ({column['episodes']})", *cells])
    for head, *cells in rows:
        print(head.ljust(28) + "".join(cell.ljust(20) for cell in cells))
    write_json(Path(cfg.out) / "results.json", arms)


def read_arm(item: str) -> tuple[str, dict]:
    """NAME=FOLDER -> NAME, what that evaluation found and how its policy was trained."""
    name, _, folder = item.partition("=")
    path = Path(folder) / "results.json"
    if not path.is_file():
        fail(f"--compare '{item}': there is no '{path}'")
    report = json.loads(path.read_text())
    manifest = report["policy_manifest"]
    settings = "init", "seed", "episodes_per_task", "use_state"
    return name, {"tasks": report["tasks"], "evaluation_seeds": report["seeds"],
                  "distract": report["config"].get("distract", 0.0),    # older ones were clean
                  "policy": report["policy"], "step": manifest["step"], "blind": manifest["blind"],
                  **{k: manifest["config"][k] for k in settings}}


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
    """Runs main. Processes of torchrun end without destructors: gloo's joins threads that may wait
    for the GIL, which it holds. One that fails does not wait for the others."""
    code, alone = 0, int(os.environ.get("WORLD_SIZE", 1)) == 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))     # ends workers
    try:
        main(cfg)
    except KeyboardInterrupt:
        print("rollout: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException as error:
        if alone:
            raise
        told = isinstance(error, SystemExit) and isinstance(error.code, str)
        print(error.code if told else traceback.format_exc(), file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if alone:
        raise SystemExit(code)
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
