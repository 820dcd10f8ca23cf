"""`python -m mifo` is the command `mifo`."""

import sys

from mifo.cli import main

sys.exit(main())
