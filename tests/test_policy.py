"""vla.py and finetune.py: trunk, heads, hand-over files and their faults, tiny, on CPU, offline."""
import contextlib
import copy
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import tyro
from common import TINY, OnlyMeta

import data_oxe
import finetune
import laq
import rollout
import test_pt2
import vla
from test_laq import loader_of, model_of, overfit


def batch_of(device, n=8, datasets=1):
    """What to_inputs of both stages gives, of zeros."""
    with torch.device(device):
        number = torch.zeros(n, dtype=torch.int64)
        return {"images": torch.zeros(n, 64, 64, 3, dtype=torch.uint8),
                "codes": number.view(n, 1) + 1, "latents": torch.zeros(n, 1, 16),
                "ids": number[:, None].expand(n, 16), "mask": number[:, None].expand(n, 16) + 1,
                "state": torch.zeros(n, 4), "actions": torch.zeros(n, 8, 4), "dataset": number,
                "action_mask": torch.ones(n, 8, dtype=torch.bool), "chunk": torch.zeros(n, 8, 4),
                "weight": torch.ones(n, 8), "is_video": number > 0, "has_action": number == 0}


def word_tokenizer():
    """As a SmolVLM2 folder holds one, but of two words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"go": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


def stats_of(datasets=1):
    return {f"{x}_{y}": torch.full((datasets, 4), float(y == "scale"))
            for x in ("action", "state") for y in ("offset", "scale")}


# ------------------------------------------------------------ models
def test_stage_2_can_learn_a_batch_by_heart(data, stages):
    """Predictions are of the target's own samples: real pairs, real labels."""
    device = torch.device("cpu")
    labeller = vla.load_labeller(str(stages / "laq/laq.pt2"), device)
    cfg = vla.Config(eval_batches=1)
    loader = loader_of(data, "train", 8, chunk=8)
    tensors = data_oxe.to_device(next(iter(loader)), device, 64)
    torch.manual_seed(0)
    trunk, tokenizer = vla.load_trunk(cfg)
    model = vla.make_model(cfg, trunk, labeller, loader, device)
    inputs = vla.to_inputs(tensors, cfg, labeller, trunk, vla.Tokens(tokenizer, 16), device)
    overfit(model, lambda: model(inputs)["flow"], 150)
    with torch.no_grad():
        (truth, _), (_, prediction) = model.target(inputs), model.predict(inputs)
    error = (prediction - truth).square().mean()
    assert error < 0.4 * (truth - truth.mean(0)).square().mean()


def test_a_policy_can_learn_a_batch_by_heart(data):
    torch.manual_seed(0)
    batch, device = next(iter(loader_of(data, "train", 8, chunk=8))), torch.device("cpu")
    trunk, tokenizer = finetune.load_trunk(finetune.Config())
    stats = stats_of() | {"action_scale": torch.full((1, 4), 2.0)}
    policy = finetune.Policy(finetune.Config(), trunk, stats)
    tensors, tokens = data_oxe.to_device(batch, device, 64), finetune.Tokens(tokenizer, 16)
    inputs = finetune.to_inputs(tensors, policy, tokens, device)
    overfit(policy, lambda: policy(inputs)["labelled"], 150)
    actions, mask = tensors["actions"], tensors["action_mask"]
    error = (policy.act(inputs) - actions)[mask].abs().mean()
    assert error < 0.3 * actions[mask].abs().mean()


def test_a_step_is_of_one_device_and_stands_bfloat16(monkeypatch):
    """What a GPU would see, in two halves: the step on a device of its own, and autocast."""
    for device in ("cpu", "meta"):
        with torch.device(device):
            trunk = finetune.Trunk(finetune.SmolVLMModel(finetune.tiny_config()))
            model = finetune.Policy(finetune.Config(laq_ckpt="x"), trunk, stats_of())
        batch = batch_of(device)
        with OnlyMeta(monkeypatch) if device == "meta" else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = sum(model(batch).values())
            loss.backward()
            out = model.act(batch)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) > 40 and all(g.device.type == device for g in grads)
        assert out.device.type == device and loss.dtype == torch.float32


