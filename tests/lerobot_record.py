"""In LeRobot's environment: LeRobot records a dataset of its own worlds, which then comes in
through `data_oxe.py from-lerobot`.

    python tests/lerobot_record.py --root FOLDER --env metaworld --task drawer-open-v3 --episodes 20
    python tests/lerobot_record.py --root FOLDER --env pusht --episodes 4       # follows the block
"""
import argparse
import os

os.environ.setdefault("MUJOCO_GL", "egl")                   # before LeRobot

import cv2                                                  # noqa: E402
import gymnasium                                            # noqa: E402
import numpy as np                                          # noqa: E402
from lerobot.datasets import LeRobotDataset                 # noqa: E402

SIDE = 128


def metaworld(task: str, seed: int):
    """Yields (picture, state, action, whether it has succeeded) of an expert's episode."""
    from lerobot.envs.metaworld import MetaworldEnv
    env = MetaworldEnv(task=task, obs_type="pixels_agent_pos")
    env._ensure_env()
    env._env.seed(seed)
    raw, success = env._env.reset()[0], False
    rng = np.random.default_rng(seed)
    for _ in range(150):
        seen = env._format_raw_obs(raw)
        action = np.clip(env.expert_policy.get_action(raw), -1, 1)
        yield seen["pixels"], seen["agent_pos"], action, success
        if success:
            return
        noise = 0.1 * rng.standard_normal(4)                # states around its path come too
        raw, *_, info = env._env.step(np.clip(action + noise, -1, 1).astype(np.float32))
        success = bool(info["success"])


def pusht(task: str, seed: int):
    import gym_pusht                                        # noqa: F401  registers
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos",
                         observation_width=SIDE, observation_height=SIDE)
    seen, _ = env.reset(seed=seed)
    block = np.array(env.unwrapped.block.position)
    for _ in range(30):
        action = np.float32(seen["agent_pos"] + 0.3 * (block - seen["agent_pos"]))
        yield seen["pixels"], seen["agent_pos"], action, False
        seen = env.step(action)[0]


def main():
    parser = argparse.ArgumentParser()
    for name, default in dict(root=None, env="pusht", task="Push it", episodes="4").items():
        parser.add_argument(f"--{name}", default=default, required=default is None)
    args = parser.parse_args()
    world = {"metaworld": metaworld, "pusht": pusht}[args.env]
    width, fps = {"metaworld": (4, 80), "pusht": (2, 10)}[args.env]
    numbers = {"dtype": "float32", "shape": (width,), "names": [f"x{i}" for i in range(width)]}
    picture = {"dtype": "video", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": numbers, "action": numbers, "observation.image": picture}
    if args.env == "metaworld":                             # which tells
        features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    dataset = LeRobotDataset.create("local/recorded", fps=fps, root=args.root, features=features)
    for seed in range(int(args.episodes)):
        steps, success = 0, False
        for pixels, state, action, success in world(args.task, seed):
            image = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            frame = {"observation.state": np.float32(state), "action": np.float32(action),
                     "observation.image": image, "task": args.task}
            if "next.success" in features:
                frame["next.success"] = np.array([success])
            dataset.add_frame(frame)
            steps += 1
        dataset.save_episode()
        print(f"episode {seed}: {steps} steps, success {success}", flush=True)
    dataset.finalize()


if __name__ == "__main__":
    main()
