"""The scripts of sbatch/ on a real Slurm: two nodes on this machine, from Debian's slurm-wlm and
munge. Not one of tests/run.sh's, as it needs these packages: python -m pytest tests/slurm.py"""
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from common import ENV, ROOT, TINY, metrics, run, start

PROGRAMS = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
            for name in ("munged", "slurmctld", "slurmd")]
pytestmark = pytest.mark.skipif(not all(PROGRAMS),
                                reason="needs Slurm: apt-get install slurm-wlm munge")
OPTIONS = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
SMALL = [*TINY, "--mix", "metaworld_corner4", "--val-fraction", 0.25, "--resize", "cpu", "--dtype",
         "float32", "--no-wandb", "--grad-clip", 1, "--final-lr", 0.1]
STAGE = {"laq": ["--size", "tiny", "--no-compile", "--shift", 0, "--crop", 0, "--color", 0],
         "vla": ["--trunk", "tiny", "--head-width", 64],
         "finetune": ["--trunk", "tiny", "--head-width", 64, "--chunk", 8]}


# ------------------------------------------------------------ a cluster
@contextmanager
def daemon(log, *command, env=None):
    """A process that is ended by its id, and by itself if these tests are killed."""
    command = ["setpriv", "--pdeathsig", "TERM", *command]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=log.parent,
                                   start_new_session=True)
    try:
        yield
        assert process.poll() is None, f"{command[3]} ended\n{log.read_text()[-2000:]}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def configure(home):
    """Files of Slurm in a folder: this host twice, each time with a pretended GPU; two queues."""
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
    ports = []
    with ExitStack() as sockets:
        for _ in range(3):
            listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(listener.getsockname()[1])
    node = "NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:1"
    (home / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
KillWait=5
NodeName={host} Port={ports[1]} {node}
NodeName={host}-2 Port={ports[2]} {node}
PartitionName=one Nodes=ALL Default=YES
PartitionName=two Nodes=ALL
""")
    (home / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (home / "state").mkdir()
    (home / "munge.key").write_bytes(os.urandom(1024))
    (home / "munge.key").chmod(0o400)
    return host


class Slurm:
    """A user of the cluster."""

    def __init__(self, home):
        self.home = home
        self.env = {**ENV, "SLURM_CONF": f"{home}/slurm.conf", "INTERFACE": "lo"}
        self.options = [*OPTIONS, f"--output={home}/%x-%j.log"]

    def __call__(self, *command, **env):
        p = subprocess.run([str(x) for x in command], cwd=ROOT, text=True, capture_output=True,
                           env={**self.env, **env})
        assert p.returncode == 0, f"{command}\n{p.stdout}\n{p.stderr}"
        return p.stdout

    def submit(self, stage, *args):
        return self("sbatch", "--parsable", *self.options, f"sbatch/{stage}.sh", *args).strip()

    def state(self, job):
        return re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))[1]

    def wait(self, job, seconds=300):
        """-> state in which the job ended."""
        until = time.time() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.time() < until, f"job {job} is {state}\n{self.log(job)[-4000:]}"
            time.sleep(0.3)
        return state

    def lose_node(self, job):
        """The second node is drained, which a job survives, and fails; when the job is back in its
        queue, the node is there again."""
        def node(state):
            self("scontrol", "update", f"nodename={socket.gethostname()}-2", f"state={state}",
                 *["reason=test"] * (state != "resume"))
        node("drain")
        assert self.state(job) == "RUNNING"
        node("down")
        while self.state(job) != "PENDING":
            time.sleep(0.1)
        node("resume")

    def log(self, job):
        return "".join(path.read_text() for path in self.home.glob(f"*-{job}.log"))

    def wait_for_steps(self, job, folder, steps):
        wait_for_steps(folder, steps, lambda: self.state(job) in ("PENDING", "RUNNING"))


def wait_for_steps(folder, steps, alive):
    """Waits until a run has logged so many."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"loss"') < steps:
        assert alive(), "the run ended before"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    home = tmp_path_factory.mktemp("slurm")
    host, user = configure(home), Slurm(home)
    munged, slurmctld, slurmd = PROGRAMS
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid",
             "log-file": "munged.log", "seed-file": "munged.seed"}
    with ExitStack() as stack:
        def begin(name, *command):
            stack.enter_context(daemon(home / f"{name}.out", *command, env=user.env))
        begin("munged", munged, "--foreground", "--force",
              *(f"--{option}={home}/{name}" for option, name in files.items()))
        while not (home / "munge.socket").exists():
            time.sleep(0.05)
        begin("slurmctld", slurmctld, "-D", "-c")
        for node in (host, f"{host}-2"):
            begin(node, slurmd, "-D", "-N", node)
        until = time.time() + 30
        while user("sinfo", "-h", "-o", "%D %t").strip() != "2 idle":
            assert time.time() < until, user("sinfo", "-R", "-l")
            time.sleep(0.2)
        yield user
        user("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        while user("squeue", "-h").strip():
            time.sleep(0.2)


# ------------------------------------------------------------ what is held
def test_a_chain_survives_and_equals_runs_without_slurm(slurm, noise, tmp_path):
    """Three jobs over two nodes, the first one preempted, the second one robbed of a node, then
    rollouts; beside the same runs of two processes on one node, unbroken."""
    common = ["--data", noise, *SMALL, "--steps", 24, "--save-every", 4]
    words = {stage.upper(): " ".join(map(str, args)) for stage, args in STAGE.items()}
    out = slurm("bash", "sbatch/chain.sh", tmp_path, *slurm.options, "--", *common,
                "--keep-every", 8, "--scratch", tmp_path / "disk", **words,
                ROLLOUT="--episodes 1 --max-steps 8 --tasks drawer-open faucet-close")
    jobs = dict(re.findall(r"(\w+): job (\d+)", out))
    slurm.wait_for_steps(jobs["laq"], tmp_path / "laq", 5)
    slurm("scancel", "--batch", "--signal=USR1", jobs["laq"])
    slurm.wait_for_steps(jobs["vla"], tmp_path / "vla", 10)
    slurm.lose_node(jobs["vla"])
    for stage, job in jobs.items():
        assert slurm.wait(job) == "COMPLETED", f"{stage}\n{slurm.log(job)[-4000:]}"
    assert (tmp_path / "rollout/results.json").exists()
    assert "goes back to its queue" in slurm.log(jobs["laq"])
    for stage in ("laq", "vla"):
        again = (tmp_path / f"{stage}/job_{jobs[stage]}_1.txt").read_text()    # its second start
        assert "torch==" in again and "--steps 24" in again and "commit: " in again
    laq_ckpt = ["--laq-ckpt", tmp_path / "laq/laq.pt2"]
    inputs = {"laq": [], "vla": laq_ckpt,
              "finetune": [*laq_ckpt, "--init", tmp_path / "vla/stage2"]}
    for stage, args in STAGE.items():
        run(f"{stage}.py", *common, *args, *inputs[stage], "--out", tmp_path / "alone" / stage,
            processes=2)
        mine, alone = (metrics(x / stage, "loss")["loss"] for x in (tmp_path, tmp_path / "alone"))
        assert list(mine) == list(alone) == list(range(24))
        np.testing.assert_allclose([*mine.values()], [*alone.values()], rtol=5e-3)


def test_a_killed_rank_ends_the_job_and_is_named_first(slurm, same_episodes, tmp_path):
    """Until then its losses are those of one process, where all ranks see the same pairs."""
    args = ["--data", same_episodes, *SMALL, *STAGE["laq"], "--steps", 5000,
            "--quantizer", "vq"]                            # nsvq: noise for each rank
    job = slurm.submit("laq", *args, "--out", tmp_path / "job")
    slurm.wait_for_steps(job, tmp_path / "job", 5)
    command = f"^[^ ]*python[^ ]* -u laq.py .*{tmp_path}"
    ranks = [int(x) for x in slurm("pgrep", "-f", command).split()]
    began = time.time()
    os.kill(ranks[-1], signal.SIGKILL)
    assert slurm.wait(job, 60) == "FAILED" and time.time() - began < 60
    log = slurm.log(job)
    told = log.index(f"(pid: {ranks[-1]})")
    assert "exitcode: -9" in log[:told] and "Traceback" not in log[:told]
    alone = start("laq.py", *args, "--out", tmp_path / "alone")
    wait_for_steps(tmp_path / "alone", 5, lambda: alone.poll() is None)
    alone.terminate()
    alone.communicate(timeout=60)
    losses = [[*metrics(tmp_path / x, "loss")["loss"].values()][:5] for x in ("job", "alone")]
    np.testing.assert_allclose(*losses, rtol=5e-3)


def test_of_two_queues_that_are_free_one_runs(slurm, same_episodes, tmp_path):
    out = slurm("bash", "sbatch/both.sh", "laq", "one", "two", "--gpus-per-node=1",
                "--cpus-per-task=1", slurm.options[-1], "--", "--data", same_episodes, *SMALL,
                *STAGE["laq"], "--steps", 2, "--out", tmp_path)
    states = {job: slurm.wait(job) for job in re.findall(r"job (\d+)", out)}
    assert sorted(states.values()) == ["CANCELLED", "COMPLETED"]
    assert list(metrics(tmp_path, "loss")["loss"]) == [0, 1]
    assert len([*tmp_path.glob("job_*.txt")]) == 1


def test_a_sweep_gives_one_table(slurm, same_episodes, tmp_path):
    out = slurm("bash", "sbatch/sweep.sh", "laq", tmp_path, "--gpus-per-node=1",
                "--cpus-per-task=1", slurm.options[-1], "--", "--data", same_episodes, *SMALL,
                *STAGE["laq"], SETTINGS="--steps 1; --steps 2", SEEDS="3")
    job = re.search(r"job (\d+)", out)[1]
    for i in range(2):
        assert slurm.wait(f"{job}_{i}") == "COMPLETED"
    slurm("python3", "sbatch/sweep.py", tmp_path)
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[2].startswith("| --steps 1 | 1 | 1 ± 0 ") and len(rows) == 4
    assert list(metrics(tmp_path / "1_seed3", "loss")["loss"]) == [0, 1]


def test_a_ladder_runs_as_a_job_array(slurm, tmp_path):
    out = slurm("bash", "sbatch/ladder.sh", "--smoke", "--slurm", "--gpus-per-node=1",
                "--cpus-per-task=1", slurm.options[-1], OUT=str(tmp_path))
    job = re.search(r"job (\d+)", out)[1]
    for i in range(6):
        assert slurm.wait(f"{job}_{i}", 600) == "COMPLETED"
    slurm("bash", "sbatch/ladder.sh", "--table", OUT=str(tmp_path))
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert len(rows) == 8 and rows[2].startswith("| one batch | 8 |")
