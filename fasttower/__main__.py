"""`python -m fasttower COMMAND` is the same as `fasttower COMMAND`."""

import sys

from fasttower.cli import main

sys.exit(main())
