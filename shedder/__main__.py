"""python -m shedder: the command line."""

import sys

from shedder.cli import main

sys.exit(main())
