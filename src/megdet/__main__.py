"""`python -m megdet`, the form in which torchrun starts it."""

import sys

from megdet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
