#!/bin/bash
# Train on several nodes, a task for each GPU:
#   sbatch --nodes=4 slurm/train-nodes.sh recipe.yaml --out /shared/runs/name
# The run directory, the data and the environment lie where every node sees them.
#SBATCH --job-name=distill-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append

# Activate your environment here, such as: source ~/venv/bin/activate

# Two minutes before the time is up, SIGUSR1 lets the run save and leave with status 75: run again.
# A task that fails ends the others within a minute (--wait); those that save leave together.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it
srun --wait=60 distill train "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
