"""launch.py under `accelerate launch` or `torchrun`: refused, with the command that does what was meant.

There each process would be a launch of its own, with a folder and a command line of its own, and who ends them and why
could not be told. What accelerate was told, on its command line or by `accelerate config`, would be contradicted by
`dispatch` (how many processes), or do nothing here (mixed precision, FSDP, DeepSpeed, a compiler, several machines).
Moreover `accelerate launch --cpu` starts one process, whatever number it is given. dqx starts the processes of a run
itself (`workers/`), by accelerate's launcher but without its configuration.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

#: What `torchrun` and `accelerate launch` leave in the environment of the processes that they start.
SIGNS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


def is_foreign(environment: Mapping[str, str]) -> bool:
    """Whether this process was started by one of them."""
    return environment.get("WORLD_SIZE", "1") != "1" or any(sign in environment for sign in SIGNS)


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one that says so. The others leave with exit code 0, or this one would be ended."""
    return environment.get("LOCAL_RANK", "0") == "0"


def refusal(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Why it is refused, and what to type. `argv` is the command line, the program first."""
    command, more = instead(argv, environment), ""
    if "MASTER_ADDR" in environment and "RANK" not in environment:
        more = " (with dispatch=2 for two processes: accelerate launch --cpu starts one, whatever --num_processes says)"
    return (
        "launch.py starts the processes that share a run itself, without accelerate launch or torchrun; "
        f"type this instead{more}:\n  {command}"
    )


def instead(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command line for what was meant: as many processes on a machine, and the CPU where that was asked for.

    What the command line says itself stays.
    """
    program, *arguments = argv
    said = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    count = environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE"))
    if count and "dispatch" not in said:
        arguments.append(f"dispatch={count}")
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "model.device" not in said:
        arguments.append("model.device=cpu")
    return shlex.join([*(["python", program] if program.endswith(".py") else program.split()), *arguments])
