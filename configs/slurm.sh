#!/bin/bash
# Two nodes of eight GPUs under SLURM; goes on by itself when its time is up. Adapt the lines with #SBATCH to your cluster.
#   sbatch configs/slurm.sh --config configs/sit_xl2_vca.yaml --data.images /data/imagenet/train --latents /data/latents
#SBATCH --job-name=vca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# One task a GPU, without a launcher between: so the signal reaches train.py, and its exit code reaches us.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=0 --wait=120 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python train.py "$@"' train "$@"
code=$?
if [ "$code" -eq 75 ]; then  # stopped by a signal, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
