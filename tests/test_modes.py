"""vla.py's modes and trunks, tiny, on CPU, offline."""
import contextlib
import copy
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from common import TINY, OnlyMeta, metrics, run_here
from safetensors.torch import load_file

import data_oxe
import finetune
import vla
from test_laq import overfit
from test_policy import batch_of, stats_of, word_tokenizer

MODES = {"latent_flow": {}, "latent_flow of codes": {"targets": "codes"}, "head": {}, "codes": {},
         "parallel": {"mode": "codes", "parallel_decode": True}, "actions": {}, "multitask": {}}


def settings_of(name):
    return {"mode": name.split()[0], **MODES[name]}


def small_trunk():
    """Tiny's, of pictures of 16 pixels."""
    config = vla.tiny_config()
    config.vision_config.image_size = 16
    return vla.Trunk(vla.SmolVLMModel(config), skip_padding=False)


def mode_of(name, trunk=None, K=8, **settings):
    """An untrained model with S = 2 codes of K, 3 wide."""
    torch.manual_seed(0)
    cfg = vla.Config(**settings_of(name), head_width=128, **settings)
    trunk = trunk or small_trunk()
    codebook, actions = torch.randn(2, K, 3), vla.Actions(stats_of(), 8)
    target = {"latent_flow": vla.Vectors(torch.randn(64, 6), codebook),
              "latent_flow of codes": vla.Codes(codebook), "actions": actions,
              "multitask": vla.Vectors(torch.randn(64, 6), codebook)}
    target = target.get(name, vla.OneHot(codebook))
    more = [actions] if name == "multitask" else []
    return vla.MODES[cfg.mode](cfg, trunk, target, *more)


def pairs_of(model, n=32, K=8):
    """A batch of noise pictures whose labels agree with each other."""
    torch.manual_seed(1)
    batch = batch_of("cpu", n)
    side, codes = model.trunk.image_size, torch.randint(0, K, (n, 2))
    codebook = model.target.codebook if hasattr(model.target, "codebook") else torch.zeros(2, K, 3)
    return batch | {"images": torch.randint(0, 255, (n, side, side, 3), dtype=torch.uint8),
                    "ids": torch.randint(3, 200, (n, 16)),
                    "codes": codes, "latents": codebook[torch.arange(2), codes],
                    "actions": torch.randn(n, 8, 4), "has_action": torch.arange(n) % 2 == 0,
                    "labelled_share": torch.full((n,), 0.5)}


# ------------------------------------------------------------ modes
@pytest.mark.parametrize("name", MODES)
def test_a_mode_learns_32_pairs_by_heart(name):
    model = mode_of(name)
    batch, start = pairs_of(model), model.trunk.readout.clone()
    overfit(model, lambda: sum(model(batch).values()), 60)
    model.eval()
    with torch.no_grad():
        target, weight = model.target(batch)
        readout, prediction = model.predict(batch)
        scores = model.code_scores(prediction)
    assert readout.shape == (32, 96) and prediction.shape == target.shape == weight.shape
    as_finetune_reads = model.trunk(batch["images"], batch["ids"], batch["mask"])
    torch.testing.assert_close(readout, as_finetune_reads)
    assert not torch.equal(model.trunk.readout, start)
    assert prediction.shape[1] == model.width
    if name == "actions":
        error = (prediction - target).square().mean()
        assert scores is None and error < 0.3 * target.var()
    else:
        assert scores.shape == (32, 2, 8)
        assert (scores.argmax(-1) == batch["codes"]).float().mean() > 0.95


