#!/bin/bash
# Train on all GPUs of one node:  sbatch slurm/train.sh recipe.yaml --out runs/name
# `distill train` starts a process for each GPU by itself.
#SBATCH --job-name=distill-train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append

# Activate your environment here, such as: source ~/venv/bin/activate

# Two minutes before the time is up, SIGUSR1 lets the run save and leave with status 75: run again.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it
srun distill train "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
