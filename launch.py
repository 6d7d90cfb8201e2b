"""Run or sweep: `python launch.py [-m] GROUP=CHOICE ...`; `--help` lists the choices. `dqx run` does the same.

Sweep -> processes; nothing scientific in it. How it is done, and the exit codes: `dqx/launch/main.py`.
"""

import sys

from dqx.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
