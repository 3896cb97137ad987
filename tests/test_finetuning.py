"""finetune.py: what it learns from, of which weights, and by what its best policy is chosen."""
import copy
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from common import ROOT, TASKS, TINY, metrics, run_here
from fakes import fake_frames, write_fake
from safetensors.torch import load_file
from test_policy import batch_of, stats_of

import data_oxe
import finetune
import vla


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    """Datasets of two cameras, of two with red and blue exchanged, and of one."""
    folder = tmp_path_factory.mktemp("robots")
    for name in ("droid", "utaustin_mutex", "bridge_orig"):
        write_fake(str(folder), name, data_oxe.REGISTRY[name], 8, 12, fake_frames(12, 24))
    return folder


def loader_of(folder, mix, split="train", size=24, batch=24, **options):
    cfg = data_oxe.DataConfig(data=str(folder), mix=mix, val_fraction=0.25)
    return data_oxe.Loader(cfg, split, batch, size, **options)


# ------------------------------------------------------------ cameras
def test_a_batch_shows_further_cameras(robots):
    """Of the same moment, in right colours; black where a dataset has none; all else as without."""
    mix = "droid,utaustin_mutex,bridge_orig"
    plain = next(iter(loader_of(robots, mix)))
    batch = next(iter(loader_of(robots, mix, cameras=2)))
    assert batch["views"].shape == (24, 1, 24, 24, 3) and "views" not in plain
    assert set(batch["dataset"]) == {0, 1, 2}
    assert all(np.array_equal(batch[name], plain[name]) for name in ("frames", "step", "actions"))
    stored = [data_oxe.tf.io.decode_image(x, channels=3).numpy() for x in fake_frames(12, 24)]
    for dataset, t, view in zip(batch["dataset"], batch["step"], batch["views"][:, 0]):
        its = stored[(t + 1) % 12]                                      # see fakes.write_fake
        its = {0: its, 1: its[..., ::-1], 2: 0 * its}[dataset]
        assert np.abs(view.astype(int) - its).max() <= (40 if dataset == 0 else 0)  # droid: JPEG
    with pytest.raises(SystemExit, match="cameras 3 are more than any .*'droid': 2"):
        data_oxe.check_cameras(loader_of(robots, mix).plans, 3)
    with pytest.raises(SystemExit, match="cameras 2 need resize 'cpu'"):
        cfg = data_oxe.DataConfig(data=str(robots), mix="droid", resize="gpu")
        data_oxe.Loader(cfg, "train", 4, 24, cameras=2)


