#!/usr/bin/env bash
# A run on a SLURM cluster, one process a GPU: 40 of them on 5 nodes, as the published run had.
#
#   sbatch launch/slurm.sh --config falcon_40b --out /shared/runs/falcon_40b
#
# Arguments go to `falcon-relu train`. The folder of the run, the data and the weights must lie on a disk that all nodes
# share. Submit from the folder that holds .venv, or set VENV. Fifteen minutes before its time is over, or when it is
# preempted, the job saves a checkpoint and puts itself into the queue again; it then goes on where it stopped. The time
# is what `falcon-relu plan` names as "from a stop signal to the end"; the tests hold this file to it. A cluster's
# GraceTime of preemption must allow for it too.
#
#SBATCH --job-name=relu-falcon
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=relu-falcon-%j.log
set -uo pipefail

source "${VENV:-.venv}/bin/activate"
# Compiled programs are kept, so that a job that goes on starts in a minute.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax}"
# JAX talks to the coordinator over gRPC, which would try a proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# JAX takes 75 % of a GPU's memory by itself; the plan for this run needs 90 % of an A100's.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}"

# Processes that were stopped end with 130: that one of them is quicker must not kill the others. Where one dies, the
# others notice it by themselves (--distributed.heartbeat-seconds).
srun --kill-on-bad-exit=0 --label falcon-relu train --distributed.auto "$@"
status=$?
# 130: stopped by a signal after saving; 143: before there was anything to save.
if [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
