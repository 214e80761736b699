#!/usr/bin/env bash
# Installs SLURM's programs unless they are there. No service is started: the tests start daemons of their own.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing() {
    for program in slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

give_up() {
    printf 'make test-slurm needs these programs of SLURM: %s\n%s\n' "$(missing | xargs)" "$1" >&2
    exit 1
}

[ -n "$(missing)" ] || exit 0
command -v apt-get >/dev/null || give_up "They can be installed here only with apt-get (Debian, Ubuntu), which is not there: install SLURM by hand."
[ "$(id -u)" = 0 ] || give_up "Installing them needs root: sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client"
policy=/usr/sbin/policy-rc.d # while it says 101, apt-get starts no service that it installs
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || give_up "apt-get update failed."
apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client || give_up "apt-get could not install them."
[ -z "$(missing)" ] || give_up "apt-get installed SLURM without them."