def test_labeller_moves_to_another_device(stages):
    """As to a GPU: every start of vla.py there depends on it."""
    labeller = vla.load_labeller(str(stages / "laq/laq.pt2"), torch.device("meta"))
    codes, latents = labeller(torch.zeros(3, 2, 64, 64, 3, dtype=torch.uint8, device="meta"))
    assert codes.device.type == "meta" and codes.shape == (3, 2) and codes.dtype == torch.int64
    assert latents.device.type == "meta" and latents.shape == (3, 2, 256)
    assert labeller.lookup(codes).shape == (3, 2, 256)


def test_labels_are_made_in_full_precision(stages):
    """TF32 is on elsewhere; where labels are made it is off, and on again after."""
    labeller, seen = vla.load_labeller(str(stages / "laq/laq.pt2"), torch.device("cpu")), []
    program = labeller.program

    def watched(frames):
        seen.append(torch.get_float32_matmul_precision())
        return program(frames)
    labeller.program = watched
    try:
        torch.set_float32_matmul_precision("high")
        labeller(torch.zeros(1, 2, 64, 64, 3, dtype=torch.uint8))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_each_dataset_has_its_own_units():
    """In a batch of two robots each one's actions are scaled by its own statistics."""
    class Loader:
        names, action_dim = ("arm", "base"), 4

        def peek(self, n):
            rng = np.random.default_rng(0)
            actions = rng.uniform(-1, 1, (64, 8, 4)).astype(np.float32)
            dataset = np.arange(64) % 2
            actions[dataset == 1] *= 100
            yield {"actions": actions, "action_mask": np.ones((64, 8), bool), "dataset": dataset,
                   "state": rng.uniform(-1, 1, (64, 4)).astype(np.float32)}
    stats = finetune.statistics(Loader(), "quantile")
    assert stats["action_scale"][:, 0].tolist() == pytest.approx([0.98, 98], rel=0.03)
    policy = finetune.Policy(finetune.Config(), finetune.load_trunk(finetune.Config())[0], stats)
    dataset = torch.tensor([0, 1, 1, 0])
    actions = stats["action_scale"][dataset][:, None].expand(-1, 8, -1)
    batch = batch_of("cpu", 4) | {"dataset": dataset, "actions": actions}
    assert policy.normalized(batch).numpy() == pytest.approx(1, abs=0.1)
    target = vla.Actions(stats, 8)(batch)[0]
    assert target.numpy() == pytest.approx(1, abs=0.1)
    Loader.names = ("arm", "base", "absent")
    with pytest.raises(SystemExit, match="none of the first 64 samples is of dataset 'absent'"):
        finetune.statistics(Loader(), "quantile")


def test_long_instructions_are_not_cut_in_silence(capsys):
    _, tokenizer = vla.load_trunk(vla.Config())
    tokens = vla.Tokens(tokenizer, 8)
    for _ in range(2):
        ids, mask = tokens(["open the drawer", "go"], "cpu")
    assert ids.shape == (2, 8) and mask.sum(1).tolist() == [8, 3]
    said = "--text-len 8 cuts the 16 tokens of 'open the drawer'"
    assert capsys.readouterr().err.count(said) == 1


