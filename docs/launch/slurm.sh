#!/usr/bin/env bash
# Trains on the GPUs of several nodes, a process for each GPU:
#
#   sbatch docs/launch/slurm.sh --config=hh --workdir=/shared/results/run
#
# What follows the name goes to `qrm train`; options of sbatch before it change those below. The
# environment with qrm is the one that is active when the job is submitted. A run that is longer than
# the limit: submit the same line several times with --dependency=singleton; each goes on where the
# one before saved, and one that finds the run finished ends at once.
#SBATCH --job-name=qrm
#SBATCH --nodes=2
# JAX gives the n-th process of a node its n-th GPU, so each has to see all of them: --gpus-per-task
# would hide the others, and all but the first process would find none.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# A run that gets SIGTERM saves after its step and ends.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=qrm-%j.log
set -uo pipefail

for attempt in 1 2 3; do
  # If a process dies the others end by themselves within a minute, and say why; --kill-on-bad-exit
  # would end them first, and their exit code would hide its own.
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    qrm train --coordinator=auto "$@"
  code=$?
  # 0: done, or saved after a signal; 2: bad input, which stays bad.
  [[ $code == 0 || $code == 2 ]] && exit "$code"
  echo "attempt $attempt ended with exit code $code" >&2
done
exit "$code"
