#!/usr/bin/env bash
#SBATCH --job-name=megdet
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120
#
# One training on Slurm, which goes on by itself when its time is over or its machines are taken:
#
#     sbatch slurm.sh RECIPE RUN [--key value ...]
#
# One task is one rank with one GPU. Two minutes before the end every rank gets SIGUSR1, finishes its step, saves it and
# ends with 75; then the job is put into the queue again. RUN must be in a folder that rank 0 sees each time.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# exec: the rank itself must get the signal. kill-on-bad-exit=0: no rank is killed while another one saves
# shellcheck disable=SC2016 # the ranks expand these variables, not this script
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    recipe=$1 run=$2
    shift 2
    exec megdet train "$recipe" --run "$run" "$@"
' rank "$@"
code=$?
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
