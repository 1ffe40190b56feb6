"""`python -m dimkern`, the same as the `dimkern` command."""

import sys

from dimkern.cli import main

sys.exit(main())