def test_codes_are_text_that_keeps_to_the_grammar(tmp_path):
    """Whatever the language model would rather say, a code comes out at each place; that of the
    second place may depend on the first. The tokens are handed over in tokenizer and trunk."""
    for name in ("codes", "parallel"):
        model = mode_of(name)
        batch = pairs_of(model, 4)
        with torch.no_grad():
            model.trunk.vlm.get_input_embeddings().weight.mul_(1000)
            p = model.predict(batch)[1].view(4, 2, 8)
            torch.testing.assert_close(p.sum(-1), torch.ones(4, 2))
            before = model.trunk.read(*model.read(batch), model.tokens[batch["codes"]])
            other = model.trunk.read(*model.read(batch), model.tokens[batch["codes"] * 0])
        assert torch.equal(before[:, 0], other[:, 0]) and not torch.equal(before[:, 1], other[:, 1])
    model.trunk.vlm.get_input_embeddings().weight.data.div_(1000)
    cfg = vla.Config(mode="codes", out=str(tmp_path))
    vla.export(model, cfg, 0, vla.ByT5Tokenizer(), {})
    trunk, tokenizer = finetune.load_stage2(
        finetune.Config(init=f"{tmp_path}/stage2"),
        json.loads((tmp_path / "stage2/manifest.json").read_text()))
    said = tokenizer("<ACTION><ACT_3><ACT_0></ACTION>", add_special_tokens=False)["input_ids"]
    assert len(said) == 4 and len(tokenizer("a<ACT_7>b")["input_ids"]) == 4
    spoken = trunk.vlm.get_input_embeddings()(torch.tensor(said))
    torch.testing.assert_close(spoken, torch.stack([
        model.trunk.readout, model.tokens[3], model.tokens[0], model.tokens[8]]))
    inputs = batch["images"], batch["ids"], batch["mask"]
    torch.testing.assert_close(trunk(*inputs), model.trunk(*inputs))
    assert "<ACT_0>" not in vla.ByT5Tokenizer().get_vocab()


def test_actions_count_where_there_are_any():
    """multitask: unlabelled samples change latents alone, and labelled ones count as if alone."""
    model, once = (mode_of("multitask", latent_weight=x, action_weight=2 * x) for x in (3.0, 1.0))
    batch = pairs_of(model, 8)

    def parts_of(**other):
        torch.manual_seed(0)
        return model(batch | other)
    with torch.no_grad():
        parts, none = parts_of(), parts_of(has_action=torch.zeros(8, dtype=torch.bool))
        changed = torch.where(batch["has_action"][:, None, None], batch["actions"], 100.0)
        assert parts["actions"] == parts_of(actions=changed)["actions"] > 1.0
        assert none["actions"] == 0 and none["flow"] == parts["flow"]
        assert parts_of(actions=batch["actions"] + 9)["actions"] > 10 * parts["actions"]
        model, triple = once, parts
        for name, part in parts_of().items():
            torch.testing.assert_close(triple[name], 3 * part)


def test_micro_batches_of_one_sample_give_the_gradient_of_the_whole(monkeypatch):
    """multitask: also where three of four samples have no actions."""
    def errors(head, x, cond):                              # without noise
        x, cond = (a.repeat(head.draws, 1) for a in (x, cond))
        return (head(x, x[:, 0], cond) - x).square()
    monkeypatch.setattr(vla.FlowHead, "errors", errors)
    model, n = mode_of("multitask"), 4
    batch = pairs_of(model, n)
    for parameter in model.parameters():                    # as built some of a head are zero
        parameter.data += 0.02 * torch.randn(parameter.shape)
    loaded = batch | {"frames": torch.randint(0, 255, (n, 2, 64, 64, 3), dtype=torch.uint8),
                      "instruction": ["go"] * n, "has_action": torch.arange(n) == 1}

    def labeller(frames):
        return batch["codes"], batch["latents"]
    inputs = vla.to_inputs(loaded, vla.Config(mode="multitask"), labeller, model.trunk,
                           vla.Tokens(vla.ByT5Tokenizer(), 16), "cpu")

    def gradient(size):
        model.zero_grad()
        for piece, share, _ in vla.pieces(inputs, size):
            (share * sum(model(piece).values())).backward()
        return [p.grad.clone() for p in model.parameters()]
    whole = gradient(n)
    torch.testing.assert_close(gradient(1), whole, rtol=1e-3, atol=1e-5)


