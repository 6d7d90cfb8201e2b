"""What runs have computed and others need not compute again.

    keys.py      what an artefact depends on, as facts in plain words; their digest is its name
    store.py     one JSON file per key: written whole, with a checksum, under a lock while it is computed
    journal.py   finished documents of an evaluation that is not complete, line by line
    results.py   task results of both sides of a run: reused, continued or computed

    runs/cache/results/nano_facts-<digest>.json        a result, with the facts it depends on
    runs/cache/results/nano_facts-<digest>.journal.0   what process 0 of an unfinished evaluation has done
    runs/cache/results/nano_facts-<digest>.lock        held by the run that computes it

Everything here may be deleted at any time when no run is going on. Runs on several machines can share a folder if its
file system has locks (`flock`).
"""
