"""One of several processes, which prints who it is: python report_process.py (fail|die|wait|WORD) [WORD ...]"""

import os
import signal
import sys
import time

signals = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
rank = int(os.environ["RANK"])
if sys.argv[1] == "fail":
    if rank == 1:
        time.sleep(0.3)
        sys.exit(75)
    while not signals:
        time.sleep(0.01)
    sys.exit(3)
if sys.argv[1] == "die":
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
line = " ".join(os.environ[name] for name in names) + " " + " ".join(sys.argv[1:]) + "\n"
os.write(1, line.encode())
while sys.argv[1] == "wait" and not signals:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(sum(signals))
