"""What a run will take, by the model's shapes alone.

    work.py     how many sequences go through the model, as the evaluation engine needs them
    sizes.py    how large the benchmarks are
    speed.py    how long work takes on this machine: random blocks of the model's shapes, timed for some seconds
    gpus.py     what makers publish of GPUs, to plan for one that is not here
    memory.py   what a run has to hold, and whether there is room

A plan asks all of them, a run the last.
"""