def test_a_chunk_of_latents_is_of_consecutive_pairs():
    """--latent-chunk 2: each pair's positions stand after those of the pair before, in targets and
    predictions; every mode of latents learns them."""
    labeller = vla.PooledDifference()
    frames = torch.randint(0, 255, (4, 3, 64, 64, 3), dtype=torch.uint8)
    latents = vla.label_pairs(labeller, frames)[1]                            # (4, 2, 192)
    for i in range(2):
        assert torch.equal(latents[:, i], labeller(frames[:, i:i + 2])[1][:, 0])
    labeller.codebook = torch.randn(2, 8, 3)
    for mode, targets in (("head", "codes"), ("codes", "codes"), ("latent_flow", "codes")):
        cfg = vla.Config(mode=mode, targets=targets, latent_chunk=2)
        target = vla.make_target(vla.MODES[mode].needs[0], cfg, labeller, None, None)
        model = vla.MODES[mode](cfg, small_trunk(), target)
        batch = pairs_of(model, 4) | {"codes": torch.randint(0, 8, (4, 4))}
        assert sum(model(batch).values()).isfinite()
        prediction = model.predict(batch)[1]
        assert model.code_scores(prediction).shape == (4, 4, 8)
        scores = model.code_scores(target(batch)[0])
        assert torch.equal(scores.argmax(-1), batch["codes"])


def test_a_checkpoint_of_another_labeller_is_one_line():
    """Of as many codes, too."""
    for name in ("codes", "head", "latent_flow", "latent_flow of codes"):
        state, model = mode_of(name).state_dict(), mode_of(name)
        model.load_state_dict(state)
        with pytest.raises(SystemExit, match=r"codebook, \(2, 8, 3\), is not .*, \(2, 16, 3\); go"):
            mode_of(name, K=16).load_state_dict(state)
        model.target.codebook += 1
        with pytest.raises(SystemExit, match="codebook is not .* but with other values"):
            model.load_state_dict(state)
    state = mode_of("actions").state_dict()
    state["target.offset"] = state["target.offset"][..., 1:]
    with pytest.raises(SystemExit, match=r"offset, .* is not that of --laq-ckpt or --mix"):
        mode_of("actions").load_state_dict(state)


class Regression(vla.LatentPolicy):
    """What a user adds: a class, and its name in MODES."""

    def __init__(self, cfg, trunk, target):
        super().__init__(trunk, target)
        self.head = torch.nn.Linear(trunk.width, self.width)

    def loss(self, batch, readout):
        target, _ = self.target(batch)
        return {"regression": (self.head(readout) - target).square().mean()}

    def expect(self, readout):
        return readout, self.head(readout)


@pytest.mark.parametrize("name", ["own", *(name for name in MODES if " " not in name)])
def test_a_mode_resumes_exactly(name, noise, stages, tmp_path, monkeypatch):
    """The script goes on from half-way to the losses and the weights of the unbroken run."""
    monkeypatch.setitem(vla.MODES, "own", Regression)
    settings = {"mode": "own"} if name == "own" else settings_of(name)
    flags = [f"--{key.replace('_', '-')}" for key in settings if settings[key] is True]
    values = [x for key in settings if settings[key] is not True
              for x in (f"--{key.replace('_', '-')}", settings[key])]
    args = ["vla.py", "--data", noise, "--laq-ckpt", stages / "laq/laq.pt2", "--steps", 4, *TINY,
            "--val-fraction", 0.25, "--keep-every", 2, *flags, *values]
    run_here(*args, "--out", tmp_path / "whole")
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "whole/step_00000002.pt", tmp_path / "half/last.pt")
    run_here(*args, "--resume", tmp_path / "half/last.pt")
    whole, half = (metrics(tmp_path / x, "loss")["loss"] for x in ("whole", "half"))
    assert half == {step: whole[step] for step in (2, 3)} and len(set(whole.values())) == 4
    for file in "heads.safetensors", "trunk/model.safetensors":
        mine, its = (load_file(tmp_path / x / "stage2" / file) for x in ("whole", "half"))
        assert mine.keys() == its.keys() and all(torch.equal(mine[x], its[x]) for x in mine)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_of_one_device_and_stands_bfloat16(name, monkeypatch):
    """What a GPU would see, in two halves: the step on a device of its own, and autocast."""
    for device in ("cpu", "meta"):
        model = mode_of(name).to(device)
        batch = {key: value.to(device) for key, value in pairs_of(mode_of(name), 4).items()}
        with OnlyMeta(monkeypatch) if device == "meta" else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = sum(model(batch).values())
            loss.backward()
            prediction = model.predict(batch)[1]
            model.code_scores(prediction)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) > 40 and all(g.device.type == device for g in grads)
        assert prediction.device.type == device and loss.dtype == torch.float32


