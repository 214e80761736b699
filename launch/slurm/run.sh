#!/usr/bin/env bash
# Sourced by the batch scripts beside it. Runs a training command in the job, tells it when the job has to give up its
# nodes, and puts the job back into the queue once the ranks have saved.
#
# What asks a job to stop is USR1 ahead of the time limit (the scripts' --signal line) or on preemption, or TERM. The ranks
# end the step they are in, save, and exit with 75; started again, the same command goes on where they stopped.

EXIT_PREEMPTED=75

asked= # by a signal; a second one says no more than the first
child=
last=

on_signal() {
    asked=yes last=none
    # To srun, which passes USR1 on to the tasks of its step. TERM would make it end the step instead.
    [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true
}
trap on_signal USR1 TERM

# attend COMMAND ...: run it to its end, whatever signals arrive meanwhile; its exit code is in $code.
attend() {
    code='' last=none
    "$@" &
    child=$!
    [ -z "$asked" ] || on_signal # it came when there was nobody to tell
    # A signal ends `wait` as well, with a code of its own. The true one is what two calls say that no signal came between,
    # with COMMAND gone.
    while kill -0 "$child" 2>/dev/null || [ "$code" != "$last" ]; do
        last=$code code=0
        wait "$child" || code=$?
    done
    child=
}

# Where the ranks meet: on the first node, at a port that two jobs of a node rarely share. Set either to decide yourself.
meet_on_first_node() {
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
}

# SLURM took the nodes back, or is about to, and the ranks were not told through this shell.
preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

# Saved; or asked to stop and ended by a signal, which is how ranks end that were still starting: nothing is lost either.
worth_requeueing() {
    [ "$code" = "$EXIT_PREEMPTED" ] || { [ "$code" -gt 128 ] && { [ -n "$asked" ] || preempted; }; }
}

# run_job COMMAND ...: the whole job. Ends the batch script: 0 done, 75 to be started again, else what went wrong.
run_job() {
    meet_on_first_node
    echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $*"
    attend "$@"
    echo "== job $SLURM_JOB_ID: exit code $code"
    if ! worth_requeueing; then
        exit "$code"
    fi
    # A job that is cancelled, or that SLURM requeues itself, is no longer RUNNING: not ours to start again.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        echo "== job $SLURM_JOB_ID: requeued"
        scontrol requeue "$SLURM_JOB_ID" || true # which ends this script, often before scontrol
    fi
    exit "$EXIT_PREEMPTED" # with RequeueExit=75 in slurm.conf this would do alone
}

: "${1:?give a recipe, then key=value ...}"
export PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Since SLURM 22.05 srun does not take this over from sbatch, and would bind each rank and its loaders to one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
