"""A Slurm of two nodes with eight declared GPUs each, all on this machine and in a folder of its own."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_START_SECONDS = 60
_STOP_SECONDS = 20

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
AuthType=auth/munge
# Slurm starts a job again only after the credentials of its last start have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=64 RealMemory=100000 Gres=gpu:8
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Starts when it is entered, and leaves no process behind.

    Args:
        folder: New folder for its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)  # else munge finds its socket out of reach
        first = _free_ports()
        settings = {"host": host, "user": getpass.getuser(), "folder": folder, "control_port": first}
        (folder / "slurm.conf").write_text(_CONFIGURATION.format(ports=f"{first + 1}-{first + 2}", **settings))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()
        subprocess.run([_program("mungekey"), f"--keyfile={folder}/munge.key"], check=True)
        self._run(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self._wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._run("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._run("slurmd", "-D", "-N", node)
        self._wait(lambda: self.ask("sinfo", "-h", "-o", "%D %t", check=False).strip() == "2 idle", "slurmd")

    def _run(self, program: str, *words: str) -> None:
        log = (self.folder / "daemons.log").open("a")
        command = [_program(program), *words]
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def _wait(self, condition, name: str) -> None:
        until = time.monotonic() + _START_SECONDS
        while not condition():
            ended = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > until:
                raise RuntimeError(f"{(ended or [name])[0]} does not start; {self.folder} has its logs")
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if self._daemons:
            user = getpass.getuser()
            self.ask("scancel", f"--user={user}", "--signal=KILL", "--full", check=False)  # unanswerable
            self.ask("scancel", f"--user={user}", check=False)
            until = time.monotonic() + _STOP_SECONDS
            while self.ask("squeue", "-h", check=False).strip() and time.monotonic() < until:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()

    def ask(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", number)))


def _free_ports(count: int = 3) -> int:
    """Return the first of some neighbouring ports that are free now."""
    for first in range(17000, 20000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports")
