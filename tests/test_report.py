"""vla.py's report: what an evaluation measures, its verdict, its analysis, and laq.py's decoder, on
CPU, offline."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from common import ENV, ROOT, TINY, OnlyMeta, metrics
from test_laq import loader_of, model_of

import data_oxe
import laq
import vla

WIDTH = 6                                                   # codes of the hand-made samples
FEW = "action_r2_few_readout", "action_r2_few_prediction"


def samples_of(codes, likeliest, dataset=0):
    """Held-out samples of two episodes as vla.collect gives them; targets are their codes' one-hot
    vectors, predictions those of the likeliest codes."""
    codes, likeliest = np.array(codes), np.array(likeliest)             # (M, S), (M, S, 5)
    target, guess = (np.eye(WIDTH)[x].reshape(len(x), -1) for x in (codes, likeliest[..., 0]))
    rows = {"codes": codes, "target": target, "weight": np.ones_like(target),
            "dataset": np.full(len(codes), dataset), "episode": np.arange(len(codes)) % 2,
            "has_other": np.ones(len(codes), bool)}
    for name in vla.SWAPPED:
        rows |= {f"likeliest{name}": likeliest, f"prediction{name}": guess}
    return rows


def five(*first):
    """One position's likeliest codes: these, then the others in order."""
    return [*first, *(code for code in range(WIDTH) if code not in first)][:5]


def measure(val, baseline):
    """Values alone."""
    return {name: x[0] if np.ndim(x) else x for name, x in vla.measure(val, baseline).items()}


# ------------------------------------------------------------ metrics
def test_metrics_of_four_samples_are_those_counted_by_hand():
    known = samples_of([[3]] * 5 + [[1]] * 3 + [[0], [2], [4], [5]], [[five(3)]] * 12)
    val = samples_of([[0], [1], [1], [3]], [[five(0)], [five(1)], [five(2)], [five(4, 5, 0, 1, 2)]])
    m = measure(val, vla.baseline_of(known))
    assert m["accuracy"] == m["accuracy_0"] == 0.5 and m["top5"] == 0.75
    assert m["accuracy_majority"] == 0.25, "training's commonest code, not validation's"
    assert m["top5_majority"] == 1 and m["accuracy_all_tokens_majority"] == 0.25
    assert m["mse"] == pytest.approx(4 / (4 * WIDTH)) and m["mae"] == pytest.approx(m["mse"])
    mean = np.array([1, 3, 1, 5, 1, 1]) / 12
    assert m["mse_mean"] == pytest.approx(np.square(mean - val["target"]).mean())
    assert m["cosine"] == 0.5 and m["target_r2"] == pytest.approx(1 - m["mse"] / m["mse_mean"])
    assert m["codes_unique"] == 4 and m["codes_unique_true"] == 3
    assert m["code_entropy"] == pytest.approx(np.log(4))
    assert m["code_entropy_0_true"] == pytest.approx(1.5 * np.log(2))


def test_a_sample_without_another_is_left_out():
    """Of all metrics alike, so that what stands side by side is of the same samples."""
    val = samples_of([[0], [1], [1], [3]], [[five(0)], [five(1)], [five(2)], [five(4)]])
    baseline = vla.baseline_of(val)
    val["has_other"][:2] = False                            # of these both halves were their own
    m = measure(val, baseline)
    assert m["accuracy"] == m["accuracy_image_only"] == 0 and m["target_r2_image_only"] < 0
    assert m["mse"] == m["mse_instruction_only"] == pytest.approx(4 / (2 * WIDTH))
    assert (m["samples"], m["episodes"]) == (2, 2)
    val["has_other"][:] = False
    assert measure(val, baseline) == {"samples": 0, "episodes": 0}


def test_halves_are_swapped_within_a_dataset():
    """Also those of a dataset's only sample in a batch; but not of the very first."""
    others, seen = vla.Others(), []
    for dataset in ([0, 1, 0], [1, 2, 2], [2, 0, 1]):
        number = torch.arange(3) + 3 * len(seen)
        swapped, has_other = others(dict.fromkeys(("images", "ids", "mask"), number),
                                    np.array(dataset))
        assert all(torch.equal(x, swapped["ids"]) for x in swapped.values())
        seen.append([*zip(swapped["ids"].tolist(), has_other)])
    yes, no = True, False
    assert seen == [[(2, yes), (1, no), (0, yes)], [(1, yes), (5, yes), (4, yes)],
                    [(4, yes), (0, yes), (3, yes)]]


