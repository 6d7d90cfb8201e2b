"""One run, from its configuration to its record.

    run.py         stage by stage: the file to read first
    stages.py      the stages, each of them reused where nothing that it depends on differs
    subjects.py    the two models of a run, loaded or made when something is computed on them
    experiment.py  a configuration as the object that a run works with, or everything that is wrong with it
    design.py      what of that object a plan has too
    checks.py      what can be wrong
    facts.py       what an outcome depends on
    costs.py       what stages take
    surroundings.py what a run finds around it, for its record
    doctor.py      `dqx doctor`, which says that and the environment in words (README.md)
    cache/         what runs have computed and others need not compute again
    estimate/      what a run will take, by the model's shapes
    plan/          `plan=true`: the runs of a sweep with their costs

What computes lies in the rooms below: `dqx.quant`, `dqx.diffusion`, `dqx.evaluate`, `dqx.diagnostics`.
"""
