"""`python -m draftwing`."""

import sys

from draftwing.cli import main

sys.exit(main())
