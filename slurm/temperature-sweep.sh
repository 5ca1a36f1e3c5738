#!/bin/bash
# Train a student at each temperature, in an array of jobs that know nothing of each other:
#   sbatch --array=0-3 slurm/temperature-sweep.sh recipe.yaml --out /shared/sweep --temperatures 1,2,4,8
# Teachers that are recipes are trained before, and their cache is made best by teacher-cache.sh.
# The task that ends last compares all students and writes the report.
#SBATCH --job-name=distill-sweep
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append

# Activate your environment here, such as: source ~/venv/bin/activate

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it
srun distill temperature-sweep "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
