"""`python -m dqx.cache`."""

from dqx.cache.command import main

main()