def test_histograms_that_are_equal_are_no_distance_apart():
    count = np.array([[3, 1, 0], [2, 2, 2]])
    kl, js = vla.divergences(count, count)
    assert kl == pytest.approx([0, 0]) and js == pytest.approx([0, 0])
    kl, js = vla.divergences(np.array([[4, 0]]), np.array([[0, 4]]))
    assert js == pytest.approx([np.log(2)]) and np.isfinite(kl).all() and kl > 1
    one_sided, _ = vla.divergences(np.array([[4, 0]]), np.array([[2, 2]]))
    assert one_sided == pytest.approx([0.9 * np.log(1.8) + 0.1 * np.log(0.2)])


def test_actions_past_the_end_count_for_nothing():
    val = samples_of([[0], [1]], [[five(0)], [five(1)]])
    baseline = vla.baseline_of(val)
    val["weight"][:, 3:], val["prediction"][:, 3:] = 0, 99.0
    m = measure(val, baseline)
    assert m["mse"] == 0 and m["cosine"] == pytest.approx(1)
    val["weight"] = np.ones_like(val["weight"])
    assert measure(val, vla.baseline_of(val))["target_r2"] < 0
    val["weight"][0] = 0                                    # no actions at all
    assert measure(val, baseline)["cosine"] == pytest.approx(vla.cosine(
        val["prediction"], val["target"])[1]), "of the sample that has some"
    val["weight"][:] = 0
    assert not {"mse", "target_r2"} & measure(val, baseline).keys(), "not perfect: nothing to judge"


def test_a_dataset_without_a_baseline_or_samples_is_left_out():
    shares = vla.mix_of(np.array([0, 0, 0, 2]), ("a", "b", "c"), "mix")
    assert shares["mix_unique"] == 2 and shares["a/mix"] == 0.75 and shares["b/mix"] == 0
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3)
    assert shares["mix_entropy"] == pytest.approx(expected)
    assert vla.mean_of_datasets({"a": {"x": 1.0}, "c": {"x": 3.0, "y": 5.0}}) == {"x": 2, "y": 5}


def test_a_mix_too_large_for_the_probe_of_few_labels_is_told(capsys):
    """Where there are actions that it would be of."""
    for episodes, width, probed in ((5000, 4, True), (5001, 4, False), (5001, 0, False)):
        loader = SimpleNamespace(plans=[SimpleNamespace(used=episodes)], action_dim=width)
        for stage in (vla, laq):
            loaders = stage.evaluation_loaders(stage.Config(), lambda *args, **options: loader)
            assert [*loaders] == ["val", "many"] + ["few"] * probed
            told = "no probe from few labels" in capsys.readouterr().err
            assert told == (width > 0 and episodes > 5000)


def test_the_bootstrap_draws_episodes_and_always_the_same(monkeypatch):
    """Samples of an episode stand or fall together, so that few episodes say little."""
    monkeypatch.setattr(vla, "FEW_EPISODES", 4)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, WIDTH, (400, 1))
    spread = {}
    for episodes in (4, 100):
        episode = np.arange(400) % episodes
        guess = np.where(episode[:, None] % 2, codes, (codes + 1) % WIDTH)          # odd: right
        val = samples_of(codes, np.array([[five(x)] for x in guess[:, 0]]))
        val["episode"] = episode
        found = vla.measure(val, vla.baseline_of(val))
        again = vla.measure(val, vla.baseline_of(val))
        assert all(np.array_equal(found[name], again[name]) for name in found)
        value, draws = found["accuracy"][0], found["accuracy"][1:]
        assert value == 0.5 and draws.mean() == pytest.approx(0.5, abs=0.03)
        spread[episodes] = draws.std()
        other = vla.measure(val | {"dataset": np.ones(400, int)}, vla.baseline_of(val))
        together = np.corrcoef(draws, other["accuracy"][1:])[0, 1]
        assert abs(together) < 0.1, "datasets are drawn independently"
        drawn = {name for name, x in found.items() if np.ndim(x)}
        assert {"top5", "mse", "mae", "cosine", "accuracy_image_only", "target_r2"} < drawn
    assert spread[4] == pytest.approx(0.25, abs=0.03)
    assert spread[100] == pytest.approx(0.05, abs=0.01)


