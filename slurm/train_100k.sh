#!/usr/bin/env bash
# Train CPSP on VGGSound-AVEL100k, one rank for each GPU:
#
#   sbatch slurm/train_100k.sh                                          2 nodes of 8 GPUs
#   sbatch --nodes 4 slurm/train_100k.sh train.seed=2                   other resources, other settings
#   sbatch slurm/train_100k.sh configs/avel100k_weak.yaml engine.zero=2   another config
#
# Resources are sbatch's flags. Everything else is a config file (default: configs/avel100k_full.yaml) and settings on
# top of it. Paths are relative to the folder where sbatch is called; a config that is not there is the package's own.
#
#SBATCH --job-name=cpsp
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#
# What a site wants besides, on sbatch's command line or as lines here:
##SBATCH --partition=...
##SBATCH --account=...

# --- What python is. One of these, or the environment in which sbatch was called.
# module load python cuda
# source /path/to/conda/etc/profile.d/conda.sh && conda activate cpsp
# container=(--container-image=... --container-mounts=...)      (pyxis; used by srun below)
if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi
# --- On clusters with several networks: the one between the nodes.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A job that lost a rank (no memory left, a GPU gone), or saves nothing new, is started again so often; after a signal
# with a newer checkpoint, always.
LOST_RANKS=3

config=configs/avel100k_full.yaml
case ${1:-} in '' | -* | *=*) ;; *) config=$1 && shift ;; esac

# srun itself no longer looks at the job's --cpus-per-task.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"

job=$(scontrol show job "$SLURM_JOB_ID")
log=$(sed -n 's/^ *StdErr=//p' <<<"$job")
export CPSP_IDLE_STARTS=${log%.log}.lost.idle
case $(sed -n 's/.* TimeLimit=\([^ ]*\).*/\1/p' <<<"$job") in 00:0[0-4]:* | 00:05:00)
    echo "error: --time has to be more than the 5 minutes ahead of its end at which Slurm's signal stops the training"
    exit 2
    ;;
esac

# Ranks inform and end each other, all with the same exit code: srun leaves that to them, for two minutes.
srun --cpu-bind=cores --kill-on-bad-exit=0 --wait=120 "${container[@]}" \
    python -m cpsp_dist.train --config "$config" "$@" &

# Slurm signals this script 5 minutes before the time is over, and before a preemption; the ranks then save and end with
# exit code 75. TERM comes from a cancellation or a requeue that Slurm itself has under way, to the ranks too.
signalled='' ending=''
trap 'signalled=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'signalled=1 ending=1' TERM
code=130
while [ $code -gt 128 ]; do
    signalled=''
    wait $!
    code=$?
    [ -n "$signalled" ] || break
done

# requeue_reason CODE FILE RETRIES: why a job that ended with CODE is started again, or nothing. CODE is the highest of
# the ranks': a user's mistake or an error ends the job. FILE keeps count of lost ranks over the starts of a job,
# FILE.idle (by the training, which CPSP_IDLE_STARTS names it to) of starts since the last checkpoint.
requeue_reason() {
    if [ "$1" -eq 75 ]; then
        if [ -f "$2.idle" ] && [ "$(wc -l <"$2.idle")" -gt "$3" ]; then
            echo "no newer checkpoint in $(wc -l <"$2.idle") starts: the time limit may be too short" >&2
        else
            echo 'stopped by a signal, all is saved'
        fi
    elif [ "$1" -eq 69 ] || [ "$1" -gt 128 ]; then # lost, or killed
        echo "$1" >>"$2" && [ "$(wc -l <"$2")" -le "$3" ] && echo 'a rank was lost'
    fi
}

# No new start where Slurm is ending the job itself.
again=$(requeue_reason $code "${log%.log}.lost" $LOST_RANKS)
if [ -n "$again" ] && [ -z "$ending" ]; then
    echo "exit code $code: $again; requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit $code
    echo "cannot requeue this job: give the same sbatch command again, it resumes from the newest checkpoint"
elif [ $code != 0 ]; then
    # The last error in the log, its lines made one; other ranks' and Slurm's own may stand between them.
    reason=$(tail -n 1000 "$log" | awk '
        /^(error: |[A-Za-z_.]*(Error|Exception)(: |$))/ { said = $0; more = 1; next }
        more && /^  / { if (!index(said ";", $0 ";")) said = said (said ~ /: *$/ ? "" : ";") $0; next }
        /^(srun|slurmstepd): / { next }
        { more = 0 }
        END { gsub(/ +/, " ", said); print said }')
    echo "exit code $code, not requeued: ${reason:-see above}"
fi
exit $code
