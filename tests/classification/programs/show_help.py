"""Show the help of a program: python show_help.py PROGRAM. Fails if that imports anything heavy."""

import contextlib
import runpy
import sys

program = sys.argv[1]
sys.argv = [program, "--help"]
sys.path[0] = "."
with contextlib.suppress(SystemExit):
    runpy.run_path(program, run_name="__main__")
assert not {"torch", "timm", "PIL"} & set(sys.modules)