def test_actions_are_read_by_one_probe_on_draws_of_the_episodes_that_have_them(monkeypatch):
    """Of episodes 0 to 7, the last four unlabelled; in two the actions are told by the feature."""
    monkeypatch.setattr(vla, "FEW_EPISODES", 4)
    rng = np.random.default_rng(0)
    fit, val = ({"readout": rng.standard_normal((160, 3)), "episode": np.arange(160) // 20,
                 "dataset": np.zeros(160, int), "whole": np.arange(160) < 80} for _ in range(2))
    for samples in (fit, val):
        told = samples["readout"] @ np.arange(6).reshape(3, 2)
        samples["actions"] = told.astype(np.float32)
    noise = rng.standard_normal(val["actions"].shape)
    val["actions"] = np.where(val["episode"][:, None] < 2, val["actions"], noise)
    r2 = vla.action_r2(fit, val, "readout")
    assert r2.shape == (1001,) and r2[1:].min() < 0 < 0.9 < r2[1:].max(), "of two told, or of none"
    known, y = fit["whole"], torch.from_numpy(val["actions"][:80])
    probe = vla.KernelRidge([torch.from_numpy(fit["readout"][known])],
                            torch.from_numpy(fit["actions"][known]), fit["episode"][known])
    unit = torch.from_numpy(fit["actions"][known]).std(0)
    left = (probe([torch.from_numpy(val["readout"][:80])]) - y) / unit
    whole = (y - y.mean(0)) / unit
    assert r2[0] == pytest.approx(1 - (left.square().sum() / whole.square().sum()).item())
    assert vla.action_r2(fit, val | {"whole": np.zeros(160, bool)}, "readout") is None


