"""What a run leaves behind, and what can be read from it.

folder.py         the folder of a run and all that it holds: `Record`
settings.py       what was run, read once from a configuration
deltas.py, significance.py   what quantization cost, and what chance could explain of it
summary.py        a record in a few numbers
words.py          what was run, in words; numbers as people read them
collection.py     finished runs below any folders
compare.py        two runs against each other
outcomes.py       what became of the runs of one launch
"""
