"""Training and evaluation of one site: its preprocessed examples and the loaded network, independent of messages."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedge.client.data.dataset import SiteData
from fedge.client.data.seeding import seed_of
from fedge.client.requests import Terms, Training
from fedge.client.training import device as devices
from fedge.client.training.batches import batches, steps_of_epoch
from fedge.client.training.control_variates import ControlStore
from fedge.client.training.local_steps import Examples, train
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.files import write_atomically
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.tasks.task import Counters, Task
from fedge.shared.wire.tensors import NDArrays, Spec, specs

log = logging.getLogger(__name__)


class Learner:
    """The data and the network of one site, for one task.

    Args:
        site: its name, part of every random seed.
        task: that is trained.
        data: the site's raw examples.
        home: folder of this site alone, for what outlives the process.
        device: where network and examples lie; returned arrays are always on the CPU.

    Attributes:
        specs: shape and dtype of the network's tensors, in its order.
        trained: names of its parameters.
        statistics: of the training split; None where the task's preprocessing is not fitted.
        network: holds the weights that the last request loaded.
    """

    def __init__(
        self, site: str, task: Task, data: SiteData, home: Path, device: torch.device
    ) -> None:
        self.site, self.task, self.data, self.home, self.device = site, task, data, home, device
        with torch.random.fork_rng(devices=[]):
            self.network = task.network()
        initial = {name: t.numpy() for name, t in self.network.state_dict().items()}
        self.specs = specs(initial)
        # Tied weights are parameters under each of their names.
        self.trained = [n for n, _ in self.network.named_parameters(remove_duplicate=False)]
        self.network.to(device)
        self.statistics = (
            preprocessing.statistics(task.preprocessing, data.train_features)
            if preprocessing.learns(task.preprocessing)
            else None
        )
        self._prepared: tuple[Standardise | None, Examples, Examples] | None = None

    def drop(self) -> None:
        """Release everything that the next request can compute again."""
        self._prepared = None
        self.network.zero_grad(set_to_none=True)

    @property
    def columns(self) -> int | None:
        """The number of columns that the preprocessing standardises; None where it is not fitted."""
        return None if self.statistics is None else len(self.statistics.total)

    @property
    def control_specs(self) -> dict[str, Spec]:
        """Shape and dtype of the tensors that have a control variate in SCAFFOLD: those in floating point."""
        return {n: s for n, s in self.specs.items() if np.dtype(s.dtype).kind == "f"}

    def check_data_unchanged(self, run_id: str) -> None:
        """Record the digest of the data when a run begins; later it must be the same, as repeated rounds rely on it.

        The digest never leaves the site.

        Raises:
            SiteError: 415, the data have changed since this run began.
        """
        digest = hashlib.sha256()
        for array in (
            self.data.train_features,
            self.data.train_labels,
            self.data.test_features,
            self.data.test_labels,
        ):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        path = self.home / "data" / f"{run_id}.sha256"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, digest.hexdigest().encode())
        elif path.read_bytes() != digest.hexdigest().encode():
            raise SiteError(415, f"data: must be as when run {run_id} began, got other examples")

    def prepare(self, terms: Terms) -> tuple[Examples, Examples]:
        """Preprocessed train and test examples, kept until a request brings other statistics."""
        torch.set_num_threads(terms.threads)
        standardise = terms.standardise
        if terms.own_statistics and self.statistics is not None:
            standardise = self.statistics.standardise()
        if self._prepared is None or self._prepared[0] != standardise:
            if terms.own_statistics and standardise is not None:
                self._write_statistics(standardise)
            steps = self.task.preprocessing
            if standardise is not None:
                steps = preprocessing.fitted(steps, standardise)
            both = [
                Examples(self._tensor(preprocessing.apply(steps, features)), self._tensor(labels))
                for features, labels in (
                    (self.data.train_features, self.data.train_labels),
                    (self.data.test_features, self.data.test_labels),
                )
            ]
            self._prepared = (standardise, both[0], both[1])
        return self._prepared[1], self._prepared[2]

    def _write_statistics(self, standardise: Standardise) -> None:
        """Write the site's own statistics for its devices, which must standardise as the site did."""
        self.home.mkdir(parents=True, exist_ok=True)
        values = {"mean": list(standardise.mean), "std": list(standardise.std)}
        write_atomically(self.home / "statistics.json", (json.dumps(values) + "\n").encode())

    def train(
        self, terms: Terms, training: Training, received: NDArrays, examples: Examples
    ) -> tuple[NDArrays, float]:
        """Train from the received weights.

        Args:
            terms: of the request.
            training: settings of the round.
            received: tensor by name, as ``specs``; with SCAFFOLD also the server's control variate.
            examples: preprocessed training examples, 1 or more.

        Returns:
            The trained weights (with SCAFFOLD also the change of c_i), and the mean loss as ``training.loss_at`` asks.
            Where they are not finite and ``training.noised``, the weights as received.

        Raises:
            SiteError: see ``_local_steps``.
        """
        self.load(received)
        if training.loss_at == "received":
            loss = mean_loss(self.task, self.network, examples.x, examples.y)
            return self._local_steps(terms, training, received, examples)[0], loss
        return self._local_steps(terms, training, received, examples)

    def _local_steps(
        self, terms: Terms, training: Training, received: NDArrays, examples: Examples
    ) -> tuple[NDArrays, float]:
        """Train the loaded network.

        Returns:
            Its weights, with SCAFFOLD's change of c_i if asked for, and the mean loss of the steps.

        Raises:
            SiteError: 401, the weights are no longer finite, and no noise is added; 413, c_i is missing.
        """
        settings, server_round = training.settings, terms.address.server_round
        epoch = steps_of_epoch(len(examples.y), settings.batch_size)
        steps = settings.local_steps or (settings.local_epochs or 1) * epoch
        order = batches(
            seed=terms.seed,
            site=self.site,
            rows=len(examples.y),
            batch_size=settings.batch_size,
            first=(server_round - 1) * steps,
            steps=steps,
        )
        server: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        store = ControlStore(self.home / "control" / terms.address.run_id)
        if training.control:
            server = {
                n: self._tensor(received[protocol.CONTROL_PREFIX + n]) for n in self.control_specs
            }
            held = store.load(training.accepted_round, self.control_specs)
            own = {name: self._tensor(a) for name, a in held.items()}
        # Random numbers of the network itself (dropout) are a function of seed, site and round.
        with devices.seeded(seed_of(terms.seed, self.site, "network", server_round), self.device):
            outcome = train(
                self.task,
                self.network,
                examples,
                order,
                settings,
                proximal_mu=training.proximal_mu,
                correction={name: server[name] - own[name] for name in own},
            )
        trained = self.weights(server_round, received if training.noised else None)
        change: NDArrays = {}
        if training.control:
            # Tensors that no step changes (buffers) keep their variate.
            new = {name: outcome.mean_gradient.get(name, c) for name, c in own.items()}
            store.save(
                server_round, training.accepted_round, {n: t.cpu().numpy() for n, t in new.items()}
            )
            change = {protocol.CONTROL_PREFIX + n: (new[n] - own[n]).cpu().numpy() for n in new}
        return trained | change, outcome.loss

    def weights(self, server_round: int, otherwise: NDArrays | None = None) -> NDArrays:
        """The network's current weights by name.

        Args:
            server_round: for the message.
            otherwise: weights that stand for those that are not finite. Under noise these are the ones received, an
                update of zeros: an error would tell whether the site holds a record over which the server's weights
                overflow, and no noise hides an error.

        Raises:
            SiteError: 401, a weight is not finite, and none stands for it.
        """
        trained = {
            n: t.detach().cpu().clone().numpy() for n, t in self.network.state_dict().items()
        }
        if all(np.isfinite(a).all() for a in trained.values() if a.dtype.kind == "f"):
            return trained
        if otherwise is None:
            raise SiteError(
                401, f"round {server_round}: the trained weights must be finite, got others"
            )
        log.warning("round %d: the trained weights are not finite: no update", server_round)
        return {name: otherwise[name] for name in self.specs}

    def count(self, received: NDArrays, held_out: Examples) -> dict[str, float]:
        """The task's counters of these weights over held-out examples, possibly none."""
        if not len(held_out.y):
            return dict.fromkeys(self.task.counter_names, 0.0)
        self.load(received)
        return counters(self.task, self.network, held_out.x, held_out.y)

    def load(self, received: NDArrays) -> None:
        """Load weights into the network."""
        self.network.load_state_dict({n: self._tensor(received[n]) for n in self.specs})

    def _tensor(self, a: Any) -> Tensor:
        # Copied: the request's arrays are read-only, and shared with other sites where all run in one process.
        return torch.from_numpy(np.array(a)).to(self.device)


#: Examples at a time; fixed, as the order of a sum is part of its last bits.
CHUNK = 1024


def counters(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> Counters:
    """Sum the task's counters.

    Args:
        task: whose counters.
        network: is put into evaluation mode.
        x: preprocessed examples ``(n, *in)``.
        y: labels ``(n,)``, int64.
    """
    network.eval()
    total: Counters = {}
    with torch.no_grad():
        for start in range(0, len(y), CHUNK):
            rows = slice(start, start + CHUNK)
            for name, value in task.counters(network(x[rows]), y[rows]).items():
                total[name] = total.get(name, 0.0) + value
    return total


def mean_loss(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss over examples ``x`` ``(n, *in)`` and labels ``y`` ``(n,)``, n 1 or more, in evaluation mode."""
    sums = counters(task, network, x, y)
    return sums["loss-sum"] / sums["examples"]
