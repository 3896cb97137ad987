"""In LeRobot's environment (tests/lerobot.sh): the policy that finetune.py wrote, in LeRobot's
hands."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.dataset import DatasetRecordConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.robots import Robot, RobotConfig
from lerobot.rollout import EpisodicStrategyConfig, RolloutConfig
from lerobot.scripts.lerobot_rollout import rollout
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file, save_file

register_third_party_plugins()
import lerobot_policy_nanolapa as plugin        # noqa: E402

WORK = Path(os.environ["NANOLAPA_WORK"])
POLICY, STAGE2, SOURCE = WORK / "ft/policy", WORK / "vla/stage2", WORK / "source"
MODEL = POLICY / "lerobot/pretrained_model"
TEXTS = ["Push it", "Pull it", ""]
UNIT = {"mean": np.zeros(2), "std": np.ones(2)}
STATISTICS = {"action": UNIT, "observation.state": UNIT}


def command(name, *args, check=True):
    p = subprocess.run([Path(sys.executable).with_name(name), *map(str, args)], cwd=WORK, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500)
    assert not check or p.returncode == 0, p.stdout[-4000:]
    return p.stdout


def observation(camera="observation.image", side=64):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, side, side), generator=draw, dtype=torch.uint8)
    state = 100 * torch.randn(3, 2, generator=draw)
    return {camera: images / 255, "observation.state": state, "task": list(TEXTS)}


@pytest.fixture(scope="module")
def policy():
    return get_policy_class("hlrp_smolvla_shared").from_pretrained(MODEL)


def processors(policy, names):
    overrides = {"rename_observations_processor": {"rename_map": names},
                 "device_processor": {"device": "cpu"}}
    return make_pre_post_processors(policy.config, pretrained_path=str(MODEL),
                                    preprocessor_overrides=overrides)


def test_what_lerobot_recorded_comes_in_whole():
    """Each step of each episode: LeRobot's own reader against the RLDS that from-lerobot made."""
    code = ("import sys, numpy as np, tensorflow_datasets as tfds\n"
            "out = {}\n"
            "for e in tfds.builder_from_directory(sys.argv[1]).as_dataset(split='train'):\n"
            "    steps = list(e['steps'].as_numpy_iterator())\n"
            "    n = int(e['episode_metadata']['episode_index'])\n"
            "    out |= {f'{n}/action': [s['action'] for s in steps],\n"
            "            f'{n}/state': [s['observation']['state'] for s in steps],\n"
            "            f'{n}/image': [s['observation']['image'] for s in steps]}\n"
            "np.savez(sys.argv[2], **out)\n")
    subprocess.run([os.environ["NANOLAPA_PYTHON"], "-c", code, WORK / "data/pushes/1.0.0",
                    WORK / "rlds.npz"], check=True)
    rlds = np.load(WORK / "rlds.npz")
    dataset = LeRobotDataset("local/recorded", root=SOURCE, video_backend="pyav")
    at = {}
    for i in range(len(dataset)):
        row = dataset[i]
        n = int(row["episode_index"])
        t = at[n] = at.get(n, -1) + 1
        np.testing.assert_array_equal(rlds[f"{n}/action"][t], row["action"])
        np.testing.assert_array_equal(rlds[f"{n}/state"][t], row["observation.state"])
        image = row["observation.image"][None]
        image = torch.nn.functional.interpolate(image, (96, 96), mode="area")
        difference = 255 * image[0].permute(1, 2, 0).numpy() - rlds[f"{n}/image"][t]
        assert np.abs(difference).mean() < 3, (n, t)
    assert {n: t + 1 for n, t in at.items()} == {n: len(rlds[f"{n}/action"]) for n in range(6)}


def test_its_actions_are_those_of_policy_pt2(policy):
    """With a camera of another name, which a mapping tells."""
    preprocess, postprocess = processors(policy, {"observation.images.front": "observation.image"})
    seen = observation("observation.images.front")
    batch = preprocess(dict(seen))
    program = torch.export.load(POLICY / "policy.pt2").module()
    images = (255 * seen["observation.images.front"]).round().to(torch.uint8).permute(0, 2, 3, 1)
    noise = torch.zeros(3, policy.policy.cfg.chunk, 2)
    wanted = program(images, seen["observation.state"], *policy.tokens(TEXTS, "cpu"), noise)
    chunk = policy.predict_action_chunk(batch)
    torch.testing.assert_close(chunk, wanted, atol=1e-4, rtol=0)
    policy.reset()
    for t in range(wanted.shape[1]):
        action = postprocess(policy.select_action(batch if t == 0 else {}))     # of the chunk
        torch.testing.assert_close(action, wanted[:, t], atol=1e-4, rtol=0)


