#!/usr/bin/env bash
# The same run in two queues; the job that starts first cancels the other:
#   bash sbatch/both.sh vla large preempt --nodes=4 -- --data /scratch/oxe --out runs/vla_1
# A queue is PARTITION or CLUSTER:PARTITION; clusters must share the run folder. Before -- stand
# options of sbatch, after it those of the stage.
set -euo pipefail
stage=$1 first=$2 second=$3 slurm=()
shift 3
while [ "${1:---}" != -- ]; do slurm+=("$1"); shift; done
race=$(date +%s)_$$

on() { # on QUEUE COMMAND...: a Slurm command, for the queue's cluster
  local cluster=${1%:*} command=$2
  [ "$cluster" != "$1" ] || cluster=""
  "$command" ${cluster:+"--clusters=$cluster"} "${@:3}"
}

submit() { # submit QUEUE RIVAL OPTION...: held, so that none starts before both are there
  RACE=$race RIVAL=$2 on "$1" sbatch --parsable --hold --partition="${1#*:}" \
    --job-name="nanolapa-$stage-$race" "${slurm[@]}" "sbatch/$stage.sh" "${@:3}"
}

a=$(submit "$first" "$second" "${@:2}")
b=$(submit "$second" "$first" "${@:2}")
on "$first" scontrol release "${a%;*}"
on "$second" scontrol release "${b%;*}"
echo "job ${a%;*} in $first, job ${b%;*} in $second"
