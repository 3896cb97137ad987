"""The loop: the real scripts, tiny, on CPU, offline. Each test fails for a reason that a user would
notice."""
import ast
import io
import itertools
import json
import os
import shlex
import signal
import time
import tokenize
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import tyro
from common import (ROOT, TASKS, TINY, expert_pictures, fake_episodes, metrics, run, run_here,
                    stage_args, start)

import data_oxe
import finetune
import laq
import rollout
import vla


# ------------------------------------------------------------ data
def test_recorded_dataset_reads_with_tfds(data):
    builder = tfds.builder_from_directory(str(data / "metaworld_corner4/1.0.0"))
    episodes = list(builder.as_dataset(split="train"))
    assert len(episodes) == 12
    metadata = episodes[0]["episode_metadata"]
    assert set(metadata) == {"task", "seed", "success", "file_path"} and bool(metadata["success"])
    steps = list(episodes[0]["steps"].as_numpy_iterator())
    assert set(steps[0]) == {"observation", "action", "executed_action", "language_instruction",
                             "reward", "discount", "is_first", "is_last", "is_terminal"}
    image = steps[0]["observation"]["image"]
    assert image.shape == (64, 64, 3) and image.std() > 10
    assert steps[0]["is_first"] and not steps[1]["is_first"]
    assert steps[-1]["is_last"] and steps[-1]["is_terminal"]
    push = np.stack([s["executed_action"] - s["action"] for s in steps])
    assert 0.01 < np.abs(push)[:, :3].mean() < 0.5


def test_batches_hold_what_was_recorded(data):
    """Frames, chunks and sums of the contract, against the same episodes read by TFDS."""
    cfg = data_oxe.DataConfig(data=str(data), val_fraction=0.2)
    loader = data_oxe.Loader(cfg, "train", 16, 64, chunk=8)
    batch = next(iter(loader))
    counts = {"recorded": 12, "train": 10, "val": 2, "used": 10}
    assert loader.counts["metaworld_corner4"] == counts
    builder = tfds.builder_from_directory(str(data / "metaworld_corner4/1.0.0"))
    episodes = list(builder.as_dataset(split="train", shuffle_files=False))
    for i in range(16):
        steps = list(episodes[batch["episode"][i]]["steps"].as_numpy_iterator())
        t = batch["step"][i]
        images = [steps[t]["observation"]["image"], steps[t + 8]["observation"]["image"]]
        assert np.array_equal(batch["frames"][i], images)
        assert batch["instruction"][i] == steps[0]["language_instruction"].decode()
        n = min(8, len(steps) - t)
        assert batch["action_mask"][i].sum() == n
        actions = [s["executed_action"] for s in steps[t:t + n]]        # not what was commanded
        np.testing.assert_allclose(batch["actions"][i, :n], actions, atol=1e-6)
        total = np.sum([s["executed_action"] for s in steps[t:t + 8]], 0)
        np.testing.assert_allclose(batch["action_sum"][i, :3], total[:3], atol=1e-4)
        assert batch["action_sum"][i, 3] == pytest.approx(steps[t + 7]["executed_action"][3])
        np.testing.assert_allclose(batch["state"][i], steps[t]["observation"]["state"])


# ------------------------------------------------------------ training loops
def test_signals_leave_a_checkpoint_and_runs_are_not_overwritten(data, tmp_path):
    """SIGTERM as torchrun and Slurm send it, twice; then what may be done with the run."""
    args = ["--data", data, "--steps", 5000, *TINY]
    process = start("laq.py", *args, "--out", tmp_path)
    log = tmp_path / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "--resume" in err and "Traceback" not in err
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 2
    before = log.read_text()
    for says, more in {
            "steps was 5000, is 6000": ["--steps", 6000, "--resume", tmp_path / "last.pt"],
            "goes on in its own folder": ["--resume", tmp_path / "last.pt", "--out", "elsewhere"],
            "holds a run; continue it with --resume": ["--out", tmp_path]}.items():
        with pytest.raises(SystemExit, match=says):
            run_here("laq.py", *args, *more)
        assert log.read_text() == before
    run_here("laq.py", "--data", data, *TINY, "--steps", 2, "--out", tmp_path, "--overwrite")
    assert list(metrics(tmp_path, "loss")["loss"]) == [0, 1]


