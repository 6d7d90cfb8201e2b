"""What a run or a sweep would do and what it would cost, without a weight, a dataset or a network.

    runs.py     one composed configuration: its work, its seconds, its memory, what stands in its way
    table.py    as it is printed
    progress.py all runs, with a line on the terminal meanwhile

`python launch.py experiment=qdlm_table1 plan=true` prints one row per run; with `plan_gpu=h100` the hours on such a
card, and those on this machine beside them.
"""
