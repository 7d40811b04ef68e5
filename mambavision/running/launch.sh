# Sourced by the train.sh and test.sh of all tasks: runs a program on one machine, in a Slurm allocation, or as a Slurm job.
#
# From the environment, all optional:
#   LAUNCH       local: on this machine; slurm: in the current allocation, otherwise as a new job (default: slurm in an
#                allocation or if sbatch is installed, otherwise local)
#   GPUS         GPUs per machine, and thus processes (default: all of the machine or allocation, 8 for a job; 0: the CPU)
#   CPUS         cores per process, for its data loader workers (default: Slurm's, usually one)
#   PROCESSES    processes per machine (default: GPUS, at least 1)
#   NODES        machines (default: those of the allocation, otherwise 1; more than 1 needs Slurm)
#   PARTITION, ACCOUNT, TIME, JOB_NAME    sbatch's options of the same names
#   SBATCH_OPTIONS                        further options of sbatch, for example SBATCH_OPTIONS="--exclusive --mem=0"
#   WARN         seconds before the time limit at which a job of train.sh saves its state and is requeued (default: 120;
#                0: never)
#   MAX_REQUEUES limit for the number of requeues (default: 100); read by the program
#   PYTHON       interpreter (default: python)

launch_training() { # launch_training PROGRAM [ARGUMENT ...]: a program that saves its state when it is asked to stop
    local warn=${WARN:-120} surviving=(--requeue)
    if [[ ! $warn =~ ^[0-9]+$ ]]; then
        echo "error: WARN=$warn is not a number of seconds" >&2
        return 2
    fi
    ((warn == 0)) || surviving+=(--signal=USR1@"$warn")
    launch "$@"
}

launch() { # launch PROGRAM [ARGUMENT ...]: replaces this shell, so that signals reach the program
    local nodes=${NODES:-} python=${PYTHON:-python} where=${LAUNCH:-$(default_launch)} gpus processes
    if [[ $where != local && $where != slurm ]]; then
        echo "error: LAUNCH=$where is unknown; use local or slurm" >&2
        return 2
    fi
    [[ -n $nodes || $where == local ]] || nodes=${SLURM_JOB_NUM_NODES:-}
    nodes=${nodes:-1}
    gpus=${GPUS:-$(default_gpus "$where")}
    processes=${PROCESSES:-$gpus}
    [[ -n ${PROCESSES:-} || $gpus != 0 ]] || processes=1
    check_counts "$nodes" "$gpus" "$processes" || return

    if [[ $where == local ]]; then
        if ((nodes > 1)); then
            echo "error: NODES=$nodes needs Slurm, but this runs on one machine only (sbatch is not installed, or LAUNCH=local)" >&2
            return 2
        fi
        ((processes > 1)) || exec "$python" -u "$@"
        exec "$python" "$(dirname "${BASH_SOURCE[0]}")/start.py" "$processes" "$@"
    fi

    local shape=(--nodes="$nodes" --ntasks-per-node="$processes")
    ((gpus == 0)) || shape+=(--gres=gpu:"$gpus")
    [[ -z ${CPUS:-} ]] || shape+=(--cpus-per-task="$CPUS") # also for srun, which does not inherit it from the job
    local step=(srun "${shape[@]}" --kill-on-bad-exit=1 --label "$python" -u "$@")
    [[ -z ${SLURM_JOB_ID:-} ]] || exec "${step[@]}"
    # shellcheck disable=SC2086 # SBATCH_OPTIONS is a list of words
    sbatch "${shape[@]}" --job-name="${JOB_NAME:-$(basename "$1" .py)}" --chdir="$PWD" --output="%x-%j.log" \
        --open-mode=append ${surviving[@]+"${surviving[@]}"} \
        ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${TIME:+--time="$TIME"} \
        ${SBATCH_OPTIONS:-} --wrap="$(printf '%q ' "${step[@]}")" && return
    echo "error: sbatch refused the job; use LAUNCH=local to run on this machine" >&2
    return 1
}

check_counts() { # check_counts NODES GPUS PROCESSES
    local name
    for name in "NODES=$1" "GPUS=$2" "PROCESSES=$3"; do
        if [[ ! ${name#*=} =~ ^(0|[1-9][0-9]*)$ || $name == NODES=0 || $name == PROCESSES=0 ]]; then
            echo "error: $name is not valid; NODES and PROCESSES are numbers from 1, GPUS from 0" >&2
            return 2
        fi
    done
    if (($2 > 0 && $3 > $2)); then
        echo "error: PROCESSES=$3 is more than GPUS=$2 of a machine; each process needs its own GPU" >&2
        return 2
    fi
}

default_launch() {
    if [[ -n ${SLURM_JOB_ID:-} ]] || command -v sbatch >/dev/null; then echo slurm; else echo local; fi
}

default_gpus() { # default_gpus local|slurm
    if [[ $1 == slurm ]]; then echo "${SLURM_GPUS_ON_NODE:-8}"; else { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; fi
}