# ------------------------------------------------------------ trunks
SMALL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


def toy(name=SMALL, **settings):
    torch.manual_seed(0)
    return vla.load_trunk(vla.Config(trunk=name, random_init=True, shrink=True, **settings))


@pytest.mark.parametrize("name", ["tiny", *vla.SMOLVLM2, "dual-7b"])
def test_a_trunk_is_handed_over_and_trains_on_one_device(name, tmp_path, monkeypatch):
    """Every trunk, offline: stage2/ gives finetune.py the very readout; a step on a device of its
    own, and under bfloat16 autocast."""
    trunk, tokenizer = toy(name)
    model = mode_of("head", trunk)
    batch = pairs_of(model, 4)
    batch["ids"], batch["mask"] = vla.Tokens(tokenizer, 12)(["go", "open it", "a", "b"], "cpu")
    vla.export(model, vla.Config(mode="head", trunk=name, out=str(tmp_path)), 0, tokenizer, {})
    cfg = finetune.Config(init=f"{tmp_path}/stage2", text_len=32)
    loaded, its = finetune.load_stage2(cfg, finetune.read_stage2(cfg))
    assert vla.Tokens(its, 12)(["go"], "cpu")[0].tolist() == batch["ids"][:1].tolist()
    inputs = batch["images"], batch["ids"], batch["mask"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), trunk(*inputs))
    for device in ("cpu", "meta"):
        model = model.to(device)
        batch = {key: value.to(device) for key, value in batch.items()}
        with OnlyMeta(monkeypatch) if device == "meta" else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = sum(model(batch).values())
            loss.backward()
        assert all(p.grad is not None and p.grad.device.type == device for p in model.parameters())


def test_a_pretrained_trunk_reads_its_own_chat():
    """The states that transformers' whole model has for the prompt that SmolVLM's processor lays
    out, one sample at a time, without padding."""
    from transformers.models.smolvlm import processing_smolvlm
    trunk, tokenizer = toy()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vlm, image_id = trunk.vlm, tokenizer.convert_tokens_to_ids("<image>")
    vlm.config.image_token_id = image_id
    last = tokenizer("x", add_special_tokens=False)["input_ids"]
    trunk.readout.data = vlm.get_input_embeddings().weight[last[0]].detach().clone()
    texts = ["Open a drawer", "Go"]
    ids, mask = vla.Tokens(tokenizer, 16)(texts, "cpu")
    mask[ids == tokenizer.eos_token_id] = 0                 # ByT5's own; SmolVLM2's writes none
    images = torch.randint(0, 255, (2, trunk.image_size, trunk.image_size, 3), dtype=torch.uint8)
    with torch.no_grad():
        mine = trunk(images, ids, mask)
        for i, text in enumerate(texts):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            message = {"role": "user", "content": content}
            prompt = tokenizer.apply_chat_template(
                [message], chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
                add_generation_prompt=True, tokenize=False)
            picture = processing_smolvlm.get_image_prompt_string(
                0, 0, 4, "<fake_token_around_image>", "<image>", "<global-img>")
            prompt = tokenizer(prompt.replace("<image>", picture), add_special_tokens=False)
            pixels = images[i:i + 1].permute(0, 3, 1, 2)[None] / 127.5 - 1
            whole = vlm(input_ids=torch.tensor([prompt["input_ids"] + last]), pixel_values=pixels)
            torch.testing.assert_close(mine[i], whole.last_hidden_state[0, -1])
        plain = copy.copy(trunk)
        plain.before = plain.between = plain.after = plain.before[:0]
        assert not torch.allclose(plain(images, ids, mask), mine, atol=0.1)


