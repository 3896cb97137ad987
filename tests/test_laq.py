"""laq.py: latent actions, their metrics and their analysis, tiny, on CPU, offline."""
import contextlib
import json

import numpy as np
import pytest
import torch
from common import TINY, OnlyMeta, metrics, run, run_here

import data_oxe
import laq


def loader_of(data, split, batch_size, **options):
    return data_oxe.Loader(data_oxe.DataConfig(data=str(data)), split, batch_size, 64, **options)


def model_of(**settings):
    cfg = laq.Config(**settings)
    laq.check(cfg)
    torch.manual_seed(0)
    return laq.LAQ(cfg, action_dim=4)


def overfit(model, loss_of, steps):
    """Adam with a warm-up; loss_of() -> the loss of always the same samples."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 25)
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"quantizer": "vq", "arch": "cnn"},
                                      {"quantizer": "fsq", "arch": "cnn"}])
def test_a_batch_can_be_overfitted(settings, data):
    """Eight samples by heart: model, losses and gradients belong together."""
    frames = next(iter(loader_of(data, "train", 8)))["frames"]
    batch = {"frames": torch.from_numpy(frames), "flow": torch.from_numpy(laq.optical_flow(frames))}
    model = model_of(**settings)
    weights, seen = laq.loss_weights(model.cfg, 0), []
    model.quantizer.reseed(model.outputs(batch["frames"]), everything=True)
    before = model(batch)[0]["pixel"]

    def loss():                                             # laq's loop observes after each step
        if seen:
            model.quantizer.observe(*seen)
        parts, *seen[:] = model(batch)
        return sum(weights[name] * part for name, part in parts.items())
    overfit(model, loss, 50)
    codes, vectors = model.encode(batch["frames"])
    assert model(batch)[0]["pixel"] < 0.7 * before
    assert torch.allclose(vectors, model.quantizer.lookup(codes), atol=1e-6)
    assert len(codes.unique(dim=0)) > 4, "different pairs share their codes"


@pytest.mark.parametrize("settings", [
    {"action_fraction": 0.5}, {"arch": "cnn", "quantizer": "vq", "crop": 0.1, "color": 0.1},
    {"quantizer": "fsq"}])
def test_a_step_is_of_one_device_and_stands_bfloat16(settings, monkeypatch):
    """What a GPU would see, in two halves: the step on a device of its own, and autocast."""
    def step(device):
        cfg = laq.Config(**settings)
        laq.check(cfg)
        with torch.device(device):
            model, control = laq.LAQ(cfg, 8, 4, 3), laq.LAQ(cfg, 8, 4, 3)
            frames = torch.zeros(4, 2, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8)
            number = torch.zeros(4, dtype=torch.int64)
            features = torch.zeros(4, 8, 7, 7)
            batch = {"frames": frames, "flow": torch.zeros(4, 2, 16, 16), "dataset": number,
                     "action_sum": torch.zeros(4, 4), "labelled": number == 0}
        targets, weights = laq.Targets(cfg, torch.device(device)), laq.loss_weights(cfg, 0)
        with OnlyMeta(monkeypatch) if device == "meta" else contextlib.nullcontext():
            inputs = {**targets.on_device(batch), "features": features}
            with torch.autocast(device, torch.bfloat16):
                parts, z, codes = model(inputs)
            sum(weights[name] * part for name, part in parts.items()).backward()
            model.quantizer.observe(z, codes)
            found = {**laq.label(model, control, frames), **laq.decode(model, frames, number)}
        assert {"features", "flow"} <= set(parts) and z.dtype == torch.float32
        assert all(x.device.type == device and len(x) == 4 for x in found.values())
        return parts
    assert all(torch.isfinite(part) for part in step("cpu").values())
    step("meta")


@pytest.mark.parametrize("quantizer", ["nsvq", "fsq"])
def test_nearest_codes_have_all_digits(quantizer):
    """Away from the CPU, products that choose a code are of float64: TF32 has ten bits."""
    quantizer, seen = model_of(quantizer=quantizer).quantizer.to("meta"), []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "mm" in str(operation):
                seen.extend(x.dtype for x in args if torch.is_tensor(x))
            return operation(*args, **(kwargs or {}))
    with Recorder():
        quantizer.codes(torch.zeros(4, 2, 256, device="meta"))
    assert seen and set(seen) == {torch.float64}


@pytest.mark.parametrize("arch", ["vit", "cnn"])
def test_still_pairs_have_one_code_of_their_own(arch, data):
    frames = torch.from_numpy(next(iter(loader_of(data, "train", 32)))["frames"])
    model = model_of(arch=arch)
    model.quantizer.reseed(model.outputs(frames), everything=True)
    still = model.encode(frames[:, :1].expand(-1, 2, -1, -1, -1))[0]
    assert len(still.unique(dim=0)) == 1
    assert len(model.encode(frames)[0].unique(dim=0)) > 8


def test_dead_codes_are_reseeded_and_used_ones_stay():
    quantizer, z = model_of(codes=16).quantizer, torch.randn(64, 2, 256)
    before = quantizer.vectors.detach().clone()
    codes = torch.randint(0, 15, (64, 2))                   # code 15 is never used
    for _ in range(100):
        quantizer.observe(z, codes)
    assert quantizer.reseed(z) == 2
    assert torch.equal(quantizer.vectors[:, :15], before[:, :15])
    assert all((quantizer.vectors[s, 15] == z[:, s]).all(1).any() for s in range(2))
    assert quantizer.reseed(z[:5], everything=True) == 10, "an output seeds one code at most"
    assert all(len(book.unique(dim=0)) == 16 for book in quantizer.vectors)


def test_augmentation_is_the_same_for_both_frames_and_their_flow():
    y, x = np.mgrid[:64, :64].astype(np.float32)

    def scene(dx):
        waves = [128 + 60 * np.sin((x - dx) / 5 + i) * np.cos(y / 7) for i in range(3)]
        return np.stack(waves, -1).astype(np.uint8)
    frames = np.stack([scene(0), scene(2)])[None].repeat(6, 0)
    flow = torch.from_numpy(laq.optical_flow(frames))
    assert flow[:, 0].median() == pytest.approx(0.5, abs=0.1)           # 2 px are half a cell
    assert flow[:, 1].abs().median() < 0.1
    torch.manual_seed(0)
    cfg = laq.Config(shift=4, crop=0.4, color=0.2)
    frames, moved = laq.augment(torch.from_numpy(frames), flow, cfg)
    seen = torch.from_numpy(laq.optical_flow(frames.numpy()))
    assert frames.float().std(0).mean() > 5, "all samples alike"
    for a, b in zip(moved[:, 0], seen[:, 0]):
        assert a.median() == pytest.approx(b.median().item(), abs=0.12)
    still = laq.augment(frames[:, :1].expand(-1, 2, -1, -1, -1), flow, cfg)[0]
    assert torch.equal(still[:, 0], still[:, 1])


# ------------------------------------------------------------ metrics
def test_metrics_tell_good_latents_from_bad_ones():
    rng = np.random.default_rng(0)
    motion, noise = rng.standard_normal((400, 3)), rng.standard_normal((200, 3))
    assert laq.r2(laq.ridge(motion[:200], motion[:200], motion[200:]), motion[200:]).min() > 0.99
    assert laq.r2(laq.ridge(noise, motion[:200], motion[200:]), motion[200:]).max() < 0.1
    assert laq.nmi(np.arange(400) % 4, np.arange(400) % 4) == pytest.approx(1)
    assert laq.nmi(rng.integers(0, 4, 400), np.arange(400) % 4) < 0.1
    x = torch.rand(2, 3, 32, 32)
    assert laq.ssim(x, x) == pytest.approx(torch.ones(2))
    assert laq.ssim(x, torch.rand_like(x)).max() < 0.2


def test_a_probe_is_not_blown_up_by_a_column_that_first_moves_in_validation():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 4))
    y, x[:, 3] = x[:, :1].copy(), 1e-7 * rng.standard_normal(400)       # column 3: still in the fit
    x[300:, 3] = 1.0
    assert laq.r2(laq.ridge(x[:300], y[:300], x[300:]), y[300:]).min() > 0.9


def samples_of(rng, dataset, n, K=8):
    """n samples of one dataset as laq.collect gives them, whose codes tell the motion."""
    codes = rng.integers(0, K, (n, 2))
    motion = np.stack([codes[:, 0], codes[:, 1], rng.integers(0, 2, n)], 1).astype(np.float32)
    return {"codes": codes, "still": np.zeros((n, 2), int),
            "vectors": np.eye(K)[codes].reshape(n, -1), "latents": np.eye(K)[codes].reshape(n, -1),
            "control": rng.standard_normal((n, 2 * K)), "difference": rng.random((n, 3)),
            "control_latents": rng.standard_normal((n, 2 * K)), "episode": np.arange(n) // 40,
            "pooled": rng.random((n, 192)), "mean_flow": rng.random((n, 2)),
            "picture": np.eye(K)[codes[:, 0]],                          # tells the first token
            "mse": np.full((n, 4), 0.01), "ssim": np.full((n, 2), 0.9), "action_sum": motion,
            "has_other": np.arange(n) > 0, "dataset": np.full(n, dataset),
            "instruction": np.full(n, "go", object)}


def test_a_mix_is_measured_dataset_by_dataset(monkeypatch):
    """Probes read only a dataset's own motion, none is fitted on too few samples, and codes count
    as used if any dataset uses them."""
    rng, cfg = np.random.default_rng(0), laq.Config(codes=8)
    big, small = samples_of(rng, 0, 400), samples_of(rng, 1, 20)
    big["codes"], small["codes"] = big["codes"] % 4, 4 + small["codes"] % 4
    both = {k: np.concatenate([big[k], small[k]]) for k in big}
    both["mse"][both["has_other"], 1] = 0.1                 # the others kept their own codes
    monkeypatch.setattr(laq, "collect", lambda *args, **options: both)

    class Loader:
        names, motion_dims = ("big", "small"), {"big": [0, 1], "small": [0, 1]}
    m = laq.evaluate(None, None, cfg, dict.fromkeys(("val", "many", "few"), Loader), None)
    assert m["big/samples"] == 400 and m["small/samples"] == 20 and m["samples"] == 420
    assert m["big/probe_r2"] > 0.9 and "small/probe_r2" not in m and "big/probe_r2_2" not in m
    assert m["codes_used"] == 1 and m["big/codes_used"] == m["small/codes_used"] == 0.5
    assert m["psnr"] == pytest.approx(20) and m["psnr_shuffled"] == pytest.approx(10)
    assert "probe R2" in laq.describe(m, cfg)
    assert m["few_label_r2"] > 0.9 > m["few_label_r2_random_quantizer"]
    assert m["big/codes_foreseen"] > 0.55 and m["big/codes_majority"] < 0.4
    assert "pass  codes that frame t and the instruction tell" in laq.report_card(m, cfg)
    few = {k: v for k, v in m.items() if "probe" not in k}
    assert "too few samples" in laq.describe(few, cfg)


def test_codes_are_shuffled_within_a_dataset():
    dataset = np.array([0, 1, 0, 1, 1, 2])
    other = laq.another_of_its_dataset(dataset)
    assert (dataset[other] == dataset).all()
    assert (other != np.arange(6)).tolist() == [True] * 5 + [False]


# ------------------------------------------------------------ the script
def test_analysis(stages, tmp_path):
    p = run("laq.py", "--analyze", stages / "laq/last.pt", "--out", tmp_path, "--eval-batches", 5)
    m = json.loads((tmp_path / "analysis/metrics.json").read_text())["metaworld_corner4"]
    assert {"transfer_cosine_to_metaworld_corner4", "nmi_instruction", "probe_direction_cosine",
            "probe_r2_random_quantizer", "token_entropy_given_action_octant", "psnr_reversed",
            "entropy_1", "samples"} <= set(m) and "report:" in p.stdout
    report = (tmp_path / "analysis/report.html").read_text()
    assert report.count("data:image/png") == 6 == len(list(tmp_path.glob("analysis/*.png")))
    assert "http" not in report


def test_further_targets_and_wandb(data, tmp_path):
    """Features of a frozen vision model and a few action labels, both with their part of the loss;
    logged offline, and a resumed run is the same one there. No flow: no number of it."""
    from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    args = ["--data", data, "--steps", 3, *TINY, "--arch", "cnn", "--quantizer", "fsq",
            "--crop", 0.2, "--color", 0.2, "--features", tmp_path / "dino",
            "--action-fraction", 0.5, "--flow-weight", 0, "--wandb"]
    run_here("laq.py", *args, "--out", tmp_path / "run")
    seen = metrics(tmp_path / "run", "features", "action", "mfu", "data_wait", "flow", "summary")
    assert not seen.pop("flow") and not seen.pop("summary")
    assert all(len(x) == 3 for x in seen.values()) and 0.5 < seen["features"][0] < 1.5
    assert max(seen["action"].values()) > 0
    run_here("laq.py", *args, "--resume", tmp_path / "run/last.pt")
    runs = {p.name.rsplit("-", 1)[1] for p in tmp_path.glob("run/wandb/offline-run-*")}
    assert runs == {(tmp_path / "run/run_id").read_text()}
    batch = {"dataset": np.zeros(1000, int), "episode": np.arange(1000),
             "has_action": np.arange(1000) % 2 == 0}
    assert 15 < laq.labelled(laq.Config(action_fraction=0.05), batch).sum() < 35


def test_labeller_is_that_of_the_checkpoint(data, stages, tmp_path):
    """The exported program gives the codes of the model; --export-only writes it again."""
    import vla
    labeller = vla.load_labeller(str(stages / "laq/laq.pt2"), torch.device("cpu"))
    manifest, codebook = labeller.manifest, labeller.codebook
    frames = torch.from_numpy(next(iter(loader_of(data, "val", 5)))["frames"])
    model = model_of()
    state = torch.load(stages / "laq/last.pt", weights_only=True)
    model.load_state_dict(state["model"])
    codes, vectors, latents = labeller.program(frames)
    assert torch.equal(codes, model.encode(frames)[0]) and codes.dtype == torch.int64
    assert torch.equal(vectors, labeller.lookup(codes)) and codebook.shape == (2, 64, 256)
    assert torch.allclose(latents, model.outputs(frames), atol=1e-5)
    assert torch.equal(labeller(frames)[1], latents) and not torch.allclose(latents, vectors)
    assert labeller(frames[:1])[0].shape == (1, 2)
    assert manifest["schema"] == "laq.v2"
    assert manifest["horizon"]["metaworld_corner4"] == {"steps": 8, "seconds": 0.1}
    (tmp_path / "last.pt").write_bytes((stages / "laq/last.pt").read_bytes())
    run_here("laq.py", "--data", data, "--steps", 30, *TINY, "--resume", tmp_path / "last.pt",
             "--export-only")
    again = vla.load_labeller(str(tmp_path / "laq.pt2"), torch.device("cpu"))
    assert torch.equal(again(frames)[0], codes)
