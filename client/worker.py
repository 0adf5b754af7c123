"""The site's worker: holds the data and the warm network, answers the server's requests, lets nothing else out.

A failure travels as its number alone; its text, which may speak of paths and values, stays in the
site's own log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedge.client import device as devices
from fedge.client import requests
from fedge.client.batches import batches, steps_of_epoch
from fedge.client.data import SiteData
from fedge.client.draws import seed_of
from fedge.client.evaluate import counters, mean_loss
from fedge.client.privacy import SitePrivacy
from fedge.client.privacy_policy import PrivacyPolicy, section_of, simulated
from fedge.client.private_work import PrivateWork, Round
from fedge.client.requests import Address, Terms, Training
from fedge.client.secure_answers import is_secure
from fedge.client.secure_session import Anchors
from fedge.client.secure_work import SecureWork
from fedge.client.state import ControlStore
from fedge.client.train import Examples, optimizer, train
from fedge.shared import preprocess, protocol
from fedge.shared.arrays import NDArrays, Spec, specs
from fedge.shared.config import TrainSection
from fedge.shared.durable import write_atomically
from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.npy import encode
from fedge.shared.preprocess import Standardise
from fedge.shared.privacy.charges import CENTRAL
from fedge.shared.privacy.section import PrivacySection
from fedge.shared.secagg import messages
from fedge.shared.tasks.task import Task

log = logging.getLogger(__name__)

TASK_FAILED = 413
#: Metric of a reply to a probe: 1 while the site trains or evaluates, else 0.
BUSY = "busy"


class SiteWorker:
    """Answers register, train, evaluate and probe for one site and one task.

    Args:
        site: its name, part of every draw.
        task: what is learnt.
        data: the site's raw examples.
        home: folder of this site alone, for what outlives the process.
        device: where network and examples lie; replies are always of the CPU.
        anchors: the site's own for secure aggregation; without them it takes part in none.
        privacy: on which terms the site's data may be learnt from; those of a simulation where not given.
    """

    def __init__(
        self,
        site: str,
        task: Task,
        data: SiteData,
        home: Path,
        device: torch.device = devices.CPU,
        anchors: Anchors | None = None,
        privacy: Callable[[], PrivacyPolicy] | None = None,
    ) -> None:
        self.site = site
        self.task = task
        self.data = data
        self.home = home
        self.device = device
        self._lock = threading.Lock()
        with torch.random.fork_rng(devices=[]):
            self._network = task.network()
        initial = {name: t.numpy() for name, t in self._network.state_dict().items()}
        self._specs = specs(initial)
        self._network.to(device)
        self._statistics = (
            preprocess.statistics(task.preprocessing, data.train_features)
            if preprocess.learns(task.preprocessing)
            else None
        )
        self._prepared: tuple[Standardise | None, Examples, Examples] | None = None
        floats = {n: s.shape for n, s in self._control_specs.items()}
        trained = [name for name, _ in self._network.named_parameters()]
        self._secure = SecureWork(task, floats, trained, anchors, home)
        self._private = PrivateWork(task, SitePrivacy(home, privacy or simulated))

    def warm_up(self) -> None:
        """Let torch import its compiler, as it does with the first optimiser; no request should pay for that."""
        # Nothing is drawn here: the generator is one for the process, and a request may be training beside this.
        optimizer(TrainSection(), torch.nn.ParameterList([torch.zeros(1)]))

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Answer a request; one at a time, except that a probe is answered at once.

        Args:
            kind: the message type, see ``fedge.shared.protocol``.
            content: of the request.

        Raises:
            SiteError: 414, the request is refused; 401 or 415, the site's own; 416, memory ran out; 417, the
                device failed; 413, any failure without a number of its own.
            RunError: 504, SCAFFOLD's state is damaged.
        """
        try:
            if kind == protocol.PROBE:
                return self._probe(content)
            with self._lock:
                return self._answer(kind, content)
        except FedgeError as error:
            log.error("site %s: %s", self.site, error)
            raise
        except Exception as error:
            code = devices.number_of(error) or TASK_FAILED
            log.exception("site %s: FE-%d the task failed", self.site, code)
        # Only here, as the exception's frames hold on to the tensors that were too many.
        if code == devices.OUT_OF_MEMORY:
            self._drop()
        raise SiteError(code, "the task failed; its text is above")

    @property
    def busy(self) -> bool:
        """Whether a request other than a probe is being answered."""
        return self._lock.locked()

    def _drop(self) -> None:
        """Let go of all that the next request can make anew."""
        with self._lock:
            self._prepared = None
            self._network.zero_grad(set_to_none=True)
        devices.free()

    def _answer(self, kind: str, content: RecordDict) -> RecordDict:
        answers: dict[str, Callable[[RecordDict], RecordDict]] = {
            protocol.REGISTER: self._register,
            protocol.TRAIN: self._train,
            protocol.EVALUATE: self._evaluate,
            messages.STATISTICS: self._sum_statistics,
            **dict.fromkeys(messages.STEPS, partial(self._continue, kind)),
        }
        if kind not in answers:
            raise requests.refuse("message type", f"one of {', '.join(answers)}", kind)
        return answers[kind](content)

    def _probe(self, request: RecordDict) -> RecordDict:
        address = requests.address(requests.config_of(request, self.task.name))
        return self._reply(address, MetricRecord({BUSY: int(self.busy)}))

    def _register(self, request: RecordDict) -> RecordDict:
        config = requests.config_of(request, self.task.name)
        address = requests.address(config)
        self._hold_data_still(address.run_id)
        if is_secure(request):
            # Sizes and sums leave the site under masks alone.
            self._secure.require()
            return self._reply(address, MetricRecord({}))
        sizes: dict[str, int | float | list[int] | list[float]] = {
            protocol.NUM_TRAIN_EXAMPLES: len(self.data.train_labels),
            protocol.NUM_TEST_EXAMPLES: len(self.data.test_labels),
        }
        # Sums leave the site only where all sites standardise alike.
        if self._statistics is not None and requests.standardise(config) == "federated":
            sizes[protocol.FEATURE_TOTAL] = list(self._statistics.total)
            sizes[protocol.FEATURE_TOTAL_OF_SQUARES] = list(self._statistics.total_of_squares)
        return self._reply(address, MetricRecord(sizes))

    def _hold_data_still(self, run_id: str) -> None:
        """Note the data's digest when a run begins; later it must be the same, as redone rounds rely on it.

        The digest never leaves the site.

        Raises:
            SiteError: 415, the data have changed since this run began.
        """
        found = hashlib.sha256()
        for array in (
            self.data.train_features,
            self.data.train_labels,
            self.data.test_features,
            self.data.test_labels,
        ):
            found.update(repr((array.shape, array.dtype.str)).encode())
            found.update(np.ascontiguousarray(array).tobytes())
        path = self.home / "data" / f"{run_id}.sha256"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, found.hexdigest().encode())
        elif path.read_bytes() != found.hexdigest().encode():
            raise SiteError(415, f"data: must be as when run {run_id} began, got other examples")

    def _train(self, request: RecordDict) -> RecordDict:
        config = requests.config_of(request, self.task.name)
        terms = requests.terms(config, self._columns)
        what = requests.training(config)
        own_specs = self._control_specs if what.control else {}
        prefixed = {protocol.CONTROL_PREFIX + name: spec for name, spec in own_specs.items()}
        received = requests.arrays(request, self._specs | prefixed)
        fit, _ = self._prepare(terms)
        section = section_of(config)
        if section.mechanism != "off":
            return self._train_privately(section, request, terms, what, received, fit)
        if is_secure(request):
            # A site that has no examples takes part with nothing: the others need not know.
            fitted = partial(self._fit, terms, what, received, fit) if len(fit.y) else None
            bundle = self._secure.train(request, terms, what, received, fitted, len(fit.y))
            return self._reply(terms.address, bundle)
        trained, loss = self._fit(terms, what, received, fit)
        metrics: dict[str, int | float] = {
            protocol.NUM_EXAMPLES: len(fit.y),
            protocol.TRAIN_LOSS: loss,
        }
        return self._reply(terms.address, MetricRecord({**metrics}), trained)

    def _train_privately(
        self,
        section: PrivacySection,
        request: RecordDict,
        terms: Terms,
        what: Training,
        received: NDArrays,
        fit: Examples,
    ) -> RecordDict:
        if self._statistics is not None and section.statistics == "off":
            raise requests.refuse(
                "privacy.statistics", "unprotected for a task that standardises", "off"
            )
        config = requests.config_of(request, self.task.name)
        round_ = Round(request, terms.address, section, config, what, fit)
        if section.mechanism == "distributed":
            return self._train_noised(round_, terms, received)
        if section.mechanism in CENTRAL:
            return self._train_for_the_server(round_, terms, received)

        def trained() -> NDArrays:
            self._load(received)
            self._private.take_steps(self._network, round_)
            return self._weights(terms.address.server_round)

        if is_secure(request):
            fitted = partial(self._private.charged, round_, trained) if len(fit.y) else None
            # Neither the loss nor how many examples there are is told.
            bundle = self._secure.train(
                request, terms, what, received, fitted, len(fit.y), private=True
            )
            return self._private.vouch(self._reply(terms.address, bundle))
        return self._private.answer(
            round_, lambda metrics: self._reply(terms.address, metrics, trained())
        )

    def _train_for_the_server(self, of: Round, terms: Terms, received: NDArrays) -> RecordDict:
        """Plain training, whose update the server clips and covers with its noise; the loss is not told."""
        if is_secure(of.request):
            raise requests.refuse(
                "privacy.mechanism", "distributed under masks", of.section.mechanism
            )
        return self._private.answer(
            of,
            lambda metrics: self._reply(
                terms.address, metrics, self._fit(terms, of.what, received, of.examples)[0]
            ),
        )

    def _train_noised(self, of: Round, terms: Terms, received: NDArrays) -> RecordDict:
        """Plain training, whose update gets its noise under the mask."""
        if not is_secure(of.request):
            raise requests.refuse("privacy.mechanism", "distributed under masks only", "in clear")
        noise, charge = self._private.noise(of)

        def fitted() -> NDArrays:
            return self._fit(terms, of.what, received, of.examples)[0]

        bundle = self._secure.train_noised(
            of.request,
            terms,
            received,
            fitted if len(of.examples.y) else None,
            noise,
            charge,
        )
        return self._private.vouch(self._reply(terms.address, bundle))

    def _fit(
        self, terms: Terms, what: Training, received: NDArrays, fit: Examples
    ) -> tuple[NDArrays, float]:
        """Trained weights, and the mean loss that the request asks for."""
        self._load(received)
        if what.loss_at == "received":
            loss = mean_loss(self.task, self._network, fit.x, fit.y)
            return self._local_steps(terms, what, received, fit)[0], loss
        return self._local_steps(terms, what, received, fit)

    def _local_steps(
        self, terms: Terms, what: Training, received: NDArrays, fit: Examples
    ) -> tuple[NDArrays, float]:
        """Train the loaded network.

        Returns:
            Its weights, with SCAFFOLD's change of c_i if asked for, and the mean loss of the steps.

        Raises:
            SiteError: 401, the weights are no longer finite; 413, c_i is missing.
        """
        settings, server_round = what.settings, terms.address.server_round
        epoch = steps_of_epoch(len(fit.y), settings.batch_size)
        steps = settings.local_steps or (settings.local_epochs or 1) * epoch
        order = batches(
            seed=terms.seed,
            site=self.site,
            rows=len(fit.y),
            batch_size=settings.batch_size,
            first=(server_round - 1) * steps,
            steps=steps,
        )
        server: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        store = ControlStore(self.home / "control" / terms.address.run_id)
        if what.control:
            server = {
                n: self._tensor(received[protocol.CONTROL_PREFIX + n]) for n in self._control_specs
            }
            held = store.load(what.accepted_round, self._control_specs)
            own = {name: self._tensor(a) for name, a in held.items()}
        # Whatever a network draws of its own (dropout) is a function of seed, site and round.
        with devices.seeded(seed_of(terms.seed, self.site, "network", server_round), self.device):
            outcome = train(
                self.task,
                self._network,
                fit,
                order,
                settings,
                proximal_mu=what.proximal_mu,
                correction={name: server[name] - own[name] for name in own},
            )
        trained = self._weights(server_round)
        change: NDArrays = {}
        if what.control:
            # Tensors that no step changes (buffers) keep their variate.
            new = {name: outcome.mean_gradient.get(name, c) for name, c in own.items()}
            store.save(
                server_round, what.accepted_round, {n: t.cpu().numpy() for n, t in new.items()}
            )
            change = {protocol.CONTROL_PREFIX + n: (new[n] - own[n]).cpu().numpy() for n in new}
        return trained | change, outcome.loss

    def _weights(self, server_round: int) -> NDArrays:
        trained = {
            n: t.detach().cpu().clone().numpy() for n, t in self._network.state_dict().items()
        }
        if not all(np.isfinite(a).all() for a in trained.values() if a.dtype.kind == "f"):
            raise SiteError(
                401, f"round {server_round}: the trained weights must be finite, got others"
            )
        return trained

    def _evaluate(self, request: RecordDict) -> RecordDict:
        terms = requests.terms(requests.config_of(request, self.task.name), self._columns)
        received = requests.arrays(request, self._specs)
        _, held_out = self._prepare(terms)
        if is_secure(request):
            count = partial(self._count, received, held_out)
            return self._reply(terms.address, self._secure.evaluate(request, terms, count))
        found = self._count(received, held_out)
        metrics: dict[str, int | float] = {protocol.NUM_EXAMPLES: len(held_out.y)}
        metrics |= {name: found[name] for name in self.task.counter_names}
        return self._reply(terms.address, MetricRecord({**metrics}))

    def _count(self, received: NDArrays, held_out: Examples) -> dict[str, float]:
        if not len(held_out.y):
            return dict.fromkeys(self.task.counter_names, 0.0)
        self._load(received)
        return counters(self.task, self._network, held_out.x, held_out.y)

    def _sum_statistics(self, request: RecordDict) -> RecordDict:
        address = requests.address(requests.config_of(request, self.task.name))
        self._hold_data_still(address.run_id)
        return self._reply(address, self._secure.statistics(request, address, self._statistics))

    def _continue(self, kind: str, request: RecordDict) -> RecordDict:
        address = requests.address(requests.config_of(request, self.task.name))
        reply = self._reply(address)
        reply.update(self._secure.step(kind, request, address))
        return reply

    @property
    def _columns(self) -> int | None:
        return None if self._statistics is None else len(self._statistics.total)

    @property
    def _control_specs(self) -> dict[str, Spec]:
        return {n: s for n, s in self._specs.items() if np.dtype(s.dtype).kind == "f"}

    def _prepare(self, terms: Terms) -> tuple[Examples, Examples]:
        """Preprocessed train and test examples, kept until a request brings other statistics."""
        torch.set_num_threads(terms.threads)
        standardise = terms.standardise
        if terms.of_site and self._statistics is not None:
            standardise = self._statistics.standardise()
        if self._prepared is None or self._prepared[0] != standardise:
            if terms.of_site and standardise is not None:
                self._write_statistics(standardise)
            steps = self.task.preprocessing
            if standardise is not None:
                steps = preprocess.fitted(steps, standardise)
            both = [
                Examples(self._tensor(preprocess.apply(steps, features)), self._tensor(labels))
                for features, labels in (
                    (self.data.train_features, self.data.train_labels),
                    (self.data.test_features, self.data.test_labels),
                )
            ]
            self._prepared = (standardise, both[0], both[1])
        return self._prepared[1], self._prepared[2]

    def _write_statistics(self, standardise: Standardise) -> None:
        """Leave the site's own statistics for its devices, which must standardise as the site did."""
        self.home.mkdir(parents=True, exist_ok=True)
        values = {"mean": list(standardise.mean), "std": list(standardise.std)}
        write_atomically(self.home / "statistics.json", (json.dumps(values) + "\n").encode())

    def _load(self, received: NDArrays) -> None:
        self._network.load_state_dict({n: self._tensor(received[n]) for n in self._specs})

    def _reply(
        self,
        address: Address,
        values: MetricRecord | ConfigRecord | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> RecordDict:
        """Who answers what, with metrics, or with the values of a secure exchange."""
        config = ConfigRecord(
            {
                protocol.SITE: self.site,
                protocol.RUN_ID: address.run_id,
                protocol.SERVER_ROUND: address.server_round,
                protocol.TASK: self.task.name,
            }
        )
        content = RecordDict({protocol.CONFIG: config})
        if isinstance(values, MetricRecord):
            content[protocol.METRICS] = values
        elif values is not None:
            content[messages.SECURE] = values
        if arrays is not None:
            content[protocol.ARRAYS] = ArrayRecord(
                {n: encode(np.asarray(a)) for n, a in arrays.items()}
            )
        return content

    def _tensor(self, a: Any) -> Tensor:
        # Copied: the request's arrays are read-only, and shared with other sites where all run in one process.
        return torch.from_numpy(np.array(a)).to(self.device)
