"""The scripts of sbatch/ with commands in place of Slurm's that note how they were called: what a
cluster of this machine's own (tests/slurm.py) does not have, containers and other clusters."""
import os
import subprocess

import pytest
from common import ROOT

FAKE = """#!/bin/sh
echo "${0##*/} $*" >>"$CALLS"
[ "${0##*/}" != sbatch ] || echo "$(wc -l <"$CALLS");$SLURM_CLUSTER_NAME"
"""


@pytest.fixture
def calls(tmp_path):
    """calls(script, argument..., VARIABLE=...) -> exit code, the Slurm commands that were called"""
    for name in ("srun", "sbatch", "scontrol", "scancel", "squeue", "timeout"):
        (tmp_path / name).write_text(FAKE.replace('>>"$CALLS"', "") if name == "timeout" else FAKE)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "calls"

    def call(*command, **variables):
        log.write_text("")
        job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
               "SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_NODELIST": "n[1-2]", "CALLS": str(log),
               "SLURM_CLUSTER_NAME": "east", "SLURM_JOB_NAME": "nanolapa-laq-race"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        p = subprocess.run(["bash", *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, **job, "PATH": path, **variables})
        return p.returncode, log.read_text().splitlines()
    return call


def test_a_container_gets_this_folder_and_the_stages_options(calls, tmp_path):
    code, (srun,) = calls("sbatch/laq.sh", "--out", tmp_path / "out", CONTAINER="image.sqsh",
                          MOUNTS="/data:/data", CACHE=str(tmp_path / "cache"))
    mounts = f"{ROOT}:{ROOT},{tmp_path}/cache:{tmp_path}/cache,/data:/data"
    assert code == 0 and srun.startswith(
        f"srun --kill-on-bad-exit=1 --container-image=image.sqsh --container-mounts={mounts} "
        f"--container-workdir={ROOT} torchrun --nnodes=2 --nproc_per_node=4 ")
    assert srun.endswith(f" --wandb --out {tmp_path}/out") and " laq.py --resume auto " in srun
    assert "container: image.sqsh" in (tmp_path / "out/job_7_0.txt").read_text()


def test_both_speaks_to_the_cluster_of_each_queue(calls):
    code, called = calls("sbatch/both.sh", "vla", "east:gpu", "idle", "--nodes=4", "--", "--out",
                         "x y")
    names = [line.split("--job-name=")[1].split()[0] for line in called[:2]]
    assert code == 0 and names[0] == names[1]
    assert called == [
        f"sbatch --clusters=east --parsable --hold --partition=gpu --job-name={names[0]} --nodes=4 "
        "sbatch/vla.sh --out x y",
        f"sbatch --parsable --hold --partition=idle --job-name={names[0]} --nodes=4 sbatch/vla.sh "
        "--out x y",
        "scontrol --clusters=east release 1", "scontrol release 2"]


def test_of_two_clusters_the_first_to_start_cancels_the_other(calls, tmp_path):
    out = tmp_path / "out"
    race = dict(RACE="race", CONTAINER="image.sqsh")
    code, called = calls("sbatch/laq.sh", "--out", out, **race, RIVAL="west:gpu")
    assert code == 0 and called[0] == \
        "scancel --clusters=west --state=PENDING --name=nanolapa-laq-race"
    assert called[1].startswith("srun ")
    code, called = calls("sbatch/laq.sh", "--out", out, **race, RIVAL="east:gpu",
                         SLURM_CLUSTER_NAME="west", SLURM_JOB_ID="9")
    assert code == 1 and called == ["scancel 9"]
    code, called = calls("sbatch/laq.sh", "--out", out, **race, RIVAL="west:gpu")
    assert code == 0 and called[1].startswith("srun ")      # requeued, it has the run still
