#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-laq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Stage 1, latent actions. Submit from the repository root, where .venv is; options
# of laq.py replace those below:
#   sbatch sbatch/laq.sh --data /scratch/oxe --out runs/laq_1
#   sbatch --nodes=4 --time=12:00:00 sbatch/laq.sh --data /scratch/oxe
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Two minutes before its time is up, or when it is preempted, the run leaves a checkpoint and the
# job goes back to its queue; the same command after a failure continues the run, too.
set -euo pipefail
source sbatch/slurm.sh
launch laq.py --resume auto \
  --mix bridge,fractal20220817_data --resize gpu --size base --batch-size 512 --steps 50000 \
  --shift 12 --crop 0.1 --color 0.1 --dtype bfloat16 --compile --keep-every 5000 --wandb "$@"