@RobotConfig.register_subclass("pretended")
@dataclass(kw_only=True)
class PretendedConfig(RobotConfig):
    log: list = field(default_factory=list)                     # of what it saw and was sent


class Pretended(Robot):
    """An arm that is at once where it is sent; its camera shows noise."""

    config_class, name, cameras = PretendedConfig, "pretended", ["front"]
    action_features = {"x.pos": float, "y.pos": float}
    observation_features = action_features | {"front": (64, 64, 3)}
    is_connected = is_calibrated = True

    def __init__(self, config):
        super().__init__(config)
        self.draw, self.log = np.random.default_rng(0), config.log
        self.at = {"x.pos": 300.0, "y.pos": 100.0}

    def get_observation(self):
        picture = self.draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        self.seen = self.at | {"front": picture}
        return dict(self.seen)

    def send_action(self, action):
        self.log.append((self.seen, action))
        self.at = dict(action)
        return action

    def calibrate(self):
        pass

    connect = configure = disconnect = calibrate


def test_lerobot_rollout_drives_a_robot(policy, tmp_path):
    """Whose camera has another name: what it is sent, and what is recorded of it, are policy.pt2's
    actions on what it saw. Without a mapping LeRobot refuses."""
    def drive(folder, names):
        config = PreTrainedConfig.from_pretrained(MODEL)
        config.pretrained_path = MODEL
        robot = PretendedConfig(calibration_dir=tmp_path / "calibration")
        recorded = DatasetRecordConfig(
            repo_id="local/rollout_pushes", root=tmp_path / folder, single_task=TEXTS[0], fps=20,
            episode_time_s=2, num_episodes=1, push_to_hub=False)
        rollout(RolloutConfig(robot=robot, policy=config, dataset=recorded, fps=20, device="cpu",
                              strategy=EpisodicStrategyConfig(), rename_map=names,
                              play_sounds=False, return_to_initial_position=False))
        return robot.log

    with pytest.raises(ValueError, match="Visual feature mismatch"):
        drive("refused", {})
    log = drive("recorded", {"observation.images.front": "observation.image"})
    program = torch.export.load(POLICY / "policy.pt2").module()
    sentence, C = policy.tokens(TEXTS[:1], "cpu"), policy.policy.cfg.chunk
    dataset = LeRobotDataset("local/pushes", root=tmp_path / "recorded", video_backend="pyav")
    assert len(dataset) == len(log) > C
    for t, (seen, sent) in enumerate(log):
        sent = torch.tensor([sent["x.pos"], sent["y.pos"]])
        torch.testing.assert_close(dataset[t]["action"], sent, atol=0, rtol=0)
        state = torch.tensor([[seen["x.pos"], seen["y.pos"]]])
        torch.testing.assert_close(dataset[t]["observation.state"], state[0], atol=0, rtol=0)
        if t % C == 0:
            image = torch.from_numpy(seen["front"])[None]
            chunk = program(image, state, *sentence, torch.zeros(1, C, 2))[0]
        torch.testing.assert_close(sent, chunk[t % C], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name, value, message", [
    ("observation.image", None, "there is no camera 'observation.image', only"),
    ("observation.image", torch.zeros(3, 9, 9, 3), r"must be \(B, 3, H, W\), is \(3, 9, 9, 3\)"),
    ("observation.state", None, r"'observation.state' must be \(3, 2\), is missing"),
    ("observation.state", torch.zeros(3, 7), r"must be \(3, 2\), is \(3, 7\)"),
    ("task", None, "'task' must be 3 instructions, is None")])
def test_what_lacks_is_an_error(policy, name, value, message):
    batch = observation() | {name: value, "observation.images.other": torch.zeros(3, 3, 64, 64)}
    policy.reset()
    with pytest.raises(ValueError, match=message):
        policy.select_action(batch)


def test_weights_without_statistics_are_refused(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    state = load_file(MODEL / "model.safetensors")
    del state["action_scale"]
    save_file(state, tmp_path / "model/model.safetensors")
    with pytest.raises(SystemExit, match="has no statistics of actions and state"):
        plugin.NanoLapaPolicy.from_pretrained(tmp_path / "model")


def fresh(stage2, settings=None, statistics=STATISTICS, action=2):
    """A policy as lerobot-train makes it."""
    vector = PolicyFeature(FeatureType.STATE, (2,))
    config = plugin.NanoLapaConfig(
        stage2=str(stage2), settings=settings or {}, device="cpu",
        input_features={"observation.state": vector,
                        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))})
    return plugin.NanoLapaPolicy(config, dataset_stats=statistics)


