"""Stage 4: run a policy, or a scripted expert, in Meta-World: success rates, videos, recorded RLDS episodes.

    python rollout.py --record --episodes 30 --data data             # experts -> data/metaworld_corner4/1.0.0
    python rollout.py --policy runs/finetune/policy --episodes 50    # success per task, a GIF a task, results.json
    torchrun --nproc_per_node=2 rollout.py --policy POLICY           # the same, episodes divided over processes

In: a `policy/` folder as finetune.py exports it (policy.pt2, tokenizer files, manifest.json `policy.v1`).
Out: OUT/results.json and OUT/TASK.gif, or with --record an RLDS dataset that data_oxe.py reads.

Simulation runs in spawned worker processes that never import TensorFlow: its libraries and Mesa's renderer crash in
one process. Pictures differ from stock Meta-World (no shadows, reflections or multisampling; rendered at twice the
size and averaged): ten times faster on a CPU, but scores on pixels are not comparable with published ones. --stock
renders as shipped.

Letters: T time, C chunk, A action width, Ds state width.
"""
import json
import math
import os
import sys
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")          # before the workers load torch: one core each
RENDERING = "rendering needs EGL or OSMesa: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"

# One sentence a task. Tasks of the same words would be one task to a language-conditioned policy.
INSTRUCTIONS = {
    "assembly": "Put the ring on the peg", "basketball": "Dunk the ball into the basket",
    "bin-picking": "Move the block to the other bin", "box-close": "Put the lid on the box",
    "button-press-topdown": "Press the button from above",
    "button-press-topdown-wall": "Press the button from above behind a wall", "button-press": "Press the button",
    "button-press-wall": "Press the button behind a wall", "coffee-button": "Press the coffee machine's button",
    "coffee-pull": "Pull the mug from the coffee machine", "coffee-push": "Push the mug under the coffee machine",
    "dial-turn": "Turn the dial", "disassemble": "Take the ring off the peg", "door-close": "Close the door",
    "door-lock": "Lock the door", "door-open": "Open the door", "door-unlock": "Unlock the door",
    "hand-insert": "Put the hand into the hole", "drawer-close": "Close the drawer", "drawer-open": "Open the drawer",
    "faucet-open": "Open the faucet", "faucet-close": "Close the faucet", "hammer": "Hammer the nail",
    "handle-press-side": "Press the handle down from the side", "handle-press": "Press the handle down",
    "handle-pull-side": "Pull the handle up from the side", "handle-pull": "Pull the handle up",
    "lever-pull": "Pull the lever up", "pick-place-wall": "Lift the puck over the wall to the goal",
    "pick-out-of-hole": "Take the puck out of the hole", "pick-place": "Lift the puck to the goal",
    "plate-slide": "Slide the plate into the cabinet", "plate-slide-side": "Slide the plate sideways into the cabinet",
    "plate-slide-back": "Slide the plate out of the cabinet",
    "plate-slide-back-side": "Slide the plate sideways out of the cabinet",
    "peg-insert-side": "Put the peg into the side of the box", "peg-unplug-side": "Pull the peg out sideways",
    "soccer": "Kick the ball into the goal", "stick-push": "Push the box with the stick",
    "stick-pull": "Pull the box with the stick", "push": "Push the puck to the goal",
    "push-wall": "Push the puck around the wall to the goal", "push-back": "Pull the puck back to the goal",
    "reach": "Reach the goal", "reach-wall": "Reach the goal behind the wall", "shelf-place": "Put the puck on the shelf",
    "sweep-into": "Sweep the puck into the hole", "sweep": "Sweep the puck off the table",
    "window-open": "Open the window", "window-close": "Close the window",
}
CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
ACTION_DIM, STATE_DIM = 4, 4                            # xyz and gripper: commanded; measured