def test_positions_skip_padding():
    """With and without a chat; but not those of `tiny`, whose figures are of runs where padding
    took positions."""
    for name, plain, skips in ((SMALL, 0, True), (SMALL, 1, True), ("tiny", 0, False)):
        trunk, _ = toy(name, plain_prompt=bool(plain))
        side = trunk.image_size
        images = torch.randint(0, 255, (2, side, side, 3), dtype=torch.uint8)
        ids, mask = torch.randint(3, 200, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
        with torch.no_grad():
            short = trunk(images, ids, mask)
            padded = trunk(images, *(torch.nn.functional.pad(x, (0, 9)) for x in (ids, mask)))
        assert torch.allclose(short, padded, atol=1e-4) == skips


@pytest.mark.parametrize("name", [SMALL, "dual-7b"])
def test_a_policy_on_a_trunk_deploys(name, tmp_path):
    """policy.pt2 holds no operator that rollout.py would refuse."""
    trunk, tokenizer = toy(name)
    policy = finetune.Policy(finetune.Config(), trunk, stats_of())
    cfg = finetune.Config(out=str(tmp_path))
    plan = SimpleNamespace(entry=data_oxe.Entry())
    loader = SimpleNamespace(action_dim=4, state_dim=4, names=["x"], source_size={}, counts={},
                             plans=[plan])
    finetune.export(policy, cfg, 0, tokenizer, loader, {})
    program, _ = finetune.open_program(tmp_path / "policy/policy.pt2")
    example = finetune.example_of(policy, cfg)
    images, state, ids, mask, _ = example
    batch = {"images": images, "state": state, "ids": ids, "mask": mask}
    torch.testing.assert_close(program.module()(*example), policy.act(batch))


def test_dual_7b_joins_pretrained_parts(tmp_path, monkeypatch):
    """Each with its own weights; DINOv2's positions in SigLIP's grid."""
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=14)
    parts = [vla.SiglipVisionModel(vla.SiglipVisionConfig(image_size=28, **vision)),
             vla.Dinov2Model(vla.Dinov2Config(image_size=70, **vision)),
             vla.LlamaModel(vla.LlamaConfig(**vla.sizes(32, 64, 2, 4), vocab_size=400))]
    folders = [str(tmp_path / name) for name in ("siglip", "dinov2", "llama")]
    for part, folder in zip(parts, folders):
        part.save_pretrained(folder)
    vla.byte_tokenizer(vla.DUAL_CHAT).save_pretrained(folders[2])
    monkeypatch.setattr(vla, "DUAL", tuple(folders))
    trunk, _ = vla.load_trunk(vla.Config(trunk="dual-7b", text_layers=1))
    mine, towers = trunk.vlm, trunk.vlm.vision_model
    assert len(mine.text_model.layers) == 1 and trunk.before.tolist() == [384]
    for part, loaded in zip(parts, (towers["siglip"], towers["dinov2"], mine.text_model)):
        for name, value in loaded.named_parameters():
            if name != "embeddings.position_embeddings":
                assert torch.equal(value, part.get_parameter(name)), name
    assert towers["dinov2"].embeddings.position_embeddings.shape == (1, 5, 32)
    batch = batch_of("cpu", 2) | {"images": torch.randint(0, 255, (2, 28, 28, 3))}
    assert trunk(batch["images"], batch["ids"], batch["mask"]).isfinite().all()


