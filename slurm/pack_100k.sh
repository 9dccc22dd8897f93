#!/usr/bin/env bash
# Pack VGGSound-AVEL100k into shards with 16 jobs at once, finished by one more:
#
#   sbatch slurm/pack_100k.sh --csv vggsound-avel100k.csv --categories VggsoundAVEL100kCategories.txt \
#       --visual VIDEO_DIR --audio AUDIO_DIR --labels LABEL_DIR_OR_JSON --out data/avel100k-shards
#   sbatch --array 0-63 slurm/pack_100k.sh ...               as many jobs as you like
#   sbatch slurm/pack_100k.sh --layout ave-h5 --source ...   another layout
#
# Everything behind the script's name goes to `cpsp-dist shards pack`. The same sbatch command once more resumes where an
# earlier one ended: finished shards are kept.
#
#SBATCH --job-name=cpsp-pack
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
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
pack=(python -m cpsp_dist shards pack --layout avel100k-zip --workers "${SLURM_CPUS_PER_TASK:-1}" "$@")

if [ -n "${CPSP_FINISH:-}" ]; then
    exec "${pack[@]}"
fi
if [ $portion = 0 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    # Runs when all portions are made; never, where one of them failed. Its log goes beside this one.
    log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    CPSP_FINISH=1 sbatch --export=ALL --array=0 --job-name="$SLURM_JOB_NAME-finish" --kill-on-invalid-dep=yes \
        ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} \
        --dependency="afterok:$SLURM_ARRAY_JOB_ID" --output="${log%/*}/%x-%j.log" "$0" "$@" ||
        echo "cannot submit the last job: when all are done, give this command: ${pack[*]}"
fi
exec "${pack[@]}" --portion "$portion/$SLURM_ARRAY_TASK_COUNT"