# ------------------------------------------------------------ closed forms
def test_kernel_ridge_knows_what_it_would_say_of_a_left_out_episode():
    """Its r2, which chooses the penalty, is that of real fits without each episode (in the units of
    all rows); few rows tell a smooth function, a line also where there were none, and noise tells
    nothing."""
    torch.manual_seed(0)
    episode = np.arange(90) // 9
    x, other = torch.randn(90, 2), 100 * torch.randn(90, 1)
    y = torch.stack([(2 * x[:, 0]).sin() + x[:, 1], x[:, 0] * x[:, 1] + other[:, 0] / 100], 1)
    ridge = finetune.KernelRidge([x, other], y, episode)
    rows = np.random.default_rng(0).permutation(90)
    kernel, truth = ridge.kernel([x, other])[rows], (y - y.mean(0))[rows].double()
    left, weights = truth - kernel @ ridge.weights, ridge.weights
    penalty = (left * weights).sum() / weights.square().sum()
    error = 0.0
    for e in range(10):
        out = torch.from_numpy(episode[rows] == e)
        gram = kernel[~out][:, ~out] + penalty * torch.eye(81)
        fitted = torch.linalg.solve(gram, truth[~out])
        error += (kernel[out][:, ~out] @ fitted - truth[out]).square().sum()
    assert ridge.r2 == pytest.approx(1 - (error / truth.square().sum()).item(), abs=1e-6)

    wave = torch.linspace(-2, 2, 200)[:, None]
    fit = finetune.KernelRidge([wave[::5]], (2 * wave[::5]).sin(), np.arange(40))
    held_out = wave[2::5]
    assert finetune.r2_of_all(fit([held_out]), (2 * held_out).sin(), torch.ones(1)) > 0.9
    assert fit.r2 > 0.9
    line = finetune.KernelRidge([wave], 3 * wave, np.arange(200) // 20)
    assert line([torch.tensor([[4.0]])]).item() > 6          # a Gaussian alone falls back to 0
    assert finetune.KernelRidge([x, other], torch.randn(90, 2), episode).r2 < 0.1


@pytest.fixture(scope="module")
def at_the_start(data):
    """A policy before its first step, its settings, tokens and held-out episodes."""
    cfg = finetune.Config(data=str(data), init="none", val_fraction=0.2, eval_batches=6,
                          laq_ckpt="pooled")
    finetune.check(cfg, {})
    torch.manual_seed(0)
    trunk, tokenizer = finetune.load_trunk(finetune.Config())
    tokens, device = finetune.Tokens(tokenizer, 32), torch.device("cpu")
    train, val = (data_oxe.Loader(cfg, split, 64, 64, horizon_s=0.0, follow=1, chunk=cfg.chunk,
                                  seed=seed) for split, seed in (("train", 0), ("val", 1)))
    model = finetune.make_model(cfg, trunk, train)
    finetune.start_at_closed_form(model, cfg, tokens, train, device)
    return model, cfg, tokens, val, finetune.Nearest(train, device)


def test_iteration_0_acts_and_the_best_weights_are_kept(at_the_start):
    """The closed-form read-out errs less than the mean action on held-out episodes; what training
    spoils later does not reach the export."""
    model, cfg, tokens, val, nearest = at_the_start
    best, spoilt = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        best.head.linear.bias.fill_(7)
        spoilt.head.linear.bias.add_(2)
    seen = []
    for x in (spoilt, model, spoilt):
        seen.append(finetune.evaluate(x, cfg, val, nearest, tokens, torch.device("cpu")))
        finetune.keep_best(best, x, finetune.judged(seen[-1], cfg))
    first, good, last = (m["action_error"] for m in seen)
    assert good < 0.9 * seen[1]["action_error_mean_action"] and first == last > good
    assert best.error == pytest.approx(good)
    for name, value in model.named_parameters():
        assert torch.equal(value, best.get_parameter(name)), name


def test_video_is_decoded(data, at_the_start, monkeypatch):
    """From latents that hold the actions, held-out actions come back, better than from pictures;
    of a video batch neither actions nor state are looked at."""
    monkeypatch.setattr(finetune, "shaken", lambda frames: frames)      # these are known by heart
    model, cfg, tokens, val, _ = at_the_start
    chunks, mix = {}, torch.randn(32, 24)
    for episode in tfds.builder_from_directory(
            str(data / "metaworld_corner4/1.0.0")).as_dataset(split="train"):
        steps = list(episode["steps"].as_numpy_iterator())
        done = [step["executed_action"] for step in steps]
        actions = np.stack(done + 8 * [done[-1]])
        for t, step in enumerate(steps):
            chunks[step["observation"]["image"].tobytes()] = actions[t:t + 8].ravel()

    class Telling(finetune.PooledDifference):
        def __call__(self, frames):
            chunk = np.stack([chunks[x.numpy().tobytes()] for x in frames[:, 0]])
            return None, (torch.from_numpy(chunk).float() @ mix)[:, None]
    device = torch.device("cpu")
    decoder = finetune.Decoder(cfg, model, 10, Telling(), tokens, device)
    m = decoder.metrics
    assert m["r2"] > 0.8 and m["rows"] > 100
    assert m["r2"] > max(m["r2_pooled_difference"], m["r2_frame"]) + 0.1
    batch = data_oxe.to_device(next(val.peek(1)), device, 64)
    video = {name: batch[name] for name in ("frames", "instruction", "dataset")}
    inputs = finetune.to_inputs(video, model, tokens, device, decoder)
    assert inputs["is_video"].all() and inputs["weight"].min() == 1
    assert (inputs["state"] == model.state_offset[0]).all()
    assert torch.equal(inputs["chunk"], decoder(video))
    labelled = finetune.to_inputs(batch, model, tokens, device)
    assert not labelled["is_video"].any() and labelled.keys() == inputs.keys()
    mask = batch["action_mask"].all(1)
    near, far = ((inputs["chunk"] - chunk)[mask].square().mean()
                 for chunk in (labelled["chunk"], labelled["chunk"].roll(1, 0)))
    assert near < 0.3 * far
    parts = model({name: torch.cat([labelled[name], inputs[name]]) for name in inputs})
    assert min(parts["labelled"], parts["video"]) > 0


def test_labelled_pairs_are_also_seen_shaken():
    """Each picture moves as a whole by up to 1/32 of its side and is up to a tenth lighter."""
    torch.manual_seed(0)
    frames = torch.zeros(64, 2, 64, 64, 3, dtype=torch.uint8)
    frames[:, :, 30:34, 30:34] = 200
    shaken = finetune.shaken(frames)
    assert shaken.shape == frames.shape and shaken.dtype == torch.uint8
    light = shaken.amax((2, 3))                                         # (64, 2, 3)
    assert light.min() >= 180 and light.max() <= 220 and len(light.unique()) > 20
    rows, columns = (shaken[..., 0].amax(axis).bool() for axis in (3, 2))           # (64, 2, 64)
    assert (rows.sum(2) == 4).all() and (columns.sum(2) == 4).all()
    moved = rows.int().argmax(2) - 30                                   # (64, 2)
    assert set(moved.unique().tolist()) == {-2, -1, 0, 1, 2}
    assert (moved[:, 0] != moved[:, 1]).any()


# ------------------------------------------------------------ controls
def test_null_controls_label_other_pairs(data):
    """--null permuted: another sample's latents; --null frame: those of the frame and itself."""
    trunk, tokenizer = vla.load_trunk(vla.Config())
    device, seen = torch.device("cpu"), {}
    batch = data_oxe.to_device(next(iter(loader_of(data, "train", 8, chunk=8))), device, 64)
    for null in ("", "permuted", "frame"):
        cfg = vla.Config(laq_ckpt="pooled", targets="vectors", null=null)
        seen[null] = vla.to_inputs(batch, cfg, vla.PooledDifference(), trunk,
                                   vla.Tokens(tokenizer, 32), device)
        assert torch.equal(seen[null]["images"], batch["frames"][:, 0])
        assert torch.equal(seen[null]["ids"], seen[""]["ids"])
    true, permuted, still = (seen[x]["latents"] for x in ("", "permuted", "frame"))
    assert true.abs().amax((1, 2)).min() > 0 and not still.any()
    assert torch.equal(permuted.sum(0), true.roll(1, 0).sum(0))
    assert all(not torch.equal(a, b) for a, b in zip(true, permuted))


@pytest.mark.parametrize("args", [["--mode", "actions", "--laq-ckpt", ""],
                                  ["--laq-ckpt", "pooled", "--targets", "vectors"]])
def test_stage_2_without_a_labeller(args, data, tmp_path, capsys, monkeypatch):
    """The oracle and the pooled control run to their report and give a trunk that finetune reads,
    without a laq.pt2."""
    monkeypatch.setattr(vla.signal, "signal", lambda *args: None)
    args = [*args, "--data", data, "--out", tmp_path, "--steps", 2, *TINY]
    assert vla.main(tyro.cli(vla.Config, args=[*map(str, args)])) == 0
    out = capsys.readouterr().out
    assert "report card" in out and "actions from 2 labelled episodes a task" in out
    cfg = finetune.Config(init=str(tmp_path / "stage2"))
    trunk, _ = finetune.load_stage2(cfg, finetune.read_stage2(cfg))
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert torch.equal(trunk.readout, state["trunk.readout"])
    assert vla.load_decoder("", vla.PooledDifference(), torch.device("cpu")) is None    # --analyze


# ------------------------------------------------------------ hand-over
def test_a_labeller_of_the_first_schema_gives_the_vectors_of_its_codes(data, tmp_path, monkeypatch):
    class First(laq.ExportedLabeller):
        def forward(self, frames):
            return super().forward(frames)[:2]
    monkeypatch.setattr(laq, "ExportedLabeller", First)
    model, loader = model_of(out=str(tmp_path)), loader_of(data, "val", 4)
    laq.export(model, model.cfg, 0, loader)
    members = test_pt2.read(tmp_path / "laq.pt2")
    for schema in (b"laq.v1", b"laq.v3"):
        older = {name: content.replace(b"laq.v2", schema) if name == "extra/manifest.json"
                 else content for name, content in members.items()}
        test_pt2.write(tmp_path / f"{schema.decode()}.pt2", older)
    labeller = vla.load_labeller(str(tmp_path / "laq.v1.pt2"), torch.device("cpu"))
    assert labeller.manifest["schema"] == "laq.v1"
    frames = torch.from_numpy(next(iter(loader))["frames"])
    codes, latents = labeller(frames)
    assert torch.equal(codes, model.encode(frames)[0])
    assert torch.equal(latents, labeller.lookup(codes))
    with pytest.raises(SystemExit, match="schema is 'laq.v3', expected 'laq.v2'"):
        vla.load_labeller(str(tmp_path / "laq.v3.pt2"), torch.device("cpu"))


def test_pretrained_trunk_by_name(tmp_path, monkeypatch):
    """A SmolVLM2 folder loads with its weights, cut to fewer layers; without weights, or with half
    of them, it is an error. Processes but the first of those that have met read no weights: settle
    gives them rank 0's."""
    from transformers import SmolVLMForConditionalGeneration
    trunk, _ = vla.load_trunk(vla.Config())
    whole = SmolVLMForConditionalGeneration(trunk.vlm.config)
    cfg = vla.Config(trunk=str(tmp_path), text_layers=1, plain_prompt=True)
    whole.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    loaded, _ = vla.load_trunk(cfg)
    assert len(loaded.vlm.text_model.layers) == 1
    same = "connector.modality_projection.proj.weight"
    assert torch.equal(loaded.vlm.get_parameter(same), whole.model.get_parameter(same))
    monkeypatch.setenv("RANK", "1")                         # alone it tells nothing
    assert not any(x.is_meta for x in vla.load_trunk(cfg)[0].parameters())
    with monkeypatch.context() as second:
        second.setattr(vla.dist, "is_initialized", lambda: True)
        second.setattr(vla.dist, "get_rank", lambda: 1)
        second.setattr(vla.dist, "broadcast", lambda x, source: x.fill_(7))
        follower, _ = vla.load_trunk(cfg)
        assert all(x.is_meta for x in follower.parameters())
        vla.settle(follower, torch.device("cpu"))
    assert all((x == 7).all() for x in [*follower.parameters(), *follower.buffers()])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="no pretrained SmolVLM2"):
        vla.load_trunk(cfg)
    weights.unlink()
    with pytest.raises(SystemExit, match="no pretrained SmolVLM2"):
        vla.load_trunk(cfg)


