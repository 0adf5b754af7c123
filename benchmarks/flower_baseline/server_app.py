"""A plain Flower ServerApp: FedAvg over all sites, as the strategy comes."""

import time
from pathlib import Path

from client_app import network
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and note when each ended."""
    config = context.run_config
    sites = int(config["sites"])
    times = str(config["times"])

    def note(server_round: int, _: ArrayRecord) -> None:
        # Flower calls this before the first round and after each: the rounds' boundaries.
        if times:
            with Path(times).open("a") as file:
                file.write(f"{server_round} {time.time():.3f}\n")

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=1.0 if config["evaluate"] else 0.0,
        min_train_nodes=sites,
        min_evaluate_nodes=sites,
        min_available_nodes=sites,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network().state_dict()),
        num_rounds=int(config["num-rounds"]),
        evaluate_fn=note,
    )
