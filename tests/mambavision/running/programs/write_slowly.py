"""Write a file and never finish it: python write_slowly.py FILE"""

import sys
import time

from mambavision.files import replacing

with replacing(sys.argv[1]) as file:
    print("writing", flush=True)
    time.sleep(600)
