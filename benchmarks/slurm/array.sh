#!/bin/bash
# Runs a suite on as many nodes as the array has tasks; every task takes the next job that
# nobody works on.  Submit it as often as wanted:
#
#   sbatch --array=0-7 benchmarks/slurm/array.sh classic /shared/results/classic
#
# Arguments: a suite, a results folder that all nodes share, further options of
# `offrl benchmark`.
#SBATCH --job-name=offrl
#SBATCH --time=04:00:00
#SBATCH --cpus-per-task=8
#SBATCH --output=offrl-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM two minutes before the limit: what runs is saved, and the task starts again.
#SBATCH --signal=TERM@120
suite=$1
results=$2
shift 2
srun offrl benchmark "$suite" --results "$results" "$@"
code=$?
case $code in
  130 | 143) # stopped by the signal: with everything saved, or outside of any job
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    exit 0
    ;;
  5) # nothing is left but what other tasks work on
    exit 0
    ;;
esac
exit $code
