# Sourced by the train.sh and test.sh of all tasks: runs a program on one machine, in a Slurm allocation, or as a Slurm job.
#
# From the environment, all optional:
#   LAUNCH       local: on this machine; slurm: in the allocation it is started in, else as a job (default: slurm in an
#                allocation and where there is sbatch, else local)
#   GPUS         GPUs, and so processes, of each machine (default: 8 under Slurm, else those that are there; 0: the CPU)
#   PROCESSES    processes of each machine (default: GPUS, at least 1)
#   NODES        machines (default: 1; more than 1 needs Slurm)
#   PARTITION, ACCOUNT, TIME, JOB_NAME    as sbatch's options of these names
#   SBATCH_OPTIONS                        further options of sbatch, as in SBATCH_OPTIONS="--exclusive --mem=0"
#   PYTHON       interpreter (default: python)

launch() { # launch PROGRAM [ARGUMENT ...]
    local nodes=${NODES:-1} python=${PYTHON:-python} where=${LAUNCH:-$(default_launch)} gpus processes
    if [[ $where != local && $where != slurm ]]; then
        echo "error: LAUNCH=$where is not known; use local or slurm" >&2
        return 2
    fi
    gpus=${GPUS:-$(default_gpus "$where")}
    processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

    if [[ $where == local ]]; then
        if ((nodes > 1)); then
            echo "error: NODES=$nodes needs Slurm, and this is a start on one machine (no sbatch here, or LAUNCH=local)" >&2
            return 2
        fi
        if ((processes > 1)); then
            "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$@"
        else
            "$python" -u "$@"
        fi
        return
    fi

    local shape=(--nodes="$nodes" --ntasks-per-node="$processes")
    ((gpus == 0)) || shape+=(--gres=gpu:"$gpus")
    local step=(srun "${shape[@]}" --kill-on-bad-exit=1 --label "$python" -u "$@")
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        "${step[@]}"
        return
    fi
    # shellcheck disable=SC2086 # SBATCH_OPTIONS is a list of words
    sbatch "${shape[@]}" --job-name="${JOB_NAME:-$(basename "$1" .py)}" --chdir="$PWD" --output="%x-%j.log" \
        ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${TIME:+--time="$TIME"} \
        ${SBATCH_OPTIONS:-} --wrap="$(printf '%q ' "${step[@]}")" && return
    echo "error: sbatch did not take the job; with LAUNCH=local it runs on this machine" >&2
    return 1
}

default_launch() {
    if [[ -n ${SLURM_JOB_ID:-} ]] || command -v sbatch >/dev/null; then echo slurm; else echo local; fi
}

default_gpus() { # default_gpus local|slurm
    if [[ $1 == slurm ]]; then echo 8; else { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; fi
}
