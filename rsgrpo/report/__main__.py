"""`python -m rsgrpo.report`."""

import sys

from rsgrpo.report.page import main

if __name__ == "__main__":
    sys.exit(main())