def test_a_stage2_that_does_not_fit_is_refused(tmp_path):
    """With both values."""
    def changed(name):
        shutil.copytree(STAGE2, tmp_path / name)
        (tmp_path / name / "SHA256SUMS").unlink()
        return tmp_path / name

    folder = changed("schema")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": "other.v9"}))
    with pytest.raises(SystemExit, match="schema is 'other.v9', expected 'smolvla_shared.v1'"):
        fresh(folder)
    folder = changed("width")
    heads = load_file(folder / "heads.safetensors")
    save_file(heads | {"trunk.readout": torch.zeros(99)}, folder / "heads.safetensors")
    with pytest.raises(SystemExit, match=r"readout is \(99,\), trunk is 96 wide"):
        fresh(folder)
    folder = changed("tokenizer")
    tokenizer = plugin.ByT5Tokenizer()
    tokenizer.add_tokens(["<A>", "<B>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(SystemExit, match=r"tokenizer has 386 tokens, its trunk knows 384"):
        fresh(folder)
    with pytest.raises(SystemExit, match="text_len is 32, expected 9"):
        fresh(STAGE2, {"text_len": 9})
    with pytest.raises(SystemExit, match="--policy.stage2 must be a folder of vla.py"):
        fresh("")


def test_statistics_that_lack_are_refused():
    with pytest.raises(SystemExit, match="statistics of 'action' lack mean and std"):
        fresh(STAGE2, statistics={})
    with pytest.raises(SystemExit, match="settings has 'chunks'"):
        fresh(STAGE2, {"chunks": 4})


TRAIN = ["--policy.type=hlrp_smolvla_shared", f"--policy.stage2={STAGE2}", "--policy.device=cpu",
         "--policy.push_to_hub=false", "--seed=1", "--dataset.repo_id=local/recorded",
         f"--dataset.root={SOURCE}", "--dataset.video_backend=pyav", "--log_freq=1",
         "--num_workers=0", '--policy.settings={"warmup_steps": 5}']


def losses(log):
    found = re.findall(r"step:(\d+) .*?loss:([\d.]+)", log)
    return {int(step): float(loss) for step, loss in found}


def test_lerobot_trains_resumes_and_evaluates(tmp_path):
    """From stage 2, on LeRobot's dataset: the loss falls; a resumed run repeats the unbroken one's
    losses; its checkpoint acts in LeRobot's environment."""
    log = command("lerobot-train", *TRAIN, f"--output_dir={tmp_path}/run", "--steps=20",
                  "--save_freq=10", "--batch_size=8")
    whole = losses(log)
    assert sorted(whole) == [*range(1, 21)]
    values = [whole[step] for step in sorted(whole)]
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5]), whole
    checkpoints = tmp_path / "run/checkpoints"
    log = command("lerobot-train", "--resume=true", "--steps=20",
                  f"--config_path={checkpoints}/000010/pretrained_model/train_config.json")
    resumed = losses(log)
    assert resumed == {step: whole[step] for step in range(11, 21)}
    world = ["--env.type=pusht", "--env.episode_length=20", "--eval.n_episodes=2",
             "--eval.batch_size=2", "--eval.use_async_envs=false", "--policy.device=cpu"]
    log = command("lerobot-eval", f"--policy.path={checkpoints}/last/pretrained_model", *world,
                  f"--output_dir={tmp_path}/evaluation")
    found = json.loads((tmp_path / "evaluation/eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2 and "pc_success" in found["overall"]


def test_lerobot_trains_in_two_processes(tmp_path):
    """The second process has its trunk from the first."""
    script = Path(sys.executable).with_name("lerobot-train")
    log = command("torchrun", "--standalone", "--nproc_per_node=2", script, *TRAIN, "--steps=2",
                  "--save_freq=2", "--batch_size=4", f"--output_dir={tmp_path}/run")
    assert sorted(losses(log)) == [1, 2]


def test_another_robot_is_refused(tmp_path):
    """Meta-World has four numbers of action and state, this policy two."""
    log = command("lerobot-eval", f"--policy.path={MODEL}", "--env.type=metaworld",
                  "--env.task=drawer-open-v3", "--eval.n_episodes=1", "--eval.batch_size=1",
                  "--policy.device=cpu", f"--output_dir={tmp_path}", check=False)
    assert "the policy's action is 2 wide, that of the dataset or environment 4" in log