@dataclass
class Config:
    record: bool = False
    """Record the scripted experts instead of evaluating a policy."""
    policy: str = "runs/finetune/policy"
    """Folder that finetune.py exported."""
    out: str = "runs/rollout"
    """Where an evaluation writes results.json and videos."""
    data: str = "data"
    """Where --record writes metaworld_CAMERA/1.0.0."""
    tasks: tuple[str, ...] = ("button-press-topdown", "drawer-open", "window-open", "door-open", "faucet-open",
                              "faucet-close")
    """Meta-World tasks without the -v3."""
    episodes: int = 20
    """Episodes a task; when recording, successful ones."""
    camera: str = "corner4"
    """View of --record; a policy's manifest names its own."""
    image_size: int = 64
    """Pixels a side of recorded images."""
    stock: bool = False
    """Render as Meta-World ships it: shadows, reflections, multisampling; about ten times slower."""
    noise: float = 0.2
    """Standard deviation of the slow random push added to the expert's actions, which span -1..1."""
    max_steps: int = 200
    """Steps after which an episode has failed; the simulator's own limit is 500."""
    replan: int = 0
    """Actions executed of each predicted chunk before the next picture is taken; 0: all."""
    compare: tuple[str, ...] = ()
    """Instead of running anything: one table of finished evaluations, given as NAME=FOLDER; writes OUT/results.json."""
    seed: int = 0
    """Block of 10,000 environment seeds. Recording and evaluation never share one."""
    workers: int = 0
    """Simulation processes; 0: one a core."""


def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