def test_micro_batches_do_not_change_training(data, tmp_path):
    args = ["--steps", 6, "--shift", 0, "--quantizer", "vq", *TINY]     # nsvq: noise for each piece
    run_here("laq.py", *args, "--data", data, "--out", tmp_path / "whole")
    run_here("laq.py", *args, "--data", data, "--out", tmp_path / "pieces", "--micro-batch", 2)
    a, b = (metrics(tmp_path / x, "loss", "pixel", "grad_norm") for x in ("whole", "pieces"))
    for key in a:
        np.testing.assert_allclose([*b[key].values()], [*a[key].values()], rtol=5e-3)


def test_torchrun(data, stages, tmp_path):
    args = [*stage_args("finetune", data, stages), "--out", tmp_path, "--steps", 3,
            "--keep-every", 2, "--scratch", tmp_path / "disk"]
    run("finetune.py", *args, processes=2)
    assert len(metrics(tmp_path, "loss", "samples_per_s", "data_wait", "mfu")["mfu"]) == 3
    assert (tmp_path / "policy/manifest.json").exists()
    assert {path.name for path in tmp_path.glob("*.pt")} >= {"last.pt", "step_00000002.pt"}
    places = torch.load(tmp_path / "last.pt", weights_only=True)["data"]
    assert [[p["rank"] for p in both] for both in places] == [[0, 0], [1, 1]]
    disk = tmp_path / "disk" / f"nanolapa_{(tmp_path / 'run_id').read_text()}"
    disk.mkdir(parents=True)                                # as if the node had died at the end
    (tmp_path / "last.pt").rename(disk / "last.pt")
    (tmp_path / "best.pt").unlink()
    run("finetune.py", *args, "--resume", "auto", processes=2)
    assert (tmp_path / "step_00000003.pt").exists() and (tmp_path / "last.pt").exists()


def test_ranks_that_fail_end_the_job(same_episodes, tmp_path):
    """A data error after the processes have met: one line, and no rank waits for the others."""
    p = run("laq.py", "--data", same_episodes, "--steps", 3, *TINY, "--out", tmp_path,
            "--mix", "metaworld_corner3", processes=2, check=False)
    lines = p.stderr.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("data_oxe: unknown dataset")]
    assert p.returncode and said and not any("Traceback" in line for line in lines[:said[-1] + 1])


