# Sourced by the scripts that Slurm runs, from the repository root: how a stage is started on all
# nodes of a job, stopped before its time is up, and continued. What a cluster may need, each an
# environment variable:
#   INTERFACE=ib0           network interface of NCCL and gloo, where they choose a wrong one
#   CACHE=/scratch/me       where models, datasets and temporary files go; all nodes must see it
#   CONTAINER=image.sqsh    run in this image (enroot with pyxis) instead of .venv
#   MOUNTS=/data:/data,...  what the container sees besides this folder and CACHE
if [ -n "${INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
if [ -n "${CACHE:-}" ]; then
  export HF_HOME=$CACHE/huggingface TFDS_DATA_DIR=$CACHE/tfds TMPDIR=$CACHE/tmp
  mkdir -p "$TMPDIR"
fi
if [ -n "${CONTAINER:-}" ]; then
  mounts=$PWD:$PWD${CACHE:+,$CACHE:$CACHE}${MOUNTS:+,$MOUNTS}
  container=(--container-image="$CONTAINER" --container-mounts="$mounts"
             --container-workdir="$PWD")
else
  container=()
  source .venv/bin/activate
fi
processes=${SLURM_GPUS_ON_NODE:-1}                          # a node: one a GPU
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}         # srun does not take it from sbatch
OMP_NUM_THREADS=$((SRUN_CPUS_PER_TASK / processes))
export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
if ! timeout 3 bash -c ': </dev/tcp/api.wandb.ai/443' 2>/dev/null; then     # no network here
  export WANDB_MODE=${WANDB_MODE:-offline}                  # later: wandb sync OUT/wandb/*
  export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}                # trunks must be in CACHE
fi

launch() { # launch SCRIPT ARGUMENT...: one torchrun a node; they meet at the first node, this one
  local out=runs/${1%.py} row stage code=0 warned=''
  if [ -n "${SWEEP:-}" ]; then                              # sweep.sh: this run's line of a file
    read -ra row < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SWEEP")
    set -- "$@" "${row[@]}"
  fi
  folder_of "$@"
  mkdir -p "$out"
  [ -z "${RACE:-}" ] || win
  record "$@" >"$out/job_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}.txt" 2>&1 || true

  trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1       # all but this shell
  trap : TERM                                               # Slurm has told them
  rm -f "$out/stopped"
  srun --kill-on-bad-exit=1 "${container[@]}" torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" --shutdown-timeout=50 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$(hostname):$((10000 + SLURM_JOB_ID % 20000))" "$@" &
  stage=$!
  wait $stage || true                                       # a signal ends wait, not the stage
  while kill -0 $stage 2>/dev/null; do wait $stage || true; done
  wait $stage || code=$?
  [ -e "$out/stopped" ] && warned=1                         # preempted: only the stage was told
  if [ $code != 0 ] && [ -n "$warned" ] &&
     [ "$(squeue -h -o %T -j "$SLURM_JOB_ID")" = RUNNING ]; then    # else it was cancelled
    echo "stopped before its end; the job goes back to its queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit $code
}

folder_of() { # folder_of ARGUMENT...: sets out to that of --out, if it is among them
  while [ $# -gt 0 ]; do
    case $1 in
      --out) out=$2 ;;
      --out=*) out=${1#--out=} ;;
    esac
    shift
  done
}

win() { # both.sh: this job has the run, and cancels the other, or the other way round
  local mine=$SLURM_CLUSTER_NAME:$SLURM_JOB_ID lock=$out/race_$RACE cluster=${RIVAL%:*}
  [ "$cluster" != "$RIVAL" ] || cluster=""
  ln -s "$mine" "$lock" 2>/dev/null || true                 # atomic: one of two makes it
  if [ "$(readlink "$lock")" != "$mine" ]; then
    echo "this run started as job $(readlink "$lock") first"
    scancel "$SLURM_JOB_ID"
    exit 1
  fi
  scancel ${cluster:+"--clusters=$cluster"} --state=PENDING --name="$SLURM_JOB_NAME"
}

record() { # record ARGUMENT...: what a run is made of
  echo "command: $*"
  echo "hosts: $SLURM_JOB_NODELIST, $processes processes each"
  echo "commit: $(git rev-parse HEAD)"
  git diff HEAD
  [ -n "${CONTAINER:-}" ] && echo "container: $CONTAINER" || python -m pip freeze
}
