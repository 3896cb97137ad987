#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-vla
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Stage 2, latent pretraining. Submit from the repository root, where .venv is; options
# of vla.py replace those below:
#   sbatch sbatch/vla.sh --data /scratch/oxe --out runs/vla_1
#   sbatch --nodes=4 --time=12:00:00 sbatch/vla.sh --data /scratch/oxe
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Two minutes before its time is up, or when it is preempted, the run leaves a checkpoint and the
# job goes back to its queue; the same command after a failure continues the run, too.
set -euo pipefail
source sbatch/slurm.sh
launch vla.py --resume auto \
  --mix bridge,fractal20220817_data --resize gpu --laq-ckpt runs/laq/laq.pt2 \
  --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct --head-width 1024 --head-depth 4 \
  --batch-size 256 --steps 30000 --final-lr 0.025 --grad-clip 10 --dtype bfloat16 \
  --keep-every 5000 --wandb "$@"
