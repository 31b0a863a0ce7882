"""``python -m bnfast``."""

import sys

from bnfast._cli import main

if __name__ == "__main__":
    sys.exit(main())
