"""`python -m sparsetrain`, the same as the command `sparsetrain`."""

import sys

from sparsetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
