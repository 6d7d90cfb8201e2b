"""`python -m dqx.cache`."""

import sys

from dqx.cache.command import main

sys.exit(main())