@pytest.mark.parametrize("quantizer", ["nsvq", "fsq"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(quantizer, data, tmp_path):
    with pytest.raises(SystemExit, match=r"gradient norm (nan|inf) at step .*, episodes \["):
        run_here("laq.py", "--data", data, "--out", tmp_path, "--steps", 20, *TINY, "--lr", 1e30,
                 "--grad-clip", 1e30, "--warmup-steps", 0, "--save-every", 1, "--log-every", 10,
                 "--quantizer", quantizer)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    finite = all(torch.isfinite(x).all() for x in state["model"].values())
    assert state["step"] > 0 and (finite or quantizer == "fsq")         # whose moments overflow


def test_learning_rate_falls_to_its_share():
    cfg = laq.Config(size="base", steps=5000, final_lr=0.05)
    laq.check(cfg)
    rates = [laq.lr_at(cfg, step) for step in range(5001)]
    assert max(rates) == rates[1000] == 1e-4 and rates[0] == pytest.approx(1e-7)
    assert rates[5000] == pytest.approx(5e-6) and rates[1000:] == sorted(rates[1000:], reverse=True)


def test_speed_is_of_training_alone(tmp_path, monkeypatch):
    """At every line, the first too; validations and checkpoints take no part."""
    now = [0.0]
    monkeypatch.setattr(laq.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(laq, "matmul_rate", lambda device, dtype: 5.0)
    cfg = laq.Config(out=str(tmp_path), steps=5, batch_size=10, log_every=2)
    laq.check(cfg)
    log = laq.Logger(cfg, rank=0, world=2, start=0, flops=2, device=torch.device("cpu"))
    for step in range(5):
        with log.paused():
            now[0] += 100
        with log.waiting():
            now[0] += 1
        with log.waiting("label_wait"):
            now[0] += 2
        now[0] += 1
        log.step(step, {"grad_norm": torch.tensor(1.0)}, {"episode": np.zeros(10)})
    seen = metrics(tmp_path, "samples_per_s", "data_wait", "label_wait", "mfu")
    assert list(seen["mfu"]) == [0, 2, 4]
    assert {key: set(values.values()) for key, values in seen.items()} == {
        "samples_per_s": {2.5}, "data_wait": {0.25}, "label_wait": {0.5}, "mfu": {0.5}}


# ------------------------------------------------------------ closed loop
def test_an_expert_that_fails_costs_one_episode(tmp_path, monkeypatch, capsys):
    cfg = rollout.Config(record=True, data=str(tmp_path), episodes=3, tasks=tuple(TASKS))
    rollout.check(cfg)

    def record(folder, fails):
        cfg.data = str(tmp_path / folder)
        monkeypatch.setattr(rollout, "run_episodes", fake_episodes(fails))
        rollout.record(cfg)
        return capsys.readouterr()
    out, err = record("one", lambda task, seed: task == TASKS[1] and seed % 3 == 1)
    assert "recorded 5 of 6 episodes" in out and "failed at 'faucet-close'" in err
    builder = tfds.builder_from_directory(str(tmp_path / "one/metaworld_corner4/1.0.0"))
    assert builder.info.splits["train"].num_examples == 5
    assert "succeeded at 0 of 60 starts of 'faucet-close' (0.00), so it has 0 of 3 episodes" in \
        record("other", lambda task, seed: task == TASKS[1]).err
    with pytest.raises(SystemExit, match="succeeded at none of drawer-open, faucet-close; lower"):
        record("none", lambda task, seed: True)
    assert not [*Path(cfg.data).rglob("*.json")]


def test_a_distraction_is_of_its_seed_and_step_alone():
    """Recordings and evaluations are reproducible, at every size the same."""
    rng = np.random.default_rng(0)
    large = cv2.resize(rng.integers(0, 255, (5, 5, 3), np.uint8), (128, 128))
    image, background = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA), np.eye(64) == 0
    assert np.array_equal(rollout.Distraction((3,), 0.0)(image, background, 7), image)
    first = rollout.Distraction((3,), 1.0)
    pictures = [first(image, background, step) for step in range(20)]
    assert np.array_equal(rollout.Distraction((3,), 1.0)(image, background, 7), pictures[7])
    changes = np.abs(np.diff(np.int64(pictures), axis=0)).mean((1, 2, 3))
    assert changes.min() > 0.5
    other = rollout.Distraction((4,), 1.0)(image, background, 7)
    assert np.abs(other - 1.0 * pictures[7]).mean() > 10
    kept = first.paint(image, background, 7)[~background]
    assert np.array_equal(kept, image[~background])
    all_over = np.ones((128, 128), bool)
    small = first(image, all_over[:64, :64], 7)
    its = cv2.resize(first(large, all_over, 7), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(small - 1.0 * its)[4:-4, 4:-4].mean() < 2


def test_the_background_holds_neither_robot_nor_object():
    task = "button-press-topdown"
    jobs = {(0, task, 3): (expert_pictures, task, 3, (0, 30, 60))}
    (_, seen), = rollout.run_episodes(jobs, None, 1)
    images, backgrounds = seen["images"], seen["backgrounds"]
    assert np.array_equal(seen["last"], images[-1])         # level 0: the clean picture
    r, g, b = np.moveaxis(images.astype(int), -1, 0)
    robot, button = r > 3 * np.maximum(g, b) + 20, np.minimum(r, g) > 2 * b + 20
    assert robot.mean() > 0.03 and button.mean() > 0.005 and 0.5 < backgrounds.mean() < 0.95
    assert not (backgrounds & (robot | button)).any()
    still = backgrounds.all(0)
    assert np.array_equal(images[0][still], images[-1][still])


def test_a_distracted_recording_is_read_and_its_camera_known(stages, tmp_path, monkeypatch):
    cfg = rollout.Config(record=True, data=str(tmp_path), episodes=2, tasks=("drawer-open",),
                         distract=0.29, workers=1)
    rollout.check(cfg)
    rollout.record(cfg)
    name = "metaworld_corner4_distract29"
    cfg = data_oxe.DataConfig(data=str(tmp_path), mix=f"{name}:1", val_fraction=0.5)
    batch = next(iter(data_oxe.Loader(cfg, "train", 16, 64, chunk=8)))
    corners = batch["frames"][:, 0, -8:, -8:].astype(int)   # table, which stands still when clean
    assert np.abs(corners - corners[0]).mean() > 2
    spec = json.loads((stages / "ft/policy/manifest.json").read_text())
    spec.update(datasets={name: 64}, units_of=name)
    (tmp_path / "manifest.json").write_text(json.dumps(spec))
    monkeypatch.setattr(rollout, "open_program", lambda path: None)
    spec = rollout.load_manifest(str(tmp_path), rollout.Config())
    assert (spec["camera"], spec["source_size"]) == ("corner4", 64)


def test_pictures_are_resized_as_the_loader_does():
    """A policy must see what it learned from."""
    rng = np.random.default_rng(0)
    for size, how in itertools.product((64, 48, 96, 20), ("cpu", "gpu")):
        image = cv2.resize(rng.integers(0, 255, (9, 9, 3), np.uint8), (64, 64))
        mine = rollout.as_loaded(image, {"image_size": size, "config": {"resize": how}})
        its = data_oxe.resize_to(torch.from_numpy(image), size).numpy()
        if how == "cpu":
            encoded = data_oxe.tf.io.encode_png(image)
            its = data_oxe.decode_picture(encoded, size, 64, False).numpy()
        assert np.abs(mine.astype(int) - its).max() <= 1, (size, how)


# ------------------------------------------------------------ errors and shape
@pytest.mark.parametrize("script, args, says", [
    ("laq.py", ["--mix", "brigde"], "unknown dataset 'brigde'"),
    ("laq.py", ["--data", "/nowhere"], "record it: python rollout.py --record --data /nowhere"),
    ("laq.py", ["--data", "/nowhere", "--mix", "bridge"], "no dataset at '/nowhere/bridge/0.1.0'"),
    ("laq.py", ["--mix", "bridge", "--data", "DATA"],
     "no step feature 'observation/natural_language_instruction'"),
    ("laq.py", ["--data", "DATA", "--image-size", "50"], "--image-size 50 must be a multiple of 8"),
    ("laq.py", ["--data", "DATA", "--quantizer", "fsq", "--levels", "5", "3"],
     "make 15 codes, --codes is 64"),
    ("laq.py", ["--parallel", "fsdp", "--arch", "cnn"], "--arch cnn has none; give --parallel ddp"),
    ("laq.py", ["--data", "DATA", "--final-lr", "2"], "--final-lr 2.0 is a share"),
    ("laq.py", ["--data", "DATA", "--features", "/nowhere"], "--features '/nowhere'"),
    ("laq.py", ["--data", "DATA", "--flow-teacher", "raft"], "raft needs torchvision"),
    ("laq.py", ["--data", "DATA", "--val-fraction", "0"], "no episodes left in split 'val'"),
    ("laq.py", ["--steps", "-2"], "--steps -2 must be at least 0"),
    ("laq.py", ["--tokens", "0"], "--tokens 0 must be at least 1"),
    ("laq.py", ["--resume", "/nowhere.pt"], "/nowhere.pt"),
    ("laq.py", ["--resume", "NOT"], "is not a checkpoint of this script"),
    ("vla.py", ["--laq-ckpt", "/nowhere.pt2"], "no labeller at --laq-ckpt '/nowhere.pt2'"),
    ("vla.py", ["--laq-ckpt", "LAQ", "--trunk", "Org/absent"],
     "no pretrained SmolVLM2 at 'Org/absent'"),
    ("vla.py", ["--laq-ckpt", "pooled", "--targets", "codes"],
     "pooled has no codes; give --targets vectors"),
    ("vla.py", ["--mode", "actions", "--null", "frame"], "--null frame is a control of latents"),
    ("vla.py", ["--laq-ckpt", "pooled", "--null", "permuted", "--batch-size", "1"],
     "--batch-size 1 leaves each process one; give at least 2"),
    ("vla.py", ["--laq-ckpt", "pooled", "--plain-prompt"], "--trunk tiny has no chat and always"),
    ("finetune.py", ["--data", "DATA", "--init", "none", "--trunk", "Org/absent",
                     "--text-layers", "0"], "--text-layers 0 must be at least 1"),
    ("vla.py", ["--laq-ckpt", ""], "--mode latent_flow needs --laq-ckpt"),
    ("vla.py", ["--laq-ckpt", "pooled", "--mode", "head"],
     "pooled has no codes, which --mode head predicts"),
    ("vla.py", ["--mode", "vq"], "unknown --mode 'vq'; there are latent_flow, head, codes, act"),
    ("vla.py", ["--parallel-decode"], "is a way to predict --mode codes, this is --mode latent_fl"),
    ("vla.py", ["--shrink"], "which can only be random; give --random-init too"),
    ("vla.py", ["--steps", "-2"], "--steps -2 must be at least 0"),
    ("vla.py", ["--text-len", "0"], "--text-len 0 must be at least 1"),
    ("vla.py", ["--lora-rank", "-1"], "--lora-rank -1 must be at least 0"),
    ("vla.py", ["--head-width", "0"], "--head-width 0 must be at least 1"),
    ("vla.py", ["--latent-weight", "-1"], "--latent-weight -1.0 must be at least 0"),
    ("vla.py", ["--action-weight", "-1"], "--action-weight -1.0 must be at least 0"),
    ("vla.py", ["--latent-chunk", "0"], "--latent-chunk 0 must be at least 1"),
    ("vla.py", ["--mode", "actions", "--latent-chunk", "2"], "--mode actions needs 1"),
    ("vla.py", ["--chunk", "0"], "--chunk 0 must be at least 1"),
    ("vla.py", ["--mode", "head", "--targets", "codes"],
     "--targets codes are those of latents, which --mode head does not learn; leave it out"),
    ("finetune.py", ["--init", "none", "--steps", "-2"], "--steps -2 must be at least 0"),
    ("finetune.py", ["--init", "none", "--head-width", "0"], "--head-width 0 must be at least 1"),
    ("finetune.py", ["--init", "/nowhere"], "no stage2 folder at --init '/nowhere'"),
    ("finetune.py", ["--data", "DATA", "--init", "none", "--episodes-per-task", "50"],
     "fewer than 50 training episodes"),
    ("finetune.py", ["--init", "none", "--laq-ckpt", "pooled", "--targets", "codes"],
     "pooled has no codes; give --targets vectors"),
    ("finetune.py", ["--init", "none", "--video", "bridge"], "--video 'bridge' needs --laq-ckpt"),
    ("finetune.py", ["--data", "DATA", "--init", "none", "--laq-ckpt", "pooled", "--video-share",
                     "1"], "--video-share 1.0 of 32 samples a process is 32 of video"),
    ("rollout.py", ["--tasks", "open-sesame"], "unknown task 'open-sesame'"),
    ("rollout.py", ["--policy", "/nowhere"], "no policy at '/nowhere'"),
    ("rollout.py", ["--camera", "ceiling"], "unknown camera 'ceiling'"),
    ("rollout.py", ["--distract", "1.5"], "--distract 1.5 must be in 0..1"),
    ("rollout.py", ["--record", "--data", "DATA"], "exists already"),
])
def test_user_errors_are_one_line(script, args, says, data, stages, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    recorded = data / "metaworld_corner4"
    (source / "metaworld_corner4").symlink_to(recorded)
    (source / "bridge").mkdir()
    (source / "bridge/0.1.0").symlink_to(recorded / "1.0.0")            # a wrong schema
    (source / "not.pt").write_text("not a checkpoint")
    words = {"DATA": str(source), "LAQ": str(stages / "laq/laq.pt2"), "NOT": str(source / "not.pt")}
    args = [words.get(a, a) for a in args]
    if "--resume" not in args:
        args += ["--out", str(tmp_path / "out")]
    module = {"laq.py": laq, "vla.py": vla, "finetune.py": finetune, "rollout.py": rollout}[script]
    if words["NOT"] in args:
        args += ["--data", str(source)]
    with pytest.raises(SystemExit) as error:                # a message: exit code 1, no traceback
        module.main(tyro.cli(module.Config, args=args))
    assert says in error.value.code and "\n" not in error.value.code
    assert not [x for x in tmp_path.rglob("*") if x.is_file() and source not in x.parents]


def test_errors_exit_with_one_and_no_traceback(tmp_path):
    p = run("vla.py", "--laq-ckpt", "/nowhere.pt2", "--out", tmp_path, check=False)
    assert p.returncode == 1 and "Traceback" not in p.stderr
    assert p.stderr.strip().splitlines()[-1].startswith("vla: no labeller")


@pytest.mark.parametrize("stage", [laq, vla])
def test_analyses_are_of_one_process(stage, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="run --analyze in one process"):
        stage.analyze(stage.Config(analyze="last.pt"))


def test_what_has_a_least_number_is_a_setting():
    names = set().union(*map(fields_of, ("laq", "vla", "finetune")))
    assert set(laq.LEAST) <= names


def test_world_size_must_divide_the_batch():
    with pytest.raises(SystemExit, match="9 is not divisible by the 2 processes; 8 would be"):
        laq.check_run(laq.Config(batch_size=9), world=2)


@pytest.mark.parametrize("stage", [laq, vla, finetune])
def test_slurm_scripts_give_options_that_exist(stage):
    """And pass on those of the command line, which win."""
    text = (ROOT / f"sbatch/{stage.__name__}.sh").read_text()
    words = shlex.split(text.partition(f"launch {stage.__name__}.py ")[2].replace("\\\n", " "))
    assert words.pop() == "$@" and words[:2] == ["--resume", "auto"]
    cfg = tyro.cli(stage.Config, args=[*words, "--batch-size", "8", "--resume", "x/last.pt"])
    assert cfg.batch_size == 8 and cfg.resume == "x/last.pt" and cfg.dtype == "bfloat16"
    stage.check(cfg, *[{}] * (stage is finetune))
    if stage is not finetune:
        assert (cfg.lr, cfg.warmup_steps) == (1e-4, 1000)


def fields_of(name):
    """Config's fields of a script as {name: (type, comment)}: the comment is tyro's help text."""
    text = (ROOT / f"{name}.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    config, = [n for n in ast.parse(text).body if getattr(n, "name", "") == "Config"]
    return {n.target.id: (ast.unparse(n.annotation), comments.get(n.lineno))
            for n in config.body if isinstance(n, ast.AnnAssign)}


def test_stages_share_text_and_import_nothing_of_each_other():
    names = ("laq", "vla", "finetune", "rollout")
    trees = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in names}
    own = {"main", "evaluate", "export", "describe", "Config", "check", "run", "to_inputs",
           "flops_a_sample", "report_card", "collect", "make_model", "analyze", "find",
           "Findings"}
    seen, shared = {}, set()
    for name, tree in trees.items():
        imports = {a.name for x in ast.walk(tree) if isinstance(x, ast.Import) for a in x.names}
        imports |= {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
        assert not imports & (set(names) - {name}), name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in own:
                first, text = seen.setdefault(node.name, (name, ast.unparse(node)))
                assert text == ast.unparse(node), f"{node.name} differs in {first}.py and {name}.py"
                shared |= {node.name} if first != name else set()
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
                constant = ast.unparse(node.targets[0])
                first, text = seen.setdefault(constant, (name, ast.unparse(node)))
                assert text == ast.unparse(node), f"{constant} differs in {first}.py and {name}.py"
    assert len(shared) > 20
    seen = {}
    for name in ("laq", "vla", "finetune"):
        for field, value in fields_of(name).items():
            first, other = seen.setdefault(field, (name, value))
            assert other == value, f"--{field} differs in {first}.py and {name}.py"
            assert value[1], f"--{field} of {name}.py has no help"


@pytest.mark.parametrize("name", ["laq", "vla", "finetune", "rollout", "data_oxe"])
def test_a_script_can_be_read(name):
    text = (ROOT / f"{name}.py").read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    assert max(map(len, lines)) <= 100
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 70
    if name != "data_oxe":
        main, = [n for n in tree.body if getattr(n, "name", "") == "main"]
        assert main.lineno <= 0.65 * len(lines), "what must be understood comes first"
