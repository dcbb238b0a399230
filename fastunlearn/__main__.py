"""``python -m fastunlearn``, so that launchers can start it."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
