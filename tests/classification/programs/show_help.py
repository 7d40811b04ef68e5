"""Show the help of a program: python show_help.py PROGRAM. Fails if that imports anything heavy."""

import runpy
import sys

program = sys.argv[1]
sys.argv = [program, "--help"]
sys.path[0] = "."
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "timm", "PIL"} & set(sys.modules)
