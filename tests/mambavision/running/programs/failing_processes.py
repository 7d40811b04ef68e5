"""Programs of three processes of which some fail: python failing_processes.py FOLDER SCENARIO ...

Each scenario is started by nothing that would end the others when one fails. Prints the exit statuses by scenario.
"""

import json
import os
import signal
import socket
import sys
import time

from mambavision.errors import DataError, UserError
from mambavision.running import failure
from mambavision.running.group import Group
from mambavision.running.process import this_process
from mambavision.running.program import run_cli

failure._GRACE_SECONDS = failure._FIRST_RANK_SECONDS = 2.0
RANKS = 3


def work(scenario):
    process = this_process()
    group = Group(process)
    if scenario == "option" or (scenario == "option of one" and process.rank == 1):
        raise UserError("no such option")
    if scenario == "option of one":
        time.sleep(5)
        return
    group.join()
    group.any([False])
    time.sleep(1)
    if scenario == "all" or (scenario, process.rank) in (("first", 0), ("last", 2)):
        raise ValueError("the cause")
    if process.rank == 1:
        if scenario in ("one", "blocked"):
            raise ValueError("the cause")
        if scenario == "data":
            raise DataError("a broken image")
        if scenario == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "blocked":
        time.sleep(100)
    if scenario == "interrupted":
        os.kill(os.getpid(), signal.SIGTERM)
    group.any([False])
    group.leave()


def start(scenario, folder):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{scenario} {rank}.json"
            output = os.open(f"{folder}/{scenario}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                run_cli(lambda: work(scenario))
            except SystemExit as end:
                os._exit(end.code)
            os._exit(0)
        children.append(child)
    return children


folder, *scenarios = sys.argv[1:]
children = {scenario: start(scenario, folder) for scenario in scenarios}
ends = {
    scenario: [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in family]
    for scenario, family in children.items()
}
print(json.dumps(ends))
