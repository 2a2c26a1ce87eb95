"""`longspan` and `python -m apps`: the command line over the apps in this folder and in installed packages."""

import sys

from core.training.command import main

if __name__ == "__main__":
    sys.exit(main())