class TextOnly(torch.nn.Module):
    """A mode that tells codes from the instruction alone: code of a pair = its first token."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def judge(self, batch):
        return {"flow": self.nothing.sum()}, *self.predict(batch)

    def target(self, batch):
        target = torch.eye(WIDTH)[batch["codes"][:, 0]]
        return target, torch.ones_like(target)

    def predict(self, batch):
        prediction = torch.eye(WIDTH)[batch["ids"][:, 0]]
        return prediction, prediction

    def code_scores(self, prediction):
        return prediction[:, None]


class Batches:
    """A loader of two datasets; of the second no model could tell the codes."""
    names, image_size = ("told", "untold"), 8

    def __init__(self, seed):
        self.seed = seed

    def peek(self, n):
        rng = np.random.default_rng(self.seed)
        words, dataset = rng.integers(0, WIDTH, 64), np.arange(64) % 2
        yield {"frames": np.zeros((64, 2, 8, 8, 3), np.uint8), "word": words, "dataset": dataset,
               "code": np.where(dataset, (words + 1) % WIDTH, words), "episode": np.arange(64) // 8,
               "has_action": np.zeros(64, bool), "action_mask": np.ones((64, 8), bool),
               "actions": np.zeros((64, 8, 4), np.float32)}


def test_a_model_that_ignores_the_picture_is_found_out(monkeypatch):
    """By its accuracy with another sample's picture; and a verdict names the dataset on which it
    is worse than the commonest code."""
    def inputs_of(batch, labelled):
        words = torch.as_tensor(batch["word"])[:, None]
        given = {"images": torch.as_tensor(batch["frames"])[:, 0], "ids": words, "mask": words}
        return given | ({"codes": torch.as_tensor(batch["code"])[:, None]} if labelled else {})
    loaders = {"val": Batches(0), "many": Batches(1), "few": Batches(2)}
    evaluate = vla.Evaluation(TextOnly(), vla.Config(eval_batches=1), loaders, inputs_of)
    m = evaluate()
    assert m["told/accuracy"] == m["told/accuracy_instruction_only"] == 1
    assert m["told/accuracy_image_only"] < 0.5
    assert m["untold/accuracy"] == 0 and m["accuracy"] == 0.5, "the mean over datasets"
    assert m["accuracy_low"] <= 0.5 <= m["accuracy_high"] and "accuracy_trend" not in m
    assert m["mix_unique"] == 2 and m["mix_entropy"] == m["mix_train_entropy"] == pytest.approx(1)
    good, text = vla.verdict(m)
    assert not good and text == ("worse than the majority code on 1 of 2 datasets (untold): "
                                 "pretraining on these would hurt")
    cfg = vla.Config(episodes_per_task=5)
    assert f"FAIL  {text}" in vla.report_card(m, m, cfg)
    as_good = m | {"accuracy": m["accuracy_majority"], "accuracy_instruction_only": 0.0}
    card = vla.report_card({}, as_good | dict.fromkeys(FEW, 0.3), cfg)
    assert "FAIL  nearest-code accuracy" in card, "is not learning"
    assert "actions from" not in card, "nothing tells what the untrained model knew"
    card = vla.report_card(dict.fromkeys(FEW, 0.2), as_good | dict.fromkeys(FEW, 0.3), cfg)
    assert "pass  actions from 5 labelled episodes a task: R2 0.30 (at the start 0.20)" in card
    learned = m | {"untold/accuracy": 1.0, "accuracy": 1.0, "target_r2": 0.9}
    for overfit, says in {False: "learned from the video", True: "the one batch of"}.items():
        cfg.overfit = overfit
        assert says in vla.report_card({}, learned, cfg).splitlines()[-1]
    rare = m | {"untold/samples": 3, "unseen/mix": 0.0}
    assert vla.verdict(rare)[1] == ("no worse than the majority code on any of 1 datasets; 2 "
                                    "cannot be judged, of too few samples held out or in training")
    cfg.overfit, none = False, learned | {"told/samples": 3, "untold/samples": 3}
    card = vla.report_card({}, none, cfg).splitlines()
    assert "  ?   no verdict" in card[1] and "too few held-out samples to say" in card[-1]
    card = vla.report_card({}, {"samples": 0, "episodes": 0, "loss": 1.0}, cfg)
    assert "FAIL" not in card and "too few held-out samples to say" in card.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(vla, "FEW_EPISODES", 9)               # either dataset has eight, both 16
        few = vla.Evaluation(TextOnly(), vla.Config(eval_batches=1), loaders, inputs_of)()
    assert few["episodes"] == 16 and not [name for name in few if name.endswith("_low")]
    assert "[" not in vla.describe(few, cfg, 0).partition("\n")[2], "no interval is printed"
    lines = vla.tables_of(m)
    starts = [line.split()[0] for line in lines if line]
    titles = "codes", "target", "population", "by"
    assert starts == [x for title in titles for x in (title, "told", "untold")]
    assert lines[3].split()[1:4] == ["0.000"] * 3, "top-1 of what no model could tell"
    assert "accuracy_majority_low" not in m and m["told/accuracy_low"] == 1
    assert m["told/mse_low"] == 0 < m["untold/mse_low"] <= m["untold/mse"] <= m["untold/mse_high"]
    evaluate.before["told/accuracy"] = evaluate.before["told/accuracy"] - 0.25
    again = evaluate()
    assert again["accuracy_trend"] == again["accuracy_trend_low"] == 0
    assert again["told/accuracy_trend"] == again["told/accuracy_trend_high"] == 0.25
    evaluate.before["target_r2"] = evaluate.before["target_r2"] ** 3
    third = evaluate()
    change = third["target_r2"] - m["target_r2"] ** 3
    assert third["target_r2_trend"] == pytest.approx(change), "of what is printed, not of draws"
    assert [vla.number(x) for x in (-12.345, -0.5, 99.9996, 123.4, -12345.6, None, 7)] == [
        "-12.3", "-0.500", "100.0", "123.4", "-1e+04", "-", "7"]
    table = vla.rows_of_html(again)
    assert "<td><td><td>told<td>untold<tr>" in table
    assert "<td>accuracy<td>0.500<td>1.000<td>0.000<tr>" in table
    assert max(map(len, vla.describe(again, cfg, 9).splitlines())) <= 100
    for step, told in {0: False, 9: True}.items():          # also of a first validation
        words = " ".join(vla.describe(m, cfg, step).split())
        assert (f"verdict {text}" in words) == told, "once it has learned"


def test_a_name_in_a_table_is_that_of_one_dataset():
    names = {vla.shortened(f"{name}/") for name in data_oxe.REGISTRY}
    assert len(names) == len(data_oxe.REGISTRY) and max(map(len, names)) <= 14


# ------------------------------------------------------------ the decoder and the analysis
def test_the_decoder_is_that_of_the_checkpoint(data, tmp_path, monkeypatch):
    model = model_of(out=str(tmp_path), codes=8)
    for weight in model.decoder.parameters():               # as built it copies frame t
        torch.nn.init.normal_(weight, std=0.2)
    laq.export(model, model.cfg, 0, loader_of(data, "val", 4))
    frames = torch.from_numpy(next(iter(loader_of(data, "val", 5)))["frames"])
    codes, vectors = model.encode(frames)
    device, path = torch.device("cpu"), str(tmp_path / "laq.pt2")
    labeller = vla.load_labeller(path, device)
    decode = vla.load_decoder(path, labeller, device)
    a = model.to_float(frames)[:, 0]
    expected = laq.to_uint8(model.decoder(a, vectors)[0]).int()
    assert (decode(frames[:, 0], codes).int() - expected).abs().max() <= 1
    assert (decode(frames[:1, 0], 7 - codes[:1]).int() - expected[:1]).abs().max() > 2
    with monkeypatch.context() as patch:                    # on another device, as on a GPU
        patch.setattr(torch.Tensor, "item", lambda x: 0)    # of meta tensors there is none
        there = vla.load_decoder(path, labeller, torch.device("meta"))
        with OnlyMeta(patch):
            assert there(frames[:, 0], codes).device.type == "meta"
    labeller.codebook = labeller.codebook + 1
    with pytest.raises(SystemExit, match="decodes the codes of another labeller"):
        vla.load_decoder(path, labeller, device)
    (tmp_path / "decoder.pt2").unlink()
    assert vla.load_decoder(path, labeller, device) is None


def test_a_batch_by_heart_is_analyzed(data, stages, tmp_path, monkeypatch):
    """--overfit validates on the batch that it repeats; --analyze writes a report with pictures of
    both decodings, and the numbers of each figure."""
    monkeypatch.setattr(vla.signal, "signal", lambda *args: None)
    args = ["--data", data, "--out", tmp_path, "--steps", 2, *TINY, "--overfit",
            "--laq-ckpt", stages / "laq/laq.pt2", "--targets", "codes"]
    assert vla.main(tyro.cli(vla.Config, args=[*map(str, args)])) == 0
    seen = metrics(tmp_path, "val_samples", "val_accuracy", "val_accuracy_trend")
    assert seen["val_samples"] == {0: 8, 2: 8} and list(seen["val_accuracy_trend"]) == [2]

    with pytest.raises(SystemExit, match="no checkpoint at --analyze '/nowhere.pt'"):
        vla.stored_config("/nowhere.pt")
    cfg = vla.stored_config(str(tmp_path / "last.pt"))
    cfg.analyze, cfg.overfit = str(tmp_path / "last.pt"), False
    assert vla.analyze(cfg) == 0
    folder = tmp_path / "analysis"
    names = {"trend", "pairs", "histograms", "calibration", "confusion"}
    assert {x.stem for x in folder.glob("*.png")} == names
    numbers = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    assert len(numbers["pairs"]["predicted"]) == len(numbers["pairs"]["instruction"]) == 8
    assert np.array(numbers["confusion"]["count"]).shape == (2, 64, 64)
    assert numbers["trend"]["step"] == [0, 2] and "distance" in str(numbers["calibration"])
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png") == 5 and "http" not in report
    assert "worse than the majority code on" in report, "the verdict"
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2


def test_a_rung_that_fails_does_not_end_the_ladder(tmp_path):
    """The others run, the table is written, and the exit code is 1."""
    (tmp_path / "fake.py").write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir()\n"
        "row = {'step': 5, 'loss': 1.0, 'val_loss': 1.0, 'val_target_r2': 0.5,\n"
        "       'val_target_r2_low': 0.4, 'val_target_r2_high': 0.6}\n"
        "(out / 'metrics.jsonl').write_text(json.dumps(row))\n"
        "sys.exit('1e-3' in sys.argv)\n")
    p = subprocess.run(["bash", "sbatch/ladder.sh"], cwd=ROOT, capture_output=True, text=True,
                       env={**ENV, "OUT": f"{tmp_path}/out", "RUN": f"python {tmp_path}/fake.py"})
    assert p.returncode == 1 and f"failed: {tmp_path}/out/4_seed0; the table has" in p.stderr
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"| mix, rate {rate} |" in table for rate in ("1e-3", "3e-4", "1e-4", "3e-5"))


def test_the_ladder_tells_its_runs_apart(tmp_path, monkeypatch, capsys):
    """A table and a plot of whatever is finished."""
    monkeypatch.syspath_prepend(str(ROOT / "sbatch"))
    import ladder
    lines = []
    for i, setting in enumerate(("--overfit --mix a", "--mix a", "--mix a,b,c", "--mix all",
                                 "--mix all --lr 1e-4")):
        run = tmp_path / f"{i}_seed0"
        run.mkdir()
        lines.append(f"{setting} --seed 0 --out {run}")
        rows = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0},
                {"step": 5, "val_loss": 1.0, "val_accuracy": 0.1 * i,
                 "val_accuracy_majority": 0.05}]
        if i:                                                           # the first: few episodes
            rows[-1] |= {"val_accuracy_low": 0.0, "val_accuracy_high": 1.0}
        if i != 2:                                                      # not begun
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    ladder.main(tmp_path)
    table = capsys.readouterr().out
    assert "| mix, rate 1e-4 | 5 | 0.400 | 0.050 |" in table and "three" not in table
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    sys.modules.pop("ladder")
