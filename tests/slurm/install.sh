#!/bin/sh
# Install Debian's (or Ubuntu's) Slurm for make test-slurm, unless it is there.
set -eu
PATH=$PATH:/usr/sbin:/sbin
absent=
for program in munged mungekey slurmctld slurmd sbatch srun; do
    command -v "$program" >/dev/null || absent="$absent $program"
done
[ -n "$absent" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: missing here:$absent; install the packages slurm-wlm and munge (as root: apt-get install slurm-wlm munge)" >&2
    exit 1
fi
apt-get update -q
# Their own services would get in the way.
RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge
