"""`python -m hfmerge` is the command `hfmerge`."""

import sys

from hfmerge.cli import main


sys.exit(main())
