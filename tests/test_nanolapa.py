"""The real scripts, tiny, on CPU, offline. Each test fails for a reason that a user would notice."""
import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"              # before transformers is imported
import data_oxe  # noqa: E402
import finetune  # noqa: E402
import laq  # noqa: E402
import rollout  # noqa: E402
import vla  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TQDM_DISABLE": "1"}
TASKS = ["drawer-open", "faucet-close"]
TINY = ["--batch-size", "8", "--eval-batches", "1", "--eval-every", "1000", "--log-every", "1"]


def run(script, *args, processes=0, check=True, cwd=None, env=None):
    """Runs a script as a user does; returns the finished process."""
    head = [sys.executable] if not processes else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    p = subprocess.run([*head, str(ROOT / script), *map(str, args)], cwd=cwd or ROOT, env=env or ENV, text=True,
                       capture_output=True, timeout=300)
    if check and p.returncode:
        raise AssertionError(f"{script} {args} exited {p.returncode}\n{p.stdout[-2000:]}\n{p.stderr[-4000:]}")
    return p


def metrics(folder, *keys):
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {k: {r["step"]: r[k] for r in rows if k in r} for k in keys}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six episodes each of two tasks, recorded by the real simulator."""
    folder = tmp_path_factory.mktemp("data")
    run("rollout.py", "--record", "--data", folder, "--episodes", 6, "--tasks", *TASKS)
    return folder


@pytest.fixture(scope="session")
def stages(data, tmp_path_factory):
    """The loop run once, small: folder with laq/, vla/, policy run ft/."""
    out = tmp_path_factory.mktemp("stages")
    run("laq.py", "--data", data, "--out", out / "laq", "--steps", 30, *TINY)
    run("vla.py", "--data", data, "--out", out / "vla", "--laq-ckpt", out / "laq/laq.pt2", "--steps", 10, *TINY)
    run("finetune.py", "--data", data, "--out", out / "ft", "--init", out / "vla/stage2", "--episodes-per-task", 2,
        "--steps", 10, *TINY)
    return out


def stage_args(stage, data, stages):
    extra = {"laq": [], "vla": ["--laq-ckpt", stages / "laq/laq.pt2"],
             "finetune": ["--init", stages / "vla/stage2", "--episodes-per-task", 2]}[stage]
    return ["--data", data, *extra, *TINY]


# ------------------------------------------------------------------------------------------------ data
def test_recorded_dataset_reads_with_tfds(data):
    builder = tfds.builder_from_directory(str(data / "metaworld_corner4/1.0.0"))
    episodes = list(builder.as_dataset(split="train"))
    assert len(episodes) == 12
    e = episodes[0]
    assert set(e["episode_metadata"]) == {"task", "seed", "success", "file_path"} and bool(e["episode_metadata"]["success"])
    steps = list(e["steps"].as_numpy_iterator())
    assert set(steps[0]) == {"observation", "action", "executed_action", "language_instruction", "reward", "discount",
                             "is_first", "is_last", "is_terminal"}
    assert steps[0]["observation"]["image"].shape == (64, 64, 3) and steps[0]["observation"]["image"].std() > 10
    assert steps[0]["is_first"] and steps[-1]["is_last"] and steps[-1]["is_terminal"] and not steps[1]["is_first"]
    executed = np.stack([s["executed_action"] for s in steps])
    assert 0.01 < np.abs(executed - np.stack([s["action"] for s in steps]))[:, :3].mean() < 0.5      # the push


def test_batches_hold_what_was_recorded(data):
    """Frames, chunks and sums of the contract, against the same episodes read by TFDS."""
    loader = data_oxe.Loader(str(data), "metaworld_corner4", "train", 16, 64, chunk=8, val_fraction=0.2)
    batch = next(iter(loader))
    assert loader.counts["metaworld_corner4"] == {"recorded": 12, "train": 10, "val": 2, "used": 10}
    builder = tfds.builder_from_directory(str(data / "metaworld_corner4/1.0.0"))
    episodes = list(builder.as_dataset(split="train", shuffle_files=False))
    for i in range(16):
        steps = list(episodes[batch["episode"][i]]["steps"].as_numpy_iterator())
        t, T = batch["step"][i], len(steps)
        assert np.array_equal(batch["frames"][i], [steps[t]["observation"]["image"], steps[t + 8]["observation"]["image"]])
        assert batch["instruction"][i] == steps[0]["language_instruction"].decode()
        n = min(8, T - t)
        assert batch["action_mask"][i].sum() == n
        np.testing.assert_allclose(batch["actions"][i, :n], [s["action"] for s in steps[t:t + n]], atol=1e-6)
        total = np.sum([s["executed_action"] for s in steps[t:t + 8]], 0)
        np.testing.assert_allclose(batch["action_sum"][i, :3], total[:3], atol=1e-4)
        assert batch["action_sum"][i, 3] == pytest.approx(steps[t + 7]["executed_action"][3])
        np.testing.assert_allclose(batch["state"][i], steps[t]["observation"]["state"])


# ------------------------------------------------------------------------------------------------ training loops
@pytest.mark.parametrize("stage", ["laq", "vla", "finetune"])
def test_kill_and_resume_equals_an_unbroken_run(stage, data, stages, tmp_path):
    args = [*stage_args(stage, data, stages), "--steps", 24, "--save-every", 6]
    run(f"{stage}.py", *args, "--out", tmp_path / "whole")
    broken = subprocess.Popen([sys.executable, str(ROOT / f"{stage}.py"), *map(str, args), "--out", str(tmp_path / "broken")],
                              env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "broken/last.pt").exists() and broken.poll() is None:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL, "the run ended before it was killed"
    run(f"{stage}.py", *args, "--out", tmp_path / "broken", "--resume", tmp_path / "broken/last.pt")
    whole, resumed = (metrics(tmp_path / x, "loss")["loss"] for x in ("whole", "broken"))
    assert list(resumed) == list(whole) == list(range(24))
    np.testing.assert_allclose([*resumed.values()], [*whole.values()], rtol=1e-4)


def test_sigterm_leaves_a_checkpoint(data, tmp_path):
    p = subprocess.Popen([sys.executable, str(ROOT / "laq.py"), "--data", str(data), "--out", str(tmp_path), "--steps", "5000",
                          *TINY], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len((tmp_path / "metrics.jsonl").read_text().splitlines() if (tmp_path / "metrics.jsonl").exists() else []) < 3:
        assert p.poll() is None
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGTERM and "--resume" in err and "Traceback" not in err
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 2
    p = run("laq.py", "--data", data, "--out", tmp_path, "--resume", tmp_path / "last.pt", "--steps", 6000, *TINY, check=False)
    assert p.returncode == 1 and "steps was 5000, is 6000" in p.stderr


@pytest.fixture(scope="session")
def same_episodes(tmp_path_factory):
    """Episodes that are all equal and hold one frame pair: every rank sees the same batch."""
    folder, rng = tmp_path_factory.mktemp("same"), np.random.default_rng(0)
    images = rng.integers(0, 255, (9, 64, 64, 3), np.uint8)
    action = rng.standard_normal((9, 4))
    with data_oxe.EpisodeWriter(str(folder), "metaworld_corner4", 64, 4, 4) as w:
        for i in range(8):
            w.add(images, np.zeros((9, 4)), action, action, np.zeros(9), "Do it", task="x", seed=i, success=True, file_path="")
    return folder


def test_processes_and_micro_batches_do_not_change_training(same_episodes, data, tmp_path):
    args = ["--steps", 6, "--shift", 0, "--layers", 1, "--decoder-layers", 1, "--quantizer", "vq",
            *TINY]                                                                      # nsvq draws noise for each rank
    same = ["--data", same_episodes, "--val-fraction", 0.25]
    run("laq.py", *args, *same, "--out", tmp_path / "one")
    run("laq.py", *args, *same, "--out", tmp_path / "two", "--micro-batch", 2, processes=2)
    run("laq.py", *args, "--data", data, "--out", tmp_path / "whole")
    run("laq.py", *args, "--data", data, "--out", tmp_path / "pieces", "--micro-batch", 2)
    for a, b in (("one", "two"), ("whole", "pieces")):
        a, b = (metrics(tmp_path / x, "loss", "grad_norm") for x in (a, b))
        for key in a:
            np.testing.assert_allclose([*b[key].values()], [*a[key].values()], rtol=5e-3)


@pytest.mark.parametrize("stage", ["vla", "finetune"])
def test_torchrun(stage, data, stages, tmp_path):
    run(f"{stage}.py", *stage_args(stage, data, stages), "--steps", 3, "--out", tmp_path, processes=2)
    assert len(metrics(tmp_path, "loss")["loss"]) == 3
    assert (tmp_path / {"vla": "stage2", "finetune": "policy"}[stage] / "manifest.json").exists()
    if stage == "finetune":                                     # each rank goes on from its own place in the data
        places = torch.load(tmp_path / "last.pt", weights_only=True)["data"]
        assert [p["rank"] for p in places] == [0, 1]
        args = [*stage_args(stage, data, stages), "--steps", 3, "--out", tmp_path, "--resume", tmp_path / "last.pt"]
        run(f"{stage}.py", *args, processes=2)
        assert "was saved by 2 processes, these are 1" in run(f"{stage}.py", *args, check=False).stderr


def test_a_batch_can_be_overfitted(data, stages):
    """Each stage can learn eight samples by heart: model, loss and gradient belong together."""
    batch = next(iter(data_oxe.Loader(str(data), "metaworld_corner4", "train", 8, 64, chunk=8)))
    frames = torch.from_numpy(batch["frames"])
    torch.manual_seed(0)
    for quantizer in ({}, {"quantizer": "vq", "arch": "cnn"}, {"quantizer": "fsq", "arch": "cnn"},
                      {"quantizer": "vq", "ema": 0.9, "shared_codebook": True}):
        model, flow = laq_model(**quantizer), torch.from_numpy(laq.optical_flow(batch["frames"]))
        model.quantizer.reseed(model.features(frames), everything=True)
        before, seen = model(frames, flow, 1.0)[1]["pixel"], []

        def step():                                             # the loop of laq.py observes after each step
            if seen:
                model.quantizer.observe(*seen)
            loss, _, *seen[:] = model(frames, flow, 1.0)
            return loss
        overfit(model, step, 50)
        codes, vectors = model.encode(frames)
        assert model(frames, flow, 1.0)[1]["pixel"] < 0.7 * before, quantizer
        assert torch.allclose(vectors, model.quantizer.lookup(codes), atol=1e-6)
        assert len(codes.unique(dim=0)) > 4, "different pairs share their codes"
    trunk, tokenizer = vla.load_trunk("tiny", 16)
    tokens = vla.Tokens(tokenizer, 16)(batch["instruction"], "cpu")
    labeller, _, codebook = vla.load_labeller(str(stages / "laq/laq.pt2"), torch.device("cpu"))
    codes, _ = labeller(frames)
    model = vla.LatentPolicy(vla.Config(), trunk, codebook)
    overfit(model, lambda: model(frames[:, 0], *tokens, codes), 150)
    assert (model.predict(frames[:, 0], *tokens) == codes).float().mean() > 0.9
    stats = {"action_shift": torch.zeros(4), "action_scale": torch.full((4,), 2.0), "state_shift": torch.zeros(4),
             "state_scale": torch.ones(4)}
    actions, mask = torch.from_numpy(batch["actions"]), torch.from_numpy(batch["action_mask"])
    policy = finetune.Policy(finetune.Config(), finetune.load_trunk("tiny", 16)[0], stats)
    inputs = (frames[:, 0], torch.from_numpy(batch["state"]), *tokens)
    overfit(policy, lambda: policy(*inputs, actions, mask), 250)
    error = (policy.act(*inputs, torch.randn(actions.shape)) - actions)[mask].abs().mean()
    assert error < 0.3 * actions[mask].abs().mean()


def laq_model(**settings):
    cfg = laq.Config(**settings)
    laq.check(cfg)
    torch.manual_seed(0)
    return laq.LAQ(cfg, action_dim=4)


def overfit(model, loss_of, steps):
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 25)
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------ latent actions
@pytest.mark.parametrize("arch", ["vit", "cnn"])
def test_still_pairs_have_one_code_of_their_own(arch, data):
    frames = torch.from_numpy(next(iter(data_oxe.Loader(str(data), "metaworld_corner4", "train", 32, 64)))["frames"])
    model = laq_model(arch=arch)
    model.quantizer.reseed(model.features(frames), everything=True)
    still = model.encode(frames[:, :1].expand(-1, 2, -1, -1, -1))[0]
    assert len(still.unique(dim=0)) == 1 and len(model.encode(frames)[0].unique(dim=0)) > 8


def test_dead_codes_are_reseeded_and_used_ones_stay():
    quantizer, z = laq_model(codes=16).quantizer, torch.randn(64, 2, 256)
    before = quantizer.books.detach().clone()
    codes = torch.randint(0, 15, (64, 2))                                               # code 15 is never used
    for _ in range(100):
        quantizer.observe(z, codes)
    assert quantizer.reseed(z) == 2
    assert torch.equal(quantizer.books[:, :15], before[:, :15])
    assert all((quantizer.books[s, 15] == z[:, s]).all(1).any() for s in range(2))
    assert quantizer.reseed(z[:5], everything=True) == 10, "an output seeds one code at most"
    assert all(len(book.unique(dim=0)) == 16 for book in quantizer.books)


def test_augmentation_is_the_same_for_both_frames_and_their_flow():
    y, x = np.mgrid[:64, :64].astype(np.float32)
    scene = lambda dx: np.stack([128 + 60 * np.sin((x - dx) / 5 + i) * np.cos(y / 7) for i in range(3)], -1).astype(np.uint8)
    frames = np.stack([scene(0), scene(2)])[None].repeat(6, 0)
    flow = torch.from_numpy(laq.optical_flow(frames))
    assert flow[:, 0].median() == pytest.approx(0.5, abs=0.1) and flow[:, 1].abs().median() < 0.1     # 2 px are half a cell
    torch.manual_seed(0)
    cfg = laq.Config(shift=4, crop=0.4, color=0.2)
    frames, moved = laq.augment(torch.from_numpy(frames), flow, cfg)
    seen = torch.from_numpy(laq.optical_flow(frames.numpy()))
    assert frames.float().std(0).mean() > 5, "all samples alike"
    for a, b in zip(moved[:, 0], seen[:, 0]):
        assert a.median() == pytest.approx(b.median().item(), abs=0.12)
    still = laq.augment(frames[:, :1].expand(-1, 2, -1, -1, -1), flow, cfg)[0]
    assert torch.equal(still[:, 0], still[:, 1])


def test_metrics_tell_good_latents_from_bad_ones():
    rng = np.random.default_rng(0)
    motion = rng.standard_normal((400, 3))
    assert laq.r2(laq.ridge(motion[:200], motion[:200], motion[200:]), motion[200:]).min() > 0.99
    assert laq.r2(laq.ridge(rng.standard_normal((200, 3)), motion[:200], motion[200:]), motion[200:]).max() < 0.1
    assert laq.nmi(np.arange(400) % 4, np.arange(400) % 4) == pytest.approx(1)
    assert laq.nmi(rng.integers(0, 4, 400), np.arange(400) % 4) < 0.1
    x = torch.rand(2, 3, 32, 32)
    assert laq.ssim(x, x) == pytest.approx(torch.ones(2)) and laq.ssim(x, torch.rand_like(x)).max() < 0.2


def test_analysis(stages, tmp_path):
    p = run("laq.py", "--analyze", stages / "laq/last.pt", "--out", tmp_path)
    m = json.loads((tmp_path / "analysis/metrics.json").read_text())["metaworld_corner4"]
    assert {"transfer_cosine_to_metaworld_corner4", "nmi_instruction", "probe_direction_cosine", "probe_r2_random_quantizer",
            "token_entropy_given_action_octant", "psnr_reversed", "entropy_1"} <= set(m) and "report:" in p.stdout
    report = (tmp_path / "analysis/report.html").read_text()
    assert report.count("data:image/png") == 6 == len(list(tmp_path.glob("analysis/*.png"))) and "http" not in report


def test_further_targets_and_wandb(data, tmp_path):
    """Features of a frozen vision model and a few action labels, both with their part of the loss; logged offline."""
    from transformers import Dinov2Config, Dinov2Model
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)).save_pretrained(
        tmp_path / "dino")
    run("laq.py", "--data", data, "--out", tmp_path, "--steps", 3, *TINY, "--arch", "cnn", "--quantizer", "fsq", "--crop", 0.2,
        "--color", 0.2, "--features", tmp_path / "dino", "--action-fraction", 0.5, "--wandb")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    seen = metrics(tmp_path, "features", "action", "mfu", "data_wait")
    assert all(len(x) == 3 for x in seen.values()) and 0.5 < seen["features"][0] < 1.5 and max(seen["action"].values()) > 0
    batch = {"dataset": np.zeros(1000, int), "episode": np.arange(1000), "has_action": np.arange(1000) % 2 == 0}
    assert 15 < laq.labelled(laq.Config(action_fraction=0.05), batch).sum() < 35


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(data, tmp_path):
    p = run("laq.py", "--data", data, "--out", tmp_path, "--steps", 20, *TINY, "--save-every", 1, "--lr", 1e30, "--grad-clip",
            1e30, check=False)
    assert p.returncode == 1 and "at step" in p.stderr and "episodes [" in p.stderr and "Traceback" not in p.stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] > 0


# ------------------------------------------------------------------------------------------------ hand-over
def test_labeller_round_trip(data, stages, tmp_path):
    """The exported program gives the codes of the checkpoint; a changed file is refused."""
    program, manifest, codebook = vla.load_labeller(str(stages / "laq/laq.pt2"), torch.device("cpu"))
    frames = torch.from_numpy(next(iter(data_oxe.Loader(str(data), "metaworld_corner4", "val", 5, 64)))["frames"])
    model = laq_model()
    model.load_state_dict(torch.load(stages / "laq/last.pt", weights_only=True)["model"])
    codes, vectors = program(frames)
    assert torch.equal(codes, model.encode(frames)[0]) and codes.dtype == torch.int64
    assert torch.allclose(vectors, codebook[torch.arange(2), codes], atol=1e-6) and program(frames[:1])[0].shape == (1, 2)
    assert manifest["schema"] == "laq.v1" and manifest["horizon"]["metaworld_corner4"] == {"steps": 8, "seconds": 0.1}
    (tmp_path / "not.pt2").write_bytes(b"x")
    with pytest.raises(SystemExit, match="not a torch.export archive"):
        vla.load_labeller(str(tmp_path / "not.pt2"), torch.device("cpu"))
    run("laq.py", "--data", data, "--out", tmp_path, "--steps", 30, *TINY, "--resume", stages / "laq/last.pt", "--export-only")
    again, _, _ = vla.load_labeller(str(tmp_path / "laq.pt2"), torch.device("cpu"))
    assert torch.equal(again(frames)[0], codes)


def test_pretrained_trunk_by_name(tmp_path):
    """A SmolVLM2 folder loads with its weights, cut to fewer layers; a folder without weights is an error."""
    trunk, tokenizer = vla.load_trunk("tiny", 16)
    from transformers import SmolVLMForConditionalGeneration
    whole = SmolVLMForConditionalGeneration(trunk.vlm.config)
    whole.save_pretrained(tmp_path / "hub/trunk")
    tokenizer.save_pretrained(tmp_path / "hub/tokenizer")
    loaded, _ = vla.load_trunk(str(tmp_path / "hub/trunk"), 1, str(tmp_path / "hub/tokenizer"))
    assert len(loaded.vlm.text_model.layers) == 1
    projection = lambda m: m.connector.modality_projection.proj.weight
    assert torch.equal(projection(loaded.vlm), projection(whole.model))
    (tmp_path / "hub/trunk/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="no pretrained SmolVLM2"):
        vla.load_trunk(str(tmp_path / "hub/trunk"), 1, str(tmp_path / "hub/tokenizer"))


def test_stage2_reaches_the_policy(data, stages):
    """finetune starts from vla's very trunk and readout, and policy.pt2 acts as the checkpoint does."""
    state = torch.load(stages / "vla/last.pt", weights_only=True)["model"]
    trunk, _, manifest = finetune.load_stage2(finetune.Config(init=str(stages / "vla/stage2")))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, state[f"trunk.{name}"]), name
    assert manifest["labeller"]["schema"] == "laq.v1"
    saved = torch.load(stages / "ft/last.pt", weights_only=True)
    stats = {k: saved["model"][k] for k in ("action_shift", "action_scale", "state_shift", "state_scale")}
    policy = finetune.Policy(finetune.Config(**saved["config"]), trunk, stats)
    policy.load_state_dict(saved["model"])
    program = torch.export.load(stages / "ft/policy/policy.pt2").module()
    example = (torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8), torch.randn(3, 4), torch.ones(3, 32, dtype=torch.long),
               torch.ones(3, 32, dtype=torch.long), torch.randn(3, 8, 4))
    torch.testing.assert_close(program(*example), policy.act(*example), rtol=1e-3, atol=1e-4)
    dark = (torch.zeros_like(example[0]), *example[1:])
    assert not torch.allclose(program(*dark), program(*example))
    policy.cfg.blind = True
    assert torch.equal(policy.act(*dark), policy.act(*example))


