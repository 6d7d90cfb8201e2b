"""A run that several processes share: how they are started, watched and ended.

    team.py     launch.py's side: starts them, sees that they move, ends them, says why they failed
    start.py    accelerate's launcher as a process of its own
    worker.py   one of the processes: `dqx.study.run.run`, and word of how it ended
    alone.py    the watch of a run that has one process
    messages.py what they tell each other, as files in a temporary folder

What the processes do together while they run is in `dqx/common/processes.py`.
"""
