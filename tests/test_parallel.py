"""Two processes on a CPU: whichever way they divide the work, they learn what one does."""
import shlex
import shutil

import numpy as np
import pytest
import torch
from common import metrics, run, run_here
from safetensors.torch import load_file

import vla

# without noise; a batch holds the same samples in one process as in two
STAGES = {"laq": ["--batch-size", 8, "--quantizer", "vq", "--shift", 0, "--reseed-every", 2],
          "vla": ["--batch-size", 8, "--mode", "head"],
          "finetune": ["--batch-size", 6]}


@pytest.fixture(scope="module")
def args_of(same_episodes, single_frames, tmp_path_factory):
    """fn(stage, way) -> command line of a run, in a folder of that name."""
    folder = tmp_path_factory.mktemp("runs")
    before = {"laq": [], "vla": ["--laq-ckpt", folder / "laq_fsdp/laq.pt2"],
              "finetune": ["--init", folder / "vla_fsdp/stage2"]}

    def args(stage, way, *more):
        data = single_frames if stage == "finetune" else same_episodes
        return [f"{stage}.py", *STAGES[stage], "--data", data, "--val-fraction", 0.25, "--steps", 4,
                "--micro-batch", 1, "--eval-batches", 1, "--eval-every", 1000, "--log-every", 1,
                "--keep-every", 2, *before[stage], *more, "--out", folder / f"{stage}_{way}"]
    return args


@pytest.fixture(scope="module")
def runs(args_of, data):
    """The folder of all runs, made by one torchrun. vla's sharded one is done again from step 2."""
    fsdp, folder = ["--parallel", "fsdp"], args_of("vla", "")[-1].parent
    resume = "--resume", folder / "vla_fsdp/step_00000002.pt"
    decoded = ["--data", data, "--laq-ckpt", "pooled", "--batch-size", 8, "--steps", 1]
    lines = [args_of("laq", "ddp"), args_of("laq", "fsdp", *fsdp),
             args_of("vla", "fsdp", *fsdp), args_of("vla", "fsdp", *fsdp, *resume),
             args_of("vla", "ddp"),
             args_of("vla", "half", *fsdp, "--dtype", "bfloat16"),
             args_of("finetune", "fsdp", *fsdp), args_of("finetune", "decoded", *fsdp, *decoded)]
    run("tests/parallel.py", *(shlex.join(map(str, line)) for line in lines), processes=2)
    return folder


def assert_equal_curves(one, other, first=0, **tolerance):
    one, other = (metrics(x, "loss", "grad_norm") for x in (one, other))
    for name in one:
        assert list(other[name]) == [0, 1, 2, 3][first:]
        np.testing.assert_allclose([*other[name].values()], [*one[name].values()][first:],
                                   **tolerance)


@pytest.mark.parametrize("stage, ways", [("laq", ("ddp", "fsdp")), ("vla", ("ddp", "fsdp")),
                                         ("finetune", ("fsdp",))])
def test_two_processes_learn_what_one_does(stage, ways, runs, args_of):
    run_here(*args_of(stage, "one"))
    for way in ways:
        assert_equal_curves(runs / f"{stage}_one", runs / f"{stage}_{way}", rtol=1e-4)


def test_sharded_models_are_handed_over_whole(runs):
    for name in ("vla_WAY/stage2/trunk/model.safetensors", "vla_WAY/stage2/heads.safetensors",
                 "finetune_WAY/policy/weights.safetensors"):
        one, other = (load_file(runs / name.replace("WAY", way)) for way in ("one", "fsdp"))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-4)
    one, other = (vla.load_labeller(str(runs / f"laq_{way}/laq.pt2"), torch.device("cpu"))
                  for way in ("one", "fsdp"))
    torch.testing.assert_close(other.codebook, one.codebook, rtol=1e-3, atol=1e-4)


def test_layers_in_bfloat16_learn_about_the_same(runs):
    assert_equal_curves(runs / "vla_fsdp", runs / "vla_half", rtol=0.1)


def test_a_sharded_run_continues_on_one_process(runs, args_of, tmp_path, capsys):
    shutil.copy(runs / "vla_fsdp/step_00000002.pt", tmp_path / "last.pt")
    run_here(*args_of("vla", "")[:-2], "--resume", tmp_path / "last.pt")
    assert "was saved by 2 processes, these are 1" in capsys.readouterr().err
    assert_equal_curves(runs / "vla_fsdp", tmp_path, first=2, rtol=1e-4)


def test_a_policy_decodes_video_where_it_is_sharded(runs):
    assert np.isfinite([*metrics(runs / "finetune_decoded", "video")["video"].values()]).all()