def test_a_missing_camera_goes_unseen():
    """A black picture changes nothing, another one does; the first camera counts, black or not."""
    torch.manual_seed(0)
    trunk = finetune.Trunk(finetune.SmolVLMModel(finetune.tiny_config()), [1], [2, 3], [4]).eval()
    ids = torch.ones(2, 5, dtype=torch.int64)
    one, other = torch.randint(0, 255, (2, 2, 64, 64, 3), dtype=torch.uint8)
    black = torch.zeros_like(one)
    see = lambda *images: trunk(torch.stack(images, 1), ids, ids)
    alone = trunk(one, ids, ids)
    torch.testing.assert_close(see(one, black), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(see(one, black, other), see(one, other), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(see(one, other), alone, atol=1e-3)
    assert not torch.allclose(see(black, other), see(other, black), atol=1e-3)
    half = torch.stack([other[0], black[0]])                # one of the batch has it
    torch.testing.assert_close(see(one, half)[1], alone[1], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def tuned(robots, tmp_path_factory):
    """A run with two cameras, LoRA, a frozen vision tower, and a share of the episodes."""
    out = tmp_path_factory.mktemp("tuned")
    args = ["--data", robots, "--mix", "droid,utaustin_mutex", "--init", "none", "--steps", 4,
            *TINY, "--save-every", 2, "--cameras", 2, "--lora-rank", 2, "--freeze", "vision",
            "--trunk-lr", 0.1, "--label-fraction", 0.5, "--laq-ckpt", "pooled", "--lr", 0.01]
    run_here("finetune.py", *args, "--out", out)
    return args, out


def test_a_policy_of_two_cameras_and_lora_is_exported_merged(tuned, tmp_path):
    """policy.pt2 acts as the trained model, without knowing LoRA, and sees both cameras."""
    args, out = tuned
    cfg = tyro.cli(finetune.Config, args=[*map(str, args)])
    cfg.out = str(tmp_path)
    finetune.check(cfg, {})
    state = torch.load(out / "last.pt", weights_only=True)["model"]
    state = {name[6:]: x for name, x in state.items() if name.startswith("model.")}
    trunk, tokenizer = finetune.load_trunk(cfg)
    finetune.freeze(trunk, cfg)
    stats = {name: x for name, x in state.items() if name.endswith(("_offset", "_scale"))}
    policy = finetune.Policy(cfg, trunk, stats)
    policy.load_state_dict(state)
    policy.eval()
    loader = loader_of(cfg.data, cfg.mix, cameras=2, fraction=0.5)
    finetune.export(policy, cfg, 4, tokenizer, loader, {})
    program = vla.open_program(tmp_path / "policy/policy.pt2")[0].module()
    images = torch.randint(0, 255, (3, 2, 64, 64, 3), dtype=torch.uint8)
    ones = torch.ones(3, 32, dtype=torch.int64)
    example = {"images": images, "state": torch.randn(3, policy.state_offset.shape[1]),
               "ids": ones, "mask": ones}
    noise = torch.zeros(3, 8, policy.action_dim)
    actions = program(*example.values(), noise)
    torch.testing.assert_close(actions, policy.act(example), rtol=1e-3, atol=1e-4)
    changed = images.clone()
    changed[:, 1] = 0
    assert not torch.allclose(policy.act(example | {"images": changed}), actions, atol=1e-3)
    with policy.trunk.vlm.text_model.disable_adapter():
        assert not torch.allclose(policy.act(example), actions, atol=1e-3)
    for folder, used in ((tmp_path, 3), (out, 4)):          # of 6 and 7 training episodes, half
        weights = load_file(folder / "policy/weights.safetensors")
        assert not [name for name in weights if "lora" in name]
        manifest = json.loads((folder / "policy/manifest.json").read_text())
        assert manifest["cameras"] == ["observation/exterior_image_1_left",
                                       "observation/wrist_image_left"]
        assert [c["used"] for c in manifest["episodes"].values()] == [used, used]


def test_frozen_parameters_stay_and_others_learn(tuned):
    _, out = tuned
    later, earlier = (torch.load(out / name, weights_only=True)["model"]
                      for name in ("last.pt", "last-1.pt"))
    moved = {name for name, x in later.items()
             if name.startswith(("model.", "average.")) and not torch.equal(x, earlier[name])}
    assert not [name for name in moved if "vision_model" in name or "base_layer" in name]
    for what in ("lora_A", "lora_B", "connector", "trunk.readout"):
        assert [name for name in moved if what in name], what
    frozen = [name for name in later if "vision_model" in name and name.startswith("model.")]
    assert all(torch.equal(later[name], later[name.replace("model.", "best.", 1)])
               for name in frozen)


def test_a_resumed_run_is_equal(tuned, tmp_path):
    """With two learning rates, LoRA, two cameras and few labels."""
    args, out = tuned
    shutil.copy(out / "last-1.pt", tmp_path / "last.pt")
    shutil.copy(out / "metrics.jsonl", tmp_path)
    run_here("finetune.py", *args, "--resume", tmp_path / "last.pt")
    a, b = (metrics(x, "loss", "grad_norm", "val_action_error") for x in (out, tmp_path))
    assert a == b and list(a["loss"]) == [0, 1, 2, 3]
    first, second = (torch.load(x / "last.pt", weights_only=True)["model"] for x in (out, tmp_path))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


# ------------------------------------------------------------ labels, rates, errors
def test_labelled_episodes_are_a_fixed_choice(noise):
    """The same on all ranks, by any seed; a smaller share is a part of a larger one."""
    def chosen(fraction, **options):
        loader = loader_of(noise, "metaworld_corner4", batch=1, size=0, fraction=fraction,
                           **options)
        return [e for plan in loader.plans for file in plan.files
                for e in file.first + np.flatnonzero(file.keep)]
    whole, half, third = (chosen(x) for x in (1.0, 0.5, 1 / 3))
    assert len(whole) == 6 and len(half) == 3 and len(third) == 2
    assert set(third) < set(half) < set(whole) and half != whole[:3]
    assert chosen(0.5, seed=7) == half and chosen(1e-6) != []
    ranks = [chosen(0.5, rank=rank, world=3) for rank in range(3)]
    assert [len(x) for x in ranks] == [1, 1, 1] and sum(ranks, []) == half
    assert chosen(0.5, split="val") == chosen(1.0, split="val")


def test_the_trunk_learns_at_its_share_of_the_rate():
    cfg = finetune.Config(lr=1e-3, warmup_steps=0, trunk_lr=0.1)
    model = finetune.Policy(cfg, finetune.load_trunk(cfg)[0], stats_of())
    optimizer = finetune.slow_down(finetune.make_optimizer(cfg, model), model.trunk, cfg.trunk_lr)
    before = copy.deepcopy(model.state_dict())
    sum(model(batch_of("cpu") | {"chunk": torch.ones(8, 8, 4)}).values()).backward()
    finetune.start_step(cfg, 0, optimizer, 0, 1)
    optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    trunk = [x for name, x in moved.items() if name.startswith("trunk.")]
    head = [x for name, x in moved.items() if not name.startswith("trunk.")]
    assert 0.5e-4 < max(trunk) < 1.1e-4 and 0.5e-3 < max(head) < 1.1e-3     # Adam's first step
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({*map(id, grouped)}) == len(list(model.parameters()))


def test_validation_stands_beside_the_nearest_labelled_frame():
    """Its actions are those of the frame that looks alike, of the same instruction; errors by
    dimension have the whole as their mean, and are of the first dataset."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 2, 64, 64, 3), np.uint8)
    frames[1] = frames[0]                                   # looks the same, says other words
    train = {"frames": frames, "instruction": list("abcdefgh"), "dataset": np.arange(8) // 6,
             "actions": rng.standard_normal((8, 8, 4)).astype(np.float32),
             "action_mask": np.ones((8, 8), bool), "state": np.zeros((8, 4), np.float32)}
    held_out = train | {"actions": train["actions"].copy(), "instruction": list("abcdefnn")}
    held_out["actions"][:6, :, 1] += 0.5
    held_out["actions"][6:] += 100                          # of another robot
    held_out["frames"] = frames // 2 * 2                    # nearly the same pictures
    loader = lambda batch: SimpleNamespace(peek=lambda n: iter([batch]), image_size=64)
    cfg, device = finetune.Config(), torch.device("cpu")
    trunk, tokenizer = finetune.load_trunk(cfg)
    model, tokens = finetune.Policy(cfg, trunk, stats_of(2)), finetune.Tokens(tokenizer, 16)
    nearest = finetune.Nearest(loader(train), device)
    m = finetune.evaluate(model, cfg, loader(held_out), nearest, tokens, device)
    by_dimension = [m[f"action_error_nearest_{i}"] for i in range(4)]
    assert by_dimension == pytest.approx([0, 0.5, 0, 0], abs=1e-6)
    assert m["action_mse_nearest"] == pytest.approx(0.25 / 4)
    for name in ("action_error", "action_mse", "action_error_mean_action", "action_mse_nearest"):
        mean = np.mean([m[f"{name}_{i}"] for i in range(4)])
        assert m[name] == pytest.approx(mean, abs=1e-6), name
    assert "0.125" in finetune.describe(m) and 0 < m["action_error"] < 10


# ------------------------------------------------------------ rollouts
def test_rollouts_choose_the_best(data, tmp_path):
    """A real one, on the tasks of the data, whose success is logged; then the choice."""
    args = ["--data", data, "--init", "none", "--steps", 0, "--eval-batches", 1, "--batch-size", 8,
            "--rollout-every", 250, "--rollout-episodes", 1, "--out", tmp_path]
    run_here("finetune.py", *args)
    folder = tmp_path / "rollout/step_00000000"
    report = json.loads((folder / "results.json").read_text())
    assert [*report["tasks"]] == [*TASKS, "all"] and report["tasks"]["all"]["episodes"] == 2
    assert report["seeds"][0] >= 1_000_010_000              # not those of other evaluations
    assert metrics(tmp_path, "val_success")["val_success"] == {0: report["tasks"]["all"]["rate"]}
    assert (folder / f"{TASKS[0]}.gif").exists() and not (folder / "policy").exists()
    assert (tmp_path / "policy/policy.pt2").exists() and (tmp_path / "best.pt").exists()
    cfg = finetune.Config(rollout_every=250)
    found = [(3, 0.5), (2, 0.9), (2, 0.4), (2, 0.7), (4, 0.1)]
    errors = [finetune.judged({"failures": n, "action_error": e}, cfg) for n, e in found]
    assert errors.index(min(errors)) == 2
    assert finetune.judged({"action_error": 0.1}, cfg) == torch.inf     # none were due
    assert finetune.judged({"action_error": 0.1}, finetune.Config()) == 0.1


def test_rollouts_that_fail_or_are_stopped(tmp_path, monkeypatch):
    """The first is told with its reason; a signal ends the second, and training can save."""
    rollouts = finetune.Rollouts(finetune.Config(), None, None, {})
    assert rollouts(None, 250, None) == {}                  # none are asked for
    flag = SimpleNamespace(received=0)
    rollouts.command = [sys.executable, "-c", "raise SystemExit('no renderer here')"]
    with pytest.raises(SystemExit, match=r"rollout.py ended with 1 \(no renderer here\)"):
        rollouts.run(tmp_path, flag)
    rollouts.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    flag.received, began = 15, time.monotonic()
    assert rollouts.run(tmp_path, flag) == {"signal": 15} and time.monotonic() - began < 10


# ------------------------------------------------------------ errors and imports
@pytest.mark.parametrize("args, says", [
    (["--label-fraction", "0"], "--label-fraction 0.0 is a share of the episodes"),
    (["--label-fraction", "0.1", "--episodes-per-task", "2"], "both choose the labelled episodes"),
    (["--trunk-lr", "0"], "--trunk-lr 0.0 is a share of --lr, above 0; --freeze trunk"),
    (["--rollout-every", "100"], "--rollout-every 100 must be a multiple of --eval-every 250"),
    (["--rollout-every", "250", "--mix", "droid"], "'droid' was not recorded by rollout.py"),
    (["--lora-rank", "2", "--lora-modules", "c_attn"], "--lora-modules c_attn: the language model"),
    (["--freeze-layers", "9"], "--freeze-layers 9: the language model of 'tiny' has 2 layers"),
    (["--cameras", "0"], "cameras 0 must be at least 1"),
    (["--cameras", "2", "--mix", "bridge_orig"], "cameras 2 are more than any dataset of the mix"),
    (["--mix", "droid,droid_100"], "unknown dataset 'droid_100'"),
])
def test_user_errors_are_one_line(args, says, robots, tmp_path):
    args = ["--data", str(robots), "--mix", "droid", "--init", "none",
            "--out", str(tmp_path / "out"), *args]
    with pytest.raises(SystemExit) as error:
        finetune.main(tyro.cli(finetune.Config, args=args))
    assert says in error.value.code and "\n" not in error.value.code
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]


def test_a_policy_needs_no_tensorflow():
    """finetune.py, with data_oxe.py beside it, imports and acts where there is none."""
    code = """
import sys
sys.modules.update(tensorflow=None, tensorflow_datasets=None)           # importing them fails
import torch, finetune
cfg = finetune.Config()
stats = {f"{x}_{y}": torch.ones(1, 4) for x in ("action", "state") for y in ("offset", "scale")}
policy = finetune.Policy(cfg, finetune.load_trunk(cfg)[0], stats)
assert finetune.Program(policy)(*finetune.example_of(policy, cfg)).shape == (2, 8, 4)
try:
    finetune.data_oxe.tf.zeros
except ImportError:
    print("acted")
"""
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert p.stdout.strip() == "acted", p.stderr[-2000:]
