"""`python -m hfmerge` is the command `hfmerge`."""

import sys

from hfmerge.cli.main import main


sys.exit(main())
