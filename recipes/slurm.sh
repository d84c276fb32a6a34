#!/usr/bin/env bash
# train.py over several nodes under SLURM. Three minutes before the time limit it saves, and queues itself again; killed
# or out of time, the next start goes on where the last one stopped.
#     sbatch --nodes 2 --gpus-per-node 8 --time 4:00:00 recipes/slurm.sh --model DIR --stages s1 s2 s3 --lr 5e-6 --out DIR
# --out must lie on a file system that all nodes see, and this repository, too.
#SBATCH --job-name=phased-ift
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
warned=no
srun --kill-on-bad-exit=1 torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" train.py "$@" &
work=$!
# srun passes USR1 on to torchrun, torchrun to its workers, which save; at a TERM srun would kill them all at once.
trap 'warned=yes; kill -USR1 "$work"' USR1
trap 'kill -USR1 "$work"' TERM # scancel: is not queued again
wait "$work"
code=$?
while kill -0 "$work" 2>/dev/null; do # a signal ends `wait`, not the work
    wait "$work"
    code=$?
done
if [ "$warned" = yes ] && [ "$code" -ne 0 ]; then
    echo "stopped in time, queued again" >&2
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
