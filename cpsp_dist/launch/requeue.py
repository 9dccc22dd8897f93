"""Whether a Slurm job that ended is started again: the one policy, of `cpsp-dist launch` and of slurm/train_100k.sh.

It is bash, as it runs in the batch script, where Python may exist in the container of srun's ranks alone. The jobs of
`cpsp-dist launch` hold `POLICY`; train_100k.sh holds the same text, which a test compares.
"""

from __future__ import annotations

from cpsp_dist.utils.errors import EXIT_LOST_RANK, EXIT_REQUEUE

#: New starts of a job after a lost rank (no memory left, a GPU gone), or in a row that save nothing new; after a signal
#: with a newer checkpoint there is no limit.
RETRIES = 3

POLICY = f"""\
# requeue_reason CODE FILE RETRIES: why a job that ended with CODE is started again, or nothing. CODE is the highest of
# the ranks': a user's mistake or an error ends the job. FILE keeps count of lost ranks over the starts of a job,
# FILE.idle (by the training, which CPSP_IDLE_STARTS names it to) of starts since the last checkpoint.
requeue_reason() {{
    if [ "$1" -eq {EXIT_REQUEUE} ]; then
        if [ -f "$2.idle" ] && [ "$(wc -l <"$2.idle")" -gt "$3" ]; then
            echo "no newer checkpoint in $(wc -l <"$2.idle") starts: the time limit may be too short" >&2
        else
            echo 'stopped by a signal, all is saved'
        fi
    elif [ "$1" -eq {EXIT_LOST_RANK} ] || [ "$1" -gt 128 ]; then # lost, or killed
        echo "$1" >>"$2" && [ "$(wc -l <"$2")" -le "$3" ] && echo 'a rank was lost'
    fi
}}
"""
