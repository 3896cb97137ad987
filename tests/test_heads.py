"""finetune.py's action heads, what it exports and --bench-policy, tiny, on CPU, offline."""
import contextlib
import json
import re
import subprocess
import sys

import pytest
import torch
import tyro
from common import ENV, ROOT, TINY, OnlyMeta, metrics, run_here
from safetensors.torch import save_file

import finetune
import vla
from test_laq import overfit
from test_modes import mode_of, pairs_of
from test_policy import batch_of, stats_of


@pytest.fixture(scope="module")
def stage2(tmp_path_factory):
    """What vla.py hands over of an untrained model of each mode, but the trunk: {mode: folder}"""
    folders = {}
    for mode in ("latent_flow", "head", "actions", "multitask", "codes"):
        model, folder = mode_of(mode), tmp_path_factory.mktemp(mode)
        with torch.no_grad():
            for parameter in model.parameters():                        # heads start with zeros
                parameter += 0.1 * torch.randn_like(parameter)
        save_file({name: x.contiguous() for name, x in model.state_dict().items()
                   if not name.startswith("trunk.vlm.")}, folder / "heads.safetensors")
        manifest = {"mode": mode, "latent_dim": model.target.width,
                    "flow": {"width": 128, "depth": 2}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        folders[mode] = folder, model
    return folders


def policy_of(head, stage2, device="cpu", **settings):
    """With weights that are not zero, as if it had been trained."""
    torch.manual_seed(0)
    cfg = finetune.Config(head=head, init=str(stage2["latent_flow"][0]), head_width=64, text_len=16,
                          **settings)
    config = finetune.tiny_config()
    config.vision_config.image_size = 16
    with torch.device(device):
        trunk = finetune.Trunk(finetune.SmolVLMModel(config))
        policy = finetune.Policy(cfg, trunk, stats_of())
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return policy


def inputs_of(n=8):
    """A batch of noise, with actions for labels."""
    torch.manual_seed(1)
    images = torch.randint(0, 255, (n, 16, 16, 3), dtype=torch.uint8)
    return batch_of("cpu", n) | {"images": images, "ids": torch.randint(3, 200, (n, 16)),
                                 "state": torch.randn(n, 4), "chunk": torch.rand(n, 8, 4) * 2 - 1}


# ------------------------------------------------------------ heads
@pytest.mark.parametrize("head", finetune.HEADS)
def test_a_head_learns_a_batch_by_heart(head, stage2):
    """Of what it is shown of picture, words and state."""
    policy, batch = policy_of(head, stage2), inputs_of()
    with torch.no_grad():
        features = policy.features(batch)
    overfit(policy.head, lambda: policy.head.loss(features, batch["chunk"]).mean(), 150)
    torch.manual_seed(3)
    error = (policy.act(batch) - batch["chunk"]).abs().mean()
    assert error < 0.15, error                              # the mean action's is 0.5


@pytest.mark.parametrize("head", finetune.HEADS)
def test_what_lies_behind_an_episode_is_not_learned(head, stage2):
    policy, batch = policy_of(head, stage2), inputs_of()
    batch["weight"][:, 6:] = 0
    losses = []
    for padding in (0.0, 100.0):
        torch.manual_seed(2)                                # of a flow's noise
        chunk = batch["chunk"].index_fill(1, torch.tensor([6, 7]), padding)
        losses.append(policy(batch | {"chunk": chunk})["labelled"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("head", finetune.HEADS)
def test_a_step_is_of_one_device_and_stands_bfloat16(head, stage2, monkeypatch):
    for device in ("cpu", "meta"):
        model, batch = policy_of(head, stage2, device, laq_ckpt="x"), batch_of(device)
        batch["images"] = batch["images"][:, :16, :16]
        with OnlyMeta(monkeypatch) if device == "meta" else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = sum(model(batch).values())
            loss.backward()
            out = model.act(batch)
        lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == [] and loss.dtype == torch.float32 and out.device.type == device


def test_the_expert_looks_at_what_counts(stage2, monkeypatch):
    """Once a chunk at picture, words and state; not at padding, nor at later actions."""
    policy, batch, noise = policy_of("expert", stage2), inputs_of(), torch.randn(8, 8, 4)
    batch["mask"] = batch["mask"].clone()
    batch["mask"][:, 10:] = 0
    looks = []
    policy.head.prefix.register_forward_hook(lambda *x: looks.append(1))
    with torch.no_grad():
        actions = policy.act(batch, noise)
        assert len(looks) == 1
        padding = batch["ids"].index_fill(1, torch.arange(10, 16), 7)
        assert torch.equal(policy.act(batch | {"ids": padding}, noise), actions)
        for other in ({"images": 255 - batch["images"]}, {"state": batch["state"] + 1},
                      {"ids": batch["ids"].index_fill(1, torch.arange(5), 7)}):
            assert not torch.allclose(policy.act(batch | other, noise), actions, atol=1e-4)
        later = noise.index_fill(1, torch.arange(5, 8), 2.0)
        changed = (policy.act(batch, later) - actions).abs().amax((0, 2))
    assert changed[:5].max() < 1e-6 and changed[5:].min() > 1e-3


def test_bins_round_less_than_a_hundredth_of_the_range(stage2):
    head, x = policy_of("bins", stage2).head, torch.linspace(-1, 1, 1001)
    rounded = head.center_of(head.bin_of(x))
    assert (rounded - x).abs().max() < 0.01 and len(rounded.unique()) == 255
    assert head.center_of(head.bin_of(torch.tensor([-3.0, 3.0]))).tolist() == pytest.approx(
        [-1, 1], abs=0.01)
    assert head.center_of(head.bin_of(torch.zeros(1))) == 0             # what never moves


@pytest.mark.parametrize("mode", ["latent_flow", "head", "actions", "multitask"])
def test_stage_2_predicts_in_the_policy_as_it_did(mode, stage2):
    folder, model = stage2[mode]
    with torch.no_grad():
        readout, prediction = model.predict(pairs_of(model))
        again = finetune.Stage2Head(str(folder), model.trunk.width)(readout)
    assert torch.equal(again, prediction) and again.std() > 0.01


def test_what_heads_cannot_do_is_one_line(stage2, tmp_path):
    for says, args in {
            "--init none has no stage 2": ["--init", "none", "--head", "latent"],
            "give --normalize quantile": ["--init", "none", "--head", "bins", "--normalize",
                                          "meanstd"]}.items():
        with pytest.raises(SystemExit, match=says) as error:
            finetune.main(tyro.cli(finetune.Config, args=[*args, "--out", str(tmp_path / "o")]))
        assert "\n" not in error.value.code
    with pytest.raises(SystemExit, match="random has no stage 2"):
        finetune.bench(finetune.Config(bench_policy="random", head="latent"))
    with pytest.raises(SystemExit, match="is of --mode codes"):
        finetune.Stage2Head(str(stage2["codes"][0]), 96)
    assert not [*tmp_path.rglob("*")]


# ------------------------------------------------------------ policy/
@pytest.mark.parametrize("head, dtype", [*((head, "float32") for head in finetune.HEADS),
                                         ("expert", "bfloat16")])
def test_an_exported_program_acts_as_the_module(head, dtype, stage2, tmp_path):
    """Saved and opened as rollout.py opens it; only flows need noise. bfloat16: about the same."""
    policy, batch, noise = policy_of(head, stage2), inputs_of(3), torch.randn(2, 3, 8, 4)
    inputs = [batch[name] for name in ("images", "state", "ids", "mask")]
    with torch.no_grad():
        actions = finetune.Program(policy)(*inputs, noise[0])
    policy.cfg.export_dtype = dtype
    torch.export.save(finetune.program_of(policy, policy.cfg), tmp_path / "policy.pt2")
    program = vla.open_program(tmp_path / "policy.pt2")[0]
    assert (torch.bfloat16 in {x.dtype for x in program.parameters()}) == (dtype == "bfloat16")
    program, atol = program.module(), 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(program(*inputs, noise[0]), actions, rtol=1e-5, atol=atol)
    one = program(*(x[:1] for x in (*inputs, noise[0])))
    torch.testing.assert_close(one, actions[:1], rtol=1e-5, atol=atol)
    same = torch.equal(program(*inputs, noise[1]), program(*inputs, noise[0]))
    assert same == (head not in ("expert", "flow"))


def test_a_policy_runs_where_this_repository_is_not(stages, tmp_path):
    """The README's lines, in an empty folder, by torch and the tokenizer alone."""
    (tmp_path / "policy").symlink_to(stages / "ft/policy")
    example, = re.findall(r"\n((?:    .*\n)*    .*torch\.export\.load.*\n(?:    .*\n)*)",
                          (ROOT / "README.md").read_text())
    lines = ["import sys, torch", "from transformers import AutoTokenizer",
             "image, state = torch.zeros(64, 64, 3, dtype=torch.uint8), torch.zeros(4)",
             *(line[4:] for line in example.splitlines()),
             "assert not {'finetune', 'data_oxe', 'tensorflow'} & set(sys.modules)",
             "assert not [x for x in sys.modules if x.startswith('transformers.models.smolvlm')]",
             "print(*actions.shape)"]
    p = subprocess.run([sys.executable, "-I", "-c", "\n".join(lines)], cwd=tmp_path, text=True,
                       capture_output=True, env=ENV)
    assert p.stdout.split() == ["1", "8", "4"], p.stderr


def test_runs_with_other_heads(data, stages, tmp_path, monkeypatch):
    """Video is decoded for the expert; the latent head starts in closed form; another type is
    written of a finished run."""
    monkeypatch.setattr(finetune.KernelRidge, "most", 128)
    args = ["--data", data, "--episodes-per-task", 2, "--steps", 2, *TINY]
    run_here("finetune.py", *args, "--out", tmp_path / "expert", "--head", "expert",
             "--init", "none", "--laq-ckpt", "pooled")
    assert min(metrics(tmp_path / "expert", "video")["video"].values()) > 0
    run_here("finetune.py", *args, "--out", tmp_path / "expert", "--head", "expert",
             "--init", "none", "--laq-ckpt", "pooled", "--resume", tmp_path / "expert/last.pt",
             "--export-only", "--export-dtype", "bfloat16")
    manifest = json.loads((tmp_path / "expert/policy/manifest.json").read_text())
    assert (manifest["head"], manifest["dtype"]) == ("expert", "bfloat16")
    run_here("finetune.py", *args, "--out", tmp_path / "latent", "--head", "latent",
             "--init", stages / "vla/stage2")
    errors = metrics(tmp_path / "latent", "val_action_error", "val_action_error_mean_action")
    assert errors["val_action_error"][0] < errors["val_action_error_mean_action"][0]


# ------------------------------------------------------------ --bench-policy
def test_the_parts_that_are_timed_are_the_whole(stage2):
    """Vision is what depends on pictures alone, the head what is done at each Euler step."""
    policy, batch, noise = policy_of("expert", stage2), inputs_of(3), torch.randn(3, 8, 4)
    inputs = [*(batch[name] for name in ("images", "state", "ids", "mask")), noise]
    program = finetune.program_of(policy, policy.cfg).module()
    parts, attentions = finetune.in_parts(program), []
    for i in range(3):
        nodes = getattr(parts, f"submod_{i}").graph.nodes
        attentions.append(sum("scaled_dot_product" in str(node.target) for node in nodes))
    assert attentions == [2, 2, 2 * finetune.EULER_STEPS]
    assert torch.equal(parts(*inputs)[0], program(*inputs))


def test_a_bench_needs_no_data(stages, tmp_path):
    """Nor TensorFlow: of a folder, and of shapes."""
    script = ("import sys; sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None\n"
              "import finetune, tyro\n"
              "once = finetune.time_call\n"
              "finetune.time_call = lambda *args: once(*args, seconds=0)\n"
              "for policy in sys.argv[1:]:\n"
              "    args = ['--bench-policy', policy, '--head', 'expert', '--out', 'out']\n"
              "    finetune.bench(tyro.cli(finetune.Config, args=args))\n")
    p = subprocess.run([sys.executable, "-c", script, str(stages / "ft/policy"), "random"],
                       cwd=tmp_path, text=True, capture_output=True,
                       env={**ENV, "PYTHONPATH": str(ROOT)})
    assert p.returncode == 0, p.stderr
    rows = [line.split() for line in p.stdout.splitlines() if line.startswith("cpu")]
    assert [row[1] for row in rows] == 2 * ["1", "8", "32"]
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert report["policy"] == "random" and len(report["rows"]) == 3
    assert all(row[name] > 0 for row in report["rows"]
               for name in ("first", "steady", "vision", "prefix", "head", "peak MB"))
