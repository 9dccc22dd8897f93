#!/usr/bin/env bash
# Accuracy of a trained run's best weights, by category and by second, on one GPU:
#
#   sbatch slurm/eval_100k.sh runs/avel100k_full
#   sbatch slurm/eval_100k.sh runs/avel100k_full --split val --json
#
# Everything behind the script's name goes to `cpsp-dist evaluate`.
#
#SBATCH --job-name=cpsp-eval
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --output=%x-%j.log

# --- What python is: see train_100k.sh.
if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
exec python -m cpsp_dist evaluate "$@"
