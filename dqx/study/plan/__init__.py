"""What a run or a sweep would do and what it would cost, without a weight, a dataset or a network.

    runs.py     one composed configuration: its work, its seconds, its memory, what stands in its way
    work.py     how many sequences go through the model, as the evaluation engine needs them
    speed.py    how long they take on this machine: random blocks of the model's shapes, timed for some seconds
    memory.py   what a run has to hold, and whether there is room: runs ask it too
    found.py    what the results cache has already
    table.py    as it is printed

`python launch.py experiment=qdlm_table1 plan=true` prints one row per run.
"""
