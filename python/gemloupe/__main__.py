"""`python -m gemloupe` is `gemloupe`."""

import sys

from gemloupe.cli import main

sys.exit(main())