# ------------------------------------------------------------ what learns
def test_what_is_frozen_does_not_learn():
    """And the rest does, the readout always."""
    for settings, frozen in {("none", 0): "nothing", ("vision", 0): "vision_model",
                             ("trunk", 0): "vlm", ("none", 1): "text_model.layers.0."}.items():
        trunk = small_trunk()
        vla.freeze(trunk, vla.Config(freeze=settings[0], freeze_layers=settings[1]))
        model = mode_of("head", trunk)
        before = copy.deepcopy(model.state_dict())
        batch = pairs_of(model, 4)
        overfit(model, lambda: sum(model(batch).values()), 2)
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name]) == (frozen in name), (name, settings)
    with pytest.raises(SystemExit, match="--freeze-layers 3: .* 'tiny' has 2 layers"):
        vla.freeze(trunk, vla.Config(freeze="none", freeze_layers=3))


def test_lora_learns_and_is_merged(tmp_path):
    """stage2/ is a plain transformers folder that reads as the trained model."""
    pytest.importorskip("peft")
    trunk = small_trunk()
    cfg = vla.Config(mode="head", freeze="trunk", lora_rank=2, out=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")                      # what only peft can mend is not told
        vla.freeze(trunk, cfg)
    model = mode_of("head", trunk)
    learning = {name for name, p in model.trunk.named_parameters() if p.requires_grad}
    assert len(learning) == 1 + 2 * 4 * 2 and all("lora" in x for x in learning - {"readout"})
    batch, start = pairs_of(model), model.trunk.readout.clone()
    untrained = model.read(batch)
    overfit(model, lambda: sum(model(batch).values()), 5)
    vla.export(model, cfg, 0, vla.ByT5Tokenizer(), {})
    stage2 = finetune.Config(init=f"{tmp_path}/stage2")
    trunk, _ = finetune.load_stage2(stage2, finetune.read_stage2(stage2))
    assert not [name for name in trunk.state_dict() if "lora" in name]
    mine = model.read(batch)
    torch.testing.assert_close(trunk(batch["images"], batch["ids"], batch["mask"]), mine)
    assert not torch.allclose(mine, untrained, atol=0.01)
    cfg.freeze_layers, trunk = 1, small_trunk()             # and those first ones do not learn
    vla.freeze(trunk, cfg)
    learning = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert len(learning) == 1 + 4 * 2 and not [x for x in learning if "layers.0." in x]
    cfg.freeze_layers = 2
    with pytest.raises(SystemExit, match="q_proj: .* after its first 2 layers .*, only none"):
        vla.freeze(small_trunk(), cfg)
    cfg.freeze_layers, cfg.lora_modules = 0, ("q_proj", "c_attn")
    with pytest.raises(SystemExit, match="--lora-modules c_attn: .* only down_proj, gate"):
        vla.freeze(small_trunk(), cfg)


# ------------------------------------------------------------ errors
def test_a_trunk_without_its_chat_is_one_line(tmp_path):
    trunk, _ = toy()
    trunk.vlm.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"does not know <\|im_start\|>, .* --plain-prompt goes"):
        vla.load_trunk(vla.Config(trunk=str(tmp_path)))
    assert not len(vla.load_trunk(vla.Config(trunk=str(tmp_path), plain_prompt=True))[0].before)


def test_weights_of_another_architecture_are_one_line(tmp_path):
    config = vla.LlamaConfig(**vla.sizes(32, 64, 1, 4), vocab_size=400)
    vla.LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no pretrained SmolVLM2 at .* 'llama', not 'smolvlm'"):
        vla.load_trunk(vla.Config(trunk=str(tmp_path)))
