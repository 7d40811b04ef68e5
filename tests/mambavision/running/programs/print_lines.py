"""Print many lines and odd characters: python print_lines.py DONE [NAME]"""

import logging
import sys
from pathlib import Path

from mambavision.errors import DataError
from mambavision.running.logs import start_logging
from mambavision.running.program import run_cli


def main():
    start_logging()
    for number in range(20_000):
        print("a line that fills the pipe", number)
    logging.getLogger("mambavision").info("a line with %s", "\x1b[2J and \n inside")
    print("é…\udcff")
    Path(sys.argv[1]).write_text("finished")
    if len(sys.argv) > 2:
        raise DataError(f"{sys.argv[2]}: is wrong.")


run_cli(main)
