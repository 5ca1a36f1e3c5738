#!/bin/bash
# Ask the teachers, in an array of jobs that know nothing of each other:
#   sbatch --array=0-15 slurm/teacher-cache.sh recipe.yaml --out /shared/cache
# Each task of the array makes its part, on all GPUs that it sees. What is there already is skipped,
# so any of them may be killed, or started again, with any number of tasks.
#SBATCH --job-name=distill-cache
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append

# Activate your environment here, such as: source ~/venv/bin/activate

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it
srun distill teacher-cache "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
