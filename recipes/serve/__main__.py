"""`python -m recipes.serve`."""

import sys

from recipes.serve.server import main

if __name__ == "__main__":
    sys.exit(main())
