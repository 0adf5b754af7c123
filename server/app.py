"""The ServerApp that Flower runs: it opens the run's directory and plays the rounds over Flower's Grid."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedge.server import progress
from fedge.server.rounds import run
from fedge.server.run_directory import RunDirectory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or continue, the federation of ``run-dir`` in Flower's run configuration."""
    directory = RunDirectory(Path(str(context.run_config["run-dir"])))
    run(grid, directory, context.run_id, progress.current())
