"""W&B's own agent and sweep engine, without W&B's server: `python sweep_agent.py SPEC.json FOLDER STEPS`.

The agent executes the sweep's command STEPS times. The server's part, to choose the next settings from what finished
runs have in their summaries, is played by W&B's sweep engine; summaries are read from the offline runs below FOLDER.
The runs are printed as JSON. The replaced functions of wandb are private: of version 0.31.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import sweeps
import wandb
import yaml
from wandb import wandb_agent
from wandb.apis.public import sweeps as public
from wandb_offline import read_back


class Server:
    def __init__(self, spec: dict[str, Any], folder: Path, steps: int):
        self.spec, self.folder, self.steps = sweeps.SweepConfig(spec), folder, steps
        self.runs: list[sweeps.SweepRun] = []

    def heartbeat(self, api: object, agent: str, metrics: object, states: dict[str, bool]) -> list[dict[str, Any]]:
        """Nothing while a run is on; then the next settings."""
        if any(states.values()):
            return []
        if self.runs:
            self.finish(self.runs[-1])
        proposed = sweeps.next_run(self.spec, self.runs) if len(self.runs) < self.steps else None
        if proposed is None:
            return [{"type": "exit"}]
        settings = {name: {"value": plain(entry["value"])} for name, entry in proposed.config.items()}
        name = f"step{len(self.runs)}"
        self.runs.append(sweeps.SweepRun(name=name, config=settings, state=sweeps.RunState.running))
        return [{"type": "run", "run_id": name, "program": self.spec["program"], "args": settings}]

    def finish(self, run: sweeps.SweepRun) -> None:
        if run.state == sweeps.RunState.running:
            (offline,) = self.folder.glob(f"*/wandb/offline-run-*-{run.name}")
            run.summary_metrics = read_back(offline)[1]
            run.state = sweeps.RunState.finished


def plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def main() -> None:
    spec, folder, steps = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    server = Server(spec, folder, steps)
    public._sweep_with_runs = lambda *_, **__: {"config": yaml.safe_dump(spec)}
    public._register_agent = lambda *_, **__: {"id": "agent"}
    public._agent_heartbeat = server.heartbeat
    wandb.Api = lambda *_, **__: object()
    wandb_agent.Agent.POLL_INTERVAL = 0.2
    os.environ["WANDB_SWEEP_ID"] = "sweep"
    wandb_agent.Agent(object(), multiprocessing.Queue(), sweep_id="sweep").run()
    print(json.dumps([{"settings": run.config, "summary": run.summary_metrics} for run in server.runs]))


if __name__ == "__main__":
    main()
