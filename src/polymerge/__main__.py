"""`python -m polymerge` is `polymerge`."""

import os
import sys

try:
    here = os.getcwd()  # noqa: PTH109 (pathlib might come from there)
except OSError:  # it has been removed
    here = ""
if sys.path[:1] in ([""], [here]):
    del sys.path[0]  # a checkpoint's folder may be the current one, and its files are no modules

from polymerge.cli import main

if __name__ == "__main__":
    main()
