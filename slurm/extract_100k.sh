#!/usr/bin/env bash
# Extract the features of VGGSound-AVEL100k's videos into shards with 16 GPUs, one a job, finished by one more job:
#
#   sbatch slurm/extract_100k.sh --videos VIDEO_DIR --csv vggsound-avel100k.csv --labels vggsound-avel100k_annos.json \
#       --categories VggsoundAVEL100kCategories.txt --visual vgg19 --audio vggish --out data/avel100k-shards
#   sbatch --array 0-63 slurm/extract_100k.sh ...            as many jobs as you like
#
# Everything behind the script's name goes to `cpsp-dist extract --shards`; what it will take: the same with `--plan`.
# Videos that cannot be extracted are left out and listed in report.jsonl (`--on-error raise` stops at the first). The
# same sbatch command once more resumes where an earlier one ended: what is complete is kept. Weights are fetched once
# where nodes have a network; else give --visual-weights and --audio-weights.
#
#SBATCH --job-name=cpsp-extract
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue

# --- What python is: see train_100k.sh.
if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi

if [ $((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1)) != "$SLURM_ARRAY_TASK_COUNT" ]; then
    echo "error: --array of $SLURM_ARRAY_TASK_COUNT numbers from $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX has gaps;" \
        "give a range, as --array 0-15: each job makes one portion, and the same command again keeps what is finished"
    exit 2
fi
portion=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
extract=(python -m cpsp_dist extract --shards --on-error skip --workers "${SLURM_CPUS_PER_TASK:-1}" "$@")

if [ -n "${CPSP_FINISH:-}" ]; then
    exec "${extract[@]}"
fi
if [ $portion = 0 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    # Runs when all portions are made; never, where one of them failed. Its log goes beside this one.
    log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    CPSP_FINISH=1 sbatch --export=ALL --array=0 --job-name="$SLURM_JOB_NAME-finish" --kill-on-invalid-dep=yes \
        ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} \
        --dependency="afterok:$SLURM_ARRAY_JOB_ID" --output="${log%/*}/%x-%j.log" "$0" "$@" ||
        echo "cannot submit the last job: when all are done, give this command: ${extract[*]}"
fi
exec "${extract[@]}" --portion "$portion/$SLURM_ARRAY_TASK_COUNT"
