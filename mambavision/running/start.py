"""Start a program as several processes on this machine: python start.py PROCESSES PROGRAM [ARGUMENT ...]

The processes find each other as under torchrun, through RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Unlike torchrun, this program forwards signals, waits until the processes have handled them, and exits with the status
of the process that failed first. To start on several machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_GRACE_SECONDS = 30  # for the other processes to end after one has failed
_POLL_SECONDS = 0.1


def main() -> int:
    """Run the program and return its exit status."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    nodes, node = int(os.environ.get("NNODES") or 1), int(os.environ.get("NODE_RANK") or 0)
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        print(f"error: NNODES={nodes} needs MASTER_ADDR, the address of the first machine", file=sys.stderr)
        return 2
    if not 0 <= node < nodes:
        print(f"error: NODE_RANK={node} is not one of NNODES={nodes} machines, counted from 0", file=sys.stderr)
        return 2
    group = {
        "WORLD_SIZE": nodes * count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": os.environ["MASTER_ADDR"] if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": os.environ.get("PORT") or 29500 if nodes > 1 else _free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or 1,  # as under torchrun: each would use all cores
    }
    processes: list[subprocess.Popen] = []
    early: list[int] = []  # signals received before all processes were started

    def forward(number: int, frame: FrameType | None) -> None:
        if len(processes) < count:
            early.append(number)
        else:
            _send(processes, number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, forward)
    for local_rank in range(count):
        own = {"RANK": node * count + local_rank, "LOCAL_RANK": local_rank}
        variables = os.environ | {name: str(value) for name, value in (group | own).items()}
        # In its own session, so that signals to the whole process group, as from Ctrl-C, arrive once, from here.
        processes.append(subprocess.Popen([sys.executable, "-u", *command], env=variables, start_new_session=True))
    for early_number in early:
        _send(processes, early_number)
    return _wait(processes)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all processes, ending them if one fails; return the exit status of that one, or 0."""
    failed, deadline = None, 0.0
    while None in [process.poll() for process in processes]:
        if failed is None:
            failed = next((process for process in processes if process.returncode), None)
            if failed:
                deadline = time.monotonic() + _GRACE_SECONDS
                _send(processes, signal.SIGTERM)
        elif time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    failed = failed or next((process for process in processes if process.returncode), None)
    if failed is None:
        return 0
    if failed.returncode > 0:
        return failed.returncode
    name = signal.Signals(-failed.returncode).name
    print(f"error: process {processes.index(failed)} of this machine was killed by {name}", file=sys.stderr)
    return 128 - failed.returncode


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # has no effect on one that has ended


if __name__ == "__main__":
    sys.exit(main())
