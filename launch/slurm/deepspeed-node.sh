#!/usr/bin/env bash
# deepspeed.sbatch runs this once on each node: the launcher, which starts a rank for each GPU of the node, or RANKS of them.
#
# SLURM signals this shell (proctrack/cgroup) or every process of the step (other plugins), and when this shell is gone it
# kills what is left: ranks in the midst of saving. So the launcher must outlive them and return their 75. It ignores
# USR1; the ranks, which have a handler of their own, get it from here. A launcher that gets TERM passes it on, waits 30
# seconds, and returns 1, whatever the ranks did.

source launch/slurm/run.sh
hosts=$(mktemp)
reminder=
trap 'rm -f "$hosts"; [ -z "$reminder" ] || kill "$reminder"' EXIT
slots=${RANKS:-${SLURM_GPUS_ON_NODE:?no GPUs: give --gpus-per-node, or RANKS for ranks without any}}
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$slots/" >"$hosts"

on_signal() { # instead of run.sh's
    last=none
    [ -z "$asked" ] || return 0
    asked=yes
    trap '' USR1 # this shell is of the process group as well
    while kill -USR1 0; do sleep 2; done >/dev/null & # again and again: ranks that are still starting do not hear it
    reminder=$!
}

launch() {
    trap '' USR1 TERM # `deepspeed`, and the process that it starts; the latter brings a handler of TERM
    exec deepspeed --log_level warning --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --module villa_ds train "$@"
}

attend launch "$@"
if [ "$code" = 1 ] && [ -n "$asked" ]; then
    code=143 # of TERM, not of a failure
fi
exit "$code"
