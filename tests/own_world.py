"""An environment of one's own, as rollout.py's --world own_world:Reach takes it."""
import os
from pathlib import Path

import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    """A dot is moved to a cross. The episode ends when it is there, or leaves the picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (2,), np.float32)
    sentence, action_kinds = "Move the dot to the cross", "dd"

    def __init__(self, render_mode):
        box = gymnasium.spaces.Box(-2, 2, (2,), np.float64)
        self.observation_space = gymnasium.spaces.Dict({"agent_pos": box, "goal": box})

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.goal = self.np_random.uniform(-0.9, 0.9, (2, 2))
        return self.observed(), {}

    def observed(self):
        return {"agent_pos": self.at.copy(), "goal": self.goal}

    def step(self, action):
        self.at = self.at + 0.2 * action
        distance = np.abs(self.at - self.goal).max()
        success, lost = distance < 0.05, np.abs(self.at).max() > 1
        return self.observed(), -distance, bool(success or lost), False, {"is_success": success}

    def render(self):
        image = np.full((40, 60, 3), 30, np.uint8)          # the centre square is shown
        for (x, y), color in ((self.goal, (0, 255, 0)), (self.at, (255, 0, 0))):
            row, column = int(20 + 19 * np.clip(y, -1, 1)), int(30 + 19 * np.clip(x, -1, 1))
            image[row - 1:row + 2, column - 1:column + 2] = color
        return image

    def expert(self):
        return np.clip(5 * (self.goal - self.at), -0.5, 0.5)


class Wordless(Reach):
    sentence = ""


class Discrete(Reach):
    action_space = gymnasium.spaces.Discrete(3)


class Fragile(Reach):
    """Takes its process down at one seed, each time, and at another the first time."""

    def reset(self, seed=None, options=None):
        mark = Path(os.environ["FRAGILE"])
        if seed == 6 and not mark.exists():
            mark.touch()
            os._exit(9)
        if seed == 3:
            os._exit(9)
        return super().reset(seed=seed)
