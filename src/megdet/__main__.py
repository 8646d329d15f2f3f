"""`python -m megdet`, the form that torchrun starts."""

import sys

from megdet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