def test_stage2_reaches_the_policy(stages):
    """finetune starts from vla's very trunk and readout, and policy.pt2 acts as the checkpoint."""
    state = torch.load(stages / "vla/last.pt", weights_only=True)["model"]
    cfg = finetune.Config(init=str(stages / "vla/stage2"))
    manifest = finetune.read_stage2(cfg)
    trunk, _ = finetune.load_stage2(cfg, manifest)
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, state[f"trunk.{name}"]), name
    assert manifest["labeller"]["schema"] == "laq.v2"
    saved = torch.load(stages / "ft/last.pt", weights_only=True)
    policy = finetune.Policy(finetune.Config(**saved["config"]), trunk, stats_of())
    kept = {name: {key.partition(".")[2]: value for key, value in saved["model"].items()
                   if key.startswith(name + ".")} for name in ("model", "average", "best")}
    policy.load_state_dict(kept["best"])
    program, _ = vla.open_program(stages / "ft/policy/policy.pt2")
    program = program.module()
    images = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8)
    ones, noise = torch.ones(3, 32, dtype=torch.long), torch.randn(3, 8, 4)
    example = {"images": images, "state": torch.randn(3, 4), "ids": ones, "mask": ones}
    actions = program(*example.values(), noise)
    torch.testing.assert_close(actions, policy.act(example), rtol=1e-3, atol=1e-4)
    dark = example | {"images": torch.zeros_like(images)}
    assert not torch.allclose(program(*dark.values(), noise), actions)
    policy.cfg.blind = True
    assert torch.equal(policy.act(dark), policy.act(example))
    policy.load_state_dict(kept["model"])                   # the last weights are others
    assert not torch.allclose(policy.act(dark), program(*dark.values(), noise), atol=1e-3)
    manifest = json.loads((stages / "ft/policy/manifest.json").read_text())
    assert manifest["units_of"] == "metaworld_corner4" and manifest["chunk"] == 8


