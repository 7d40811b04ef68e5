# Sourced by dist_train.sh and dist_test.sh of detection and segmentation: runs the program beside them on several GPUs
# of each machine. train.sh and test.sh need fewer arguments and support Slurm.
#
# From the environment, all optional:
#   NNODES        number of machines; start the script on each (default: 1)
#   NODE_RANK     number of this machine, counted from 0 (default: 0)
#   MASTER_ADDR   address of the first machine, if there are several
#   PORT          free port there (default: 29500)
#   PYTHON        interpreter (default: python)

distribute() { # distribute PROGRAM "NAME_OF_ARGUMENT ..." [ARGUMENT ...] GPUS [OPTION ...]
    local program=$1 script=${0##*/} names count gpus
    read -ra names <<<"$2"
    shift 2
    count=${#names[@]}
    if (($# <= count)); then
        echo "error: $script needs at least $((count + 1)) arguments: $script ${names[*]} GPUS [OPTION ...]" >&2
        return 2
    fi
    gpus=${*:count+1:1}
    if [[ ! $gpus =~ ^[1-9][0-9]*$ ]]; then
        echo "error: GPUS must be a number from 1, got $gpus: $script ${names[*]} GPUS [OPTION ...]" >&2
        return 2
    fi
    exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/start.py" "$gpus" \
        "$(dirname "${BASH_SOURCE[1]}")/$program" "${@:1:count}" "${@:count+2}"
}