# ---------------------------------------------------------------------------------------------- simulator
class Simulator:
    """One Meta-World task. reset(seed) is reproducible to the pixel; step(action (4,)) -> (reward, success)."""

    def __init__(self, task: str, camera: str, stock: bool):
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        self.env = env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        # random starts drawn from env.seed(), goal visible to the expert (reset(seed=) is ignored by Meta-World)
        env.seeded_rand_vec, env._freeze_rand_vec, env._set_task_called, env._partially_observable = True, False, True, False
        env.__dict__.pop("sawyer_observation_space", None)             # cached for the other observability
        self.stock, self.scale = stock, 1 if stock else 2
        if not stock:
            env.model.vis.quality.offsamples = 0
            env.model.light_castshadow[:] = 0
            env.model.mat_reflectance[:] = 0
        self.camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera == "corner4":
            env.model.cam_pos[self.camera] = [0.75, 0.075, 0.7]
        self.renderers = {}

    def reset(self, seed: int):
        self.env.seed(seed)
        self.observation, _ = self.env.reset()

    def step(self, action: np.ndarray):
        self.observation, reward, _, _, info = self.env.step(np.clip(action, -1, 1).astype(np.float32))
        return reward, bool(info["success"])

    @property
    def state(self) -> np.ndarray:
        """float32 (4,): end effector xyz in metres, gripper opening 0..1."""
        return self.observation[:4].astype(np.float32)

    def image(self, size: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        import mujoco
        s = self.scale
        if size not in self.renderers:
            g = self.env.model.vis.global_
            g.offwidth, g.offheight = max(g.offwidth, s * size), max(g.offheight, s * size)
            self.renderers[size] = mujoco.Renderer(self.env.model, s * size, s * size)
        self.renderers[size].update_scene(self.env.data, camera=self.camera)
        x = self.renderers[size].render()[::-1, ::-1]                  # Meta-World's cameras stand on their heads
        return np.ascontiguousarray(x.reshape(size, s, size, s, 3).mean((1, 3)).round().astype(np.uint8))


# ---------------------------------------------------------------------------------------------- worker processes
_simulators: dict = {}
_policy = None


def start_worker(policy_folder: str | None):
    """Runs once in each worker. A renderer that cannot start ends the worker, which the parent reports."""
    global _policy
    try:
        import mujoco
        mujoco.GLContext(64, 64).free()
    except Exception as e:                                             # bindings fail in many ways, all for one reason
        print(f"no renderer: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    if policy_folder:
        import torch
        torch.set_num_threads(1)
        _policy = torch.export.load(f"{policy_folder}/policy.pt2").module()


def simulator(task: str, camera: str, stock: bool) -> Simulator:
    if (task, camera, stock) not in _simulators:
        _simulators[task, camera, stock] = Simulator(task, camera, stock)
    return _simulators[task, camera, stock]


def expert_success(task: str, seeds: list[int], cfg: Config) -> dict | None:
    """The first successful scripted episode of several seeds; how many were tried in "tried"."""
    for tried, seed in enumerate(seeds, 1):
        episode = expert_episode(task, seed, cfg)
        if episode["success"]:
            return {**episode, "tried": tried}
    return None


def expert_episode(task: str, seed: int, cfg: Config) -> dict:
    """One scripted episode under a slow random push. The label is what the expert commanded; what was executed is kept."""
    import imageio.v3 as iio
    from metaworld.policies import ENV_POLICY_MAP
    warnings.filterwarnings("ignore", "Constant")                      # experts exceed -1..1 by design; clipped below
    sim, expert, rng = simulator(task, cfg.camera, cfg.stock), ENV_POLICY_MAP[f"{task}-v3"](), np.random.default_rng(seed)
    sim.reset(seed)
    push, steps, after = np.zeros(ACTION_DIM), [], None
    for _ in range(cfg.max_steps):
        push = 0.9 * push + cfg.noise * math.sqrt(1 - 0.9 ** 2) * rng.standard_normal(ACTION_DIM) * [1, 1, 1, 0]
        command = np.clip(expert.get_action(sim.observation), -1, 1)
        executed = np.clip(command + push, -1, 1)
        image, state = sim.image(cfg.image_size), sim.state
        reward, success = sim.step(executed)
        png = iio.imwrite("<bytes>", image, extension=".png", compress_level=3)
        steps.append((png, state, command, executed, reward))
        if after is None and success:
            after = len(steps)
        if after is not None and len(steps) >= after + 5:              # a few frames of the finished task
            break
    images, states, commands, executed, rewards = zip(*steps)
    return dict(task=task, seed=seed, success=after is not None, images=images, state=np.stack(states),
                action=np.stack(commands), executed_action=np.stack(executed), reward=np.array(rewards))


def policy_episode(task: str, seed: int, cfg: Config, spec: dict, tokens: dict, film: bool) -> dict:
    """One closed-loop episode of the worker's policy; with `film` also frames at 160 px, 20 a second."""
    import cv2
    import torch
    sim, rng = simulator(task, spec["camera"], cfg.stock), np.random.default_rng(seed)
    sim.reset(seed)
    ids, mask = (torch.tensor([x]) for x in tokens[task])
    frames, queue, success, steps = [], [], False, 0
    while steps < cfg.max_steps and not success:
        if not queue:
            image = sim.image(spec["source_size"])                     # as recorded, then resized as the loader does
            if image.shape[0] != spec["image_size"]:
                image = cv2.resize(image, [spec["image_size"]] * 2, interpolation=cv2.INTER_LINEAR
                                   if spec["image_size"] > image.shape[0] else cv2.INTER_AREA)
            image = torch.from_numpy(image)[None]
            noise = torch.from_numpy(rng.standard_normal((1, spec["chunk"], spec["action_dim"]), np.float32))
            with torch.inference_mode():
                chunk = _policy(image, torch.from_numpy(sim.state)[None], ids, mask, noise)[0].numpy()   # (C, A)
            queue = list(chunk[:cfg.replan or None])
        if film and steps % 4 == 0:
            frames.append(sim.image(160))
        _, success = sim.step(queue.pop(0))
        steps += 1
    if film:
        frames += [sim.image(160)] * 10
    return dict(task=task, seed=seed, success=success, steps=steps, frames=frames)


def run_jobs(jobs: list, workers: int, policy_folder: str | None, label: str):
    """Yields each job's result as it ends; a job is (function, *arguments). Exits when a worker dies."""
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn"), start_worker, (policy_folder,)) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            for future in tqdm(futures, desc=label, unit="episode", mininterval=2, disable=int(os.environ.get("RANK", 0)) > 0):
                yield future.result()
        except BrokenProcessPool:
            fail(f"a simulation process died, see above; {RENDERING} (MUJOCO_GL={os.environ['MUJOCO_GL']})")
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- the two jobs
def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927)."""
    p, d = successes / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def record(cfg: Config):
    """Scripted experts -> RLDS, tasks alternating, so that any stretch of the dataset holds all of them. An episode that
    fails is replaced by another seed's, four times at most."""
    from data_oxe import EpisodeWriter                                 # imports TensorFlow: parent process only
    name, want, tried, steps, began = f"metaworld_{cfg.camera}", cfg.episodes, 0, 0, time.time()
    jobs = [(expert_success, t, [cfg.seed * 10_000 + i + want * retry for retry in range(5)], cfg)
            for i in range(want) for t in cfg.tasks]
    with EpisodeWriter(cfg.data, name, cfg.image_size, ACTION_DIM, STATE_DIM) as writer:
        for (_, task, seeds, _), e in zip(jobs, run_jobs(jobs, cfg.workers, None, "record")):
            if e is None:
                fail(f"the expert failed at '{task}' with all of the seeds {seeds} at noise {cfg.noise}; lower --noise")
            tried, steps = tried + e["tried"], steps + len(e["images"])
            writer.add(e["images"], e["state"], e["action"], e["executed_action"], e["reward"], INSTRUCTIONS[task], task=task,
                       seed=e["seed"], success=True, file_path=f"metaworld/{task}/{e['seed']}")
    print(f"recorded {len(jobs)} episodes ({tried} tried), {steps} steps in {time.time() - began:.0f} s: {cfg.data}/{name}")


def refuse_pickles(path: Path):
    """A torch.export archive may carry pickled payloads, which run code when loaded: such a file is not opened."""
    try:
        with zipfile.ZipFile(path) as z:
            names = [n for n in z.namelist() if n.endswith(("weights_config.json", "constants_config.json"))]
            configs = [json.loads(z.read(n)) for n in names]
    except (OSError, zipfile.BadZipFile) as e:
        fail(f"'{path}' is not a torch.export archive ({e})")
    if len(configs) != 2 or any(entry.get("use_pickle") for c in configs for entry in c["config"].values()):
        fail(f"'{path}' holds pickled payloads or an unknown layout; export it again with this project's scripts")


def load_manifest(folder: Path) -> dict:
    """policy/manifest.json; exits with the two values where schema or widths do not fit this robot."""
    if not (folder / "manifest.json").exists():
        fail(f"no policy at '{folder}' (manifest.json is missing); finetune.py writes one to OUT/policy")
    spec = json.loads((folder / "manifest.json").read_text())
    for key, here in {"schema": "policy.v1", "action_dim": ACTION_DIM, "state_dim": STATE_DIM}.items():
        if spec.get(key) != here:
            fail(f"policy '{folder}': {key} is {spec.get(key)!r}, Meta-World needs {here!r}")
    refuse_pickles(folder / "policy.pt2")
    view = [n.removeprefix("metaworld_") for n in spec["datasets"] if n.startswith("metaworld_")]
    if not view:
        fail(f"policy '{folder}' was trained on {list(spec['datasets'])}, none of them a metaworld_CAMERA dataset")
    return {**spec, "camera": view[0], "source_size": spec["datasets"][f"metaworld_{view[0]}"]}


def write_video(path: Path, result: dict):
    """A GIF at real speed with the outcome written on every frame."""
    import imageio.v3 as iio
    from PIL import Image, ImageDraw
    frames = []
    for x in result["frames"]:
        x = Image.fromarray(x)
        text = f"{result['task']}\n{'success' if result['success'] else 'failure'}, {result['steps']} steps"
        ImageDraw.Draw(x).multiline_text((4, 3), text, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
        frames.append(np.asarray(x))
    iio.imwrite(path, np.stack(frames), duration=50, loop=0)


def evaluate(cfg: Config):
    """Closed loop on seeds that recording never uses; prints and writes success per task with 95% intervals."""
    from transformers import AutoTokenizer
    folder, out = Path(cfg.policy), Path(cfg.out)
    spec = load_manifest(folder)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {}
    for t in cfg.tasks:
        x = tokenizer(INSTRUCTIONS[t], padding="max_length", max_length=spec["text_len"], truncation=True, padding_side="right")
        tokens[t] = (x["input_ids"], x["attention_mask"])
    seeds = range(1_000_000_000 + cfg.seed * 10_000, 1_000_000_000 + cfg.seed * 10_000 + cfg.episodes)
    jobs = [(policy_episode, t, s, cfg, spec, tokens, s == seeds[0]) for s in seeds for t in cfg.tasks]
    results = list(run_jobs(jobs[rank::world], cfg.workers, str(folder), "rollout"))
    out.mkdir(parents=True, exist_ok=True)
    for r in results:
        if r["frames"]:
            write_video(out / f"{r['task']}.gif", r)
        del r["frames"]
    if world > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        gathered = [None] * world
        dist.all_gather_object(gathered, results)
        results = sum(gathered, [])
    if rank == 0:
        summarize(results, cfg, spec, out)
    if world > 1:                                                      # without gloo's destructor, which can deadlock
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def summarize(results: list, cfg: Config, spec: dict, out: Path):
    """Prints success per task with its 95% interval and writes OUT/results.json."""
    table = {}
    for t in [*cfg.tasks, "all"]:
        mine = [r for r in results if t in (r["task"], "all")]
        k, n = sum(r["success"] for r in mine), len(mine)
        low, high = wilson(k, n)
        table[t] = dict(successes=k, episodes=n, rate=k / n, low=low, high=high)
        print(f"{t:24s} {k:4d}/{n:<4d} {k / n:.2f}  [{low:.2f}, {high:.2f}]")
    seeds = [r["seed"] for r in results]
    report = dict(tasks=table, policy=cfg.policy, policy_manifest=spec, config=asdict(cfg), seeds=[min(seeds), max(seeds)],
                  episodes=sorted(results, key=lambda r: (r["task"], r["seed"])))
    write_json(out / "results.json", report)
    print(f"results and videos: {out}")


def write_json(path: Path, value: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


def compare(cfg: Config):
    """Prints success per task of several evaluations side by side and writes OUT/results.json."""
    arms = {}
    for item in cfg.compare:
        name, _, folder = item.partition("=")
        path = Path(folder) / "results.json"
        if not path.is_file():
            fail(f"--compare '{item}': there is no '{path}'")
        r = json.loads(path.read_text())
        arms[name] = {"tasks": r["tasks"], "evaluation_seeds": r["seeds"], "policy": r["policy"],
                      **{k: r["policy_manifest"][k] for k in ("step", "blind")},
                      **{k: r["policy_manifest"]["config"][k] for k in ("init", "seed", "episodes_per_task", "use_state")}}
    tasks = list(next(iter(arms.values()))["tasks"])
    if odd := [n for n, a in arms.items() if list(a["tasks"]) != tasks]:
        fail(f"--compare: '{odd[0]}' was evaluated on other tasks than '{next(iter(arms))}'")
    if len({tuple(a["evaluation_seeds"]) for a in arms.values()}) > 1:
        fail(f"--compare: evaluation seeds differ: { {n: a['evaluation_seeds'] for n, a in arms.items()} }")
    print("success rate [95% interval]".ljust(28) + "".join(n.ljust(20) for n in arms))
    for t in tasks:
        cells = (a["tasks"][t] for a in arms.values())
        print(f"{t} ({arms[next(iter(arms))]['tasks'][t]['episodes']})".ljust(28)
              + "".join(f"{c['rate']:.2f} [{c['low']:.2f}, {c['high']:.2f}]".ljust(20) for c in cells))
    write_json(Path(cfg.out) / "results.json", arms)


def main(cfg: Config):
    if unknown := [t for t in cfg.tasks if t not in INSTRUCTIONS]:
        fail(f"unknown task '{unknown[0]}'; known: {', '.join(INSTRUCTIONS)}")
    if cfg.camera not in CAMERAS:
        fail(f"unknown camera '{cfg.camera}'; known: {', '.join(CAMERAS)}")
    if not 0 <= cfg.seed < 100_000:
        fail(f"--seed {cfg.seed} must be in 0..99999, so that recording and evaluation share no environment seed")
    if not 1 <= cfg.episodes <= 2000:
        fail(f"--episodes {cfg.episodes} must be in 1..2000 (a block of 10,000 seeds; recording may need spare ones)")
    if cfg.max_steps > 500:
        fail(f"--max-steps {cfg.max_steps} is above the simulator's limit of 500")
    if cfg.record and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--record starts its own processes (--workers); run it with python, not torchrun")
    (compare if cfg.compare else record if cfg.record else evaluate)(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