# ------------------------------------------------------------------------------------------------ closed loop
def test_rollout(stages, tmp_path):
    args = ["--policy", stages / "ft/policy", "--episodes", 2, "--max-steps", 24, "--tasks", *TASKS]
    run("rollout.py", *args, "--out", tmp_path / "a")
    r = json.loads((tmp_path / "a/results.json").read_text())
    assert r["tasks"]["all"]["episodes"] == 4 and 0 <= r["tasks"]["all"]["low"] <= r["tasks"]["all"]["high"] <= 1
    assert min(e["seed"] for e in r["episodes"]) >= 1_000_000_000                       # recording stays below
    assert all((tmp_path / f"a/{t}.gif").stat().st_size > 1000 for t in TASKS)
    run("rollout.py", *args, "--out", tmp_path / "b", processes=2)
    assert json.loads((tmp_path / "b/results.json").read_text())["episodes"] == r["episodes"]    # reproducible
    p = run("rollout.py", "--compare", f"x={tmp_path}/a", f"y={tmp_path}/b", "--out", tmp_path)
    assert "drawer-open (2)" in p.stdout and set(json.loads((tmp_path / "results.json").read_text())) == {"x", "y"}


# ------------------------------------------------------------------------------------------------ errors and shape
@pytest.mark.parametrize("script, args, says", [
    ("laq.py", ["--mix", "brigde"], "unknown dataset 'brigde'"),
    ("laq.py", ["--data", "/nowhere"], "no dataset at '/nowhere/metaworld_corner4/1.0.0'"),
    ("laq.py", ["--mix", "bridge", "--data", "DATA"], "no step feature 'observation/natural_language_instruction'"),
    ("laq.py", ["--data", "DATA", "--image-size", "50"], "--image-size 50"),
    ("laq.py", ["--data", "DATA", "--quantizer", "fsq", "--levels", "5", "3"], "make 15 codes, --codes is 64"),
    ("laq.py", ["--data", "DATA", "--size", "huge"], "--size 'huge' is none of tiny, base, lapa"),
    ("laq.py", ["--data", "DATA", "--features", "/nowhere"], "--features '/nowhere'"),
    ("laq.py", ["--data", "DATA", "--flow-teacher", "raft"], "--flow-teacher raft needs torchvision"),
    ("laq.py", ["--data", "DATA", "--val-fraction", "0"], "no episodes left in split 'val'"),
    ("laq.py", ["--resume", "/nowhere.pt"], "/nowhere.pt"),
    ("vla.py", ["--laq-ckpt", "/nowhere.pt2"], "no labeller at --laq-ckpt '/nowhere.pt2'"),
    ("vla.py", ["--laq-ckpt", "LAQ", "--trunk", "Org/absent"], "no pretrained SmolVLM2 at 'Org/absent'"),
    ("finetune.py", ["--init", "/nowhere"], "no stage2 folder at --init '/nowhere'"),
    ("finetune.py", ["--data", "DATA", "--init", "none", "--episodes-per-task", "50"], "fewer than 50 training episodes"),
    ("rollout.py", ["--tasks", "open-sesame"], "unknown task 'open-sesame'"),
    ("rollout.py", ["--policy", "/nowhere"], "no policy at '/nowhere'"),
    ("rollout.py", ["--record", "--data", "DATA"], "exists already"),
])
def test_user_errors_are_one_line(script, args, says, data, stages, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    (source / "metaworld_corner4").symlink_to(data / "metaworld_corner4")
    (source / "bridge").mkdir()
    (source / "bridge/0.1.0").symlink_to(data / "metaworld_corner4/1.0.0")              # a wrong schema under bridge's name
    args = [str(source) if a == "DATA" else str(stages / "laq/laq.pt2") if a == "LAQ" else a for a in args]
    module = {"laq.py": laq, "vla.py": vla, "finetune.py": finetune, "rollout.py": rollout}[script]
    with pytest.raises(SystemExit) as error:                                            # a message: exit code 1, no traceback
        module.main(tyro.cli(module.Config, args=[*args, "--out", str(tmp_path / "out")]))
    assert says in error.value.code and "\n" not in error.value.code
    assert not [x for x in tmp_path.rglob("*") if x.is_file() and source not in x.parents]


def test_errors_exit_with_one_and_no_traceback(tmp_path):
    p = run("vla.py", "--laq-ckpt", "/nowhere.pt2", "--out", tmp_path, check=False)
    assert p.returncode == 1 and p.stderr.strip().splitlines()[-1].startswith("vla: no labeller") and "Traceback" not in p.stderr


def test_world_size_must_divide_the_batch(data, tmp_path):
    p = run("laq.py", "--data", data, "--batch-size", 9, "--out", tmp_path, processes=2, check=False)
    assert p.returncode == 1 and "--batch-size 9 is not divisible by the 2 processes; 8 would be" in p.stderr


def test_stages_share_text_and_import_nothing_of_each_other():
    trees = {n: ast.parse((ROOT / f"{n}.py").read_text()) for n in ("laq", "vla", "finetune", "rollout")}
    seen = {}
    for name, tree in trees.items():
        imports = {a.name for x in ast.walk(tree) if isinstance(x, ast.Import) for a in x.names} | \
                  {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
        assert not imports & (set(trees) - {name}), name
        for node in tree.body:
            own = {"main", "evaluate", "export", "describe", "Config"}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in own:
                other = seen.setdefault(node.name, (name, ast.unparse(node)))
                assert other[1] == ast.unparse(node), f"{node.name} differs between {other[0]}.py and {name}.py"
            if isinstance(node, ast.ClassDef) and node.name == "Config" and name != "rollout":
                for field, text in zip(node.body[::2], node.body[1::2]):
                    value = (ast.unparse(field.annotation), ast.unparse(text))
                    other = seen.setdefault(f"Config.{field.target.id}", (name, value))
                    assert other[1] == value, f"{field.target.id}: {other} and {name} {value}"
    assert sum(1 for n in seen if not n.startswith("Config.")) > 25
