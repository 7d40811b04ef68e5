"""Hold the lock of a folder, with a child: python hold_folder.py FOLDER"""

import os
import sys
import time
from pathlib import Path

from mambavision.running.folder_lock import FolderLock

lock = FolderLock()
lock.acquire(Path(sys.argv[1]), "")
if os.fork() == 0:  # as a worker of a data loader, which may outlive the program for a while
    print(os.getpid(), flush=True)
time.sleep(600)
