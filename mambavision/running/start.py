"""Start a program as several processes on this machine: python start.py PROCESSES PROGRAM [ARGUMENT ...]

The processes find each other as under torchrun, by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Unlike
torchrun, this passes signals on and gives the run the time it needs to answer them, and ends with the exit status of
the process that failed first. NNODES, NODE_RANK, MASTER_ADDR and PORT say which part of a start on several machines
this is.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_GRACE_SECONDS = 30  # for the others to end, once a process has failed
_POLL_SECONDS = 0.1


def main() -> int:
    """Return the exit status of the program."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    nodes, node = int(os.environ.get("NNODES") or 1), int(os.environ.get("NODE_RANK") or 0)
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        print(f"error: NNODES={nodes} needs MASTER_ADDR, the address of the first machine", file=sys.stderr)
        return 2
    if not 0 <= node < nodes:
        print(f"error: NODE_RANK={node} is not one of NNODES={nodes} machines, counted from 0 on", file=sys.stderr)
        return 2
    group = {
        "WORLD_SIZE": nodes * count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": os.environ["MASTER_ADDR"] if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": os.environ.get("PORT") or 29500 if nodes > 1 else _free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or 1,  # as under torchrun: each would take all cores
    }
    processes: list[subprocess.Popen] = []
    early: list[int] = []  # signals that came before all processes were there

    def pass_on(number: int, frame: FrameType | None) -> None:
        if len(processes) < count:
            early.append(number)
        else:
            _send(processes, number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, pass_on)
    for local_rank in range(count):
        own = {"RANK": node * count + local_rank, "LOCAL_RANK": local_rank}
        variables = os.environ | {name: str(value) for name, value in (group | own).items()}
        # In a session of its own: signals to a whole group of processes, as of Ctrl-C, come once, from here.
        processes.append(subprocess.Popen([sys.executable, "-u", *command], env=variables, start_new_session=True))
    for early_number in early:
        _send(processes, early_number)
    return _wait(processes)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all processes; the failure of one ends the others. Return its exit status, or 0."""
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
    print(f"error: process {processes.index(failed)} of this machine was ended by {name}", file=sys.stderr)
    return 128 - failed.returncode


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # nothing to one that has ended


if __name__ == "__main__":
    sys.exit(main())