def broken_copy(folder, to, broken, how):
    """A hand-over folder's copy, one of whose files is missing, half there, or changed by a bit."""
    shutil.copytree(folder, to)
    content = bytearray((to / broken).read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    (to / broken).unlink()
    if how != "missing":
        (to / broken).write_bytes(content[:half] if how == "truncated" else content)
    return to


@pytest.mark.parametrize("broken", ["heads.safetensors", "trunk/model.safetensors",
                                    "tokenizer/tokenizer_config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_broken_stage2_is_one_line(broken, how, stages, tmp_path):
    folder = broken_copy(stages / "vla/stage2", tmp_path / "stage2", broken, how)
    args = ["--init", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        finetune.main(tyro.cli(finetune.Config, args=args))
    missing = broken == "manifest.json" and how == "missing"
    says = "(manifest.json is missing)" if missing else f"{broken}' is damaged or missing"
    assert says in error.value.code and str(folder) in error.value.code
    assert "\n" not in error.value.code


@pytest.mark.parametrize("broken, says", [
    ("heads.safetensors", "heads.safetensors' is damaged or missing"),
    ("trunk/model.safetensors", "no pretrained SmolVLM2 at"), ("manifest.json", "is damaged")])
def test_a_broken_stage2_without_checksums_is_one_line(broken, says, stages, tmp_path, capsys):
    folder = broken_copy(stages / "vla/stage2", tmp_path / "stage2", broken, "truncated")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(SystemExit) as error:
        finetune.main(finetune.Config(init=str(folder), out=str(tmp_path / "out")))
    assert says in error.value.code and "\n" not in error.value.code
    assert "has no SHA256SUMS" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["policy.pt2", "manifest.json", "tokenizer_config.json"])
def test_a_broken_policy_is_one_line(broken, stages, tmp_path):
    folder = broken_copy(stages / "ft/policy", tmp_path / "policy", broken, "changed")
    with pytest.raises(SystemExit, match=f"{broken}' is damaged or missing") as error:
        rollout.load_manifest(str(folder), rollout.Config())
    assert "\n" not in error.value.code


def test_a_trunk_that_holds_code_is_refused(stages, tmp_path):
    """Pickled weights in place of safetensors, or Python files that the configs name."""
    mark = tmp_path / "mark"
    for name in ("weights", "code"):
        shutil.copytree(stages / "vla/stage2", tmp_path / name)
    trunk = tmp_path / "weights/trunk"
    (trunk / "model.safetensors").unlink()
    (trunk / "pytorch_model.bin").write_bytes(test_pt2.saved(mark))
    for part, key in {"trunk": "AutoModel", "tokenizer": "AutoTokenizer"}.items():
        folder = tmp_path / "code" / part
        (folder / "evil.py").write_text(test_pt2.python(mark))
        for path in folder.glob("*config.json"):
            config = json.loads(path.read_text()) | {"auto_map": {key: "evil.Evil"}}
            path.write_text(json.dumps({**config, "tokenizer_class": "Evil"}))
    for name in ("weights", "code"):
        with pytest.raises(SystemExit, match="no pretrained"):
            vla.load_trunk(vla.Config(), str(tmp_path / name))
        assert not mark.exists()


def test_a_policy_needs_actions_of_one_width(tmp_path):
    """Videos without actions are said to be that, not learned from with a loss of zero."""
    import fakes
    folder = tmp_path / "data"
    for name in ("tidybot", "bridge"):
        fakes.write_fake(str(folder), name, data_oxe.REGISTRY[name], 4, 12,
                         fakes.fake_frames(12, 64))
    args = ["--data", str(folder), "--init", "none", "--out", str(tmp_path / "o"), "--mix"]
    for mix in ("tidybot", "bridge,tidybot"):
        with pytest.raises(SystemExit, match="actions of one width .*'tidybot': 0"):
            finetune.main(tyro.cli(finetune.Config, args=[*args, mix]))


def test_another_holdout_than_the_stage_before_is_said(capsys):
    cfg = finetune.Config(val_fraction=0.2)
    finetune.warn_of_holdout(cfg, {"val_fraction": 0.2, "holdout": ""}, "runs/vla/stage2")
    assert not capsys.readouterr().err
    finetune.warn_of_holdout(cfg, {"val_fraction": 0.1, "holdout": ""}, "runs/vla/stage2")
    assert "was trained with val_fraction 0.1, this is 0.2" in capsys.readouterr().err

