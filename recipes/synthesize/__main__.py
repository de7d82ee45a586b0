"""`python -m recipes.synthesize`."""

import sys

from recipes.synthesize.commands import main

if __name__ == "__main__":
    sys.exit(main())
