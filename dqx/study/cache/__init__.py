"""What runs have computed and others need not compute again.

    key.py       the name of an artefact: a digest of what it depends on (dqx/study/facts.py), in plain words
    store.py     one JSON file per key, tensors or a folder beside it: written whole, with checksums, under a lock
    artifacts.py reused if it is there, computed by one run if not; the log says which
    owned.py     what is dqx's own, which alone is ever removed; a marker says that a folder is a cache
    space.py     how much room all of it takes, and what makes way when there is none
    command.py   `dqx cache`: list, verify, prune

    runs/cache/results/nano_facts-<digest>.json        a result, with the facts it depends on
    runs/cache/results/nano_facts-<digest>.journal.0   what process 0 of an unfinished evaluation has done
    runs/cache/results/nano_facts-<digest>.lock        held by the run that computes it, or by those that read weights
    runs/cache/quantized/<name>-<digest>.json          report and digest of a quantized model
    runs/cache/quantized/<name>-<digest>/              the model (dqx/quant/checkpoint/folder.py)
    runs/cache/quantized/<name>-<digest>.partial/      its finished blocks, where it is quantized from disk
    runs/cache/outliers/<name>-<digest>.json           outlier statistics of a model
    runs/cache/activations/<name>-<digest>.safetensors channel maxima and activation surfaces that go with them
    runs/cache/denoising/<name>-<digest>.safetensors   answers of full precision in all their states
    runs/cache/predictions/<name>-<digest>.safetensors what full precision says, for others to be compared with
    runs/cache/fidelity/<name>-<digest>.json           how far a quantized model is from that
    runs/cache/calibration/<name>-<digest>.safetensors rollouts: calibration states that the model wrote itself

So a sweep over steps or tasks quantizes once for each method and width, and a run of which everything is there loads no
weights. Windows of text and masks are drawn again each time: that takes less than reading them.

Everything here may be deleted at any time when no run is going on. Runs on several machines can share a folder if its
file system has locks (`flock`).
"""
