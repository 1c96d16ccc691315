"""`python -m hfmerge.hubserver`: the server in the foreground."""

from __future__ import annotations

import sys

from hfmerge.hubserver.serve import main_serve


if __name__ == "__main__":
    sys.exit(main_serve(sys.argv[1:]))
