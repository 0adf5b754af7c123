"""The site's worker: holds the data and the loaded network, and answers the server's requests.

A failure travels as its number alone; its text, which may speak of paths and values, stays in the
site's own log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedge.client import requests
from fedge.client.data.dataset import SiteData
from fedge.client.privacy.charging import ChargedReplies
from fedge.client.privacy.noised_evaluation import Evaluation, NoisedEvaluations
from fedge.client.privacy.noising import NoisedTraining, Round
from fedge.client.privacy.training_by_mechanism import TrainingByMechanism
from fedge.client.requests import Address, Terms, section_of
from fedge.client.secagg.participant import is_secure
from fedge.client.secagg.secure_sums import SecureSums
from fedge.client.secagg.session import Anchors
from fedge.client.settings.privacy_policy import PrivacyPolicy, simulated
from fedge.client.training import device as devices
from fedge.client.training import requested_counts
from fedge.client.training.calibration import SiteCalibration
from fedge.client.training.learner import Learner
from fedge.client.training.requested_counts import RequestedCounts
from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.secagg import messages
from fedge.shared.tasks.task import Task
from fedge.shared.wire.npy import encode

log = logging.getLogger(__name__)

TASK_FAILED = 413
#: Metric of a reply to a probe: 1 while the site trains or evaluates, else 0.
BUSY = "busy"
#: Requests for counts over the site's examples.
EVALUATIONS = (protocol.EVALUATE, protocol.CALIBRATE, protocol.QUALIFY)


class SiteWorker:
    """Answers register, train, evaluate and probe for one site and one task.

    Args:
        site: its name, part of every random seed.
        task: that is trained.
        data: the site's raw examples.
        home: folder of this site alone, for what outlives the process.
        device: where network and examples lie; arrays of replies are always on the CPU.
        anchors: keys and roster for secure aggregation; without them the site takes part in none.
        privacy: gives the site's current privacy policy; that of a simulated site where not given.
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
        self.home = home
        self._lock = threading.Lock()
        self.learner = Learner(site, task, data, home, device)
        floats = {n: s.shape for n, s in self.learner.control_specs.items()}
        self._secure = SecureSums(task, floats, self.learner.trained, anchors, home)
        ledger = ChargedReplies(home, privacy or simulated)
        work = NoisedTraining(task, ledger)
        self._private = TrainingByMechanism(self.learner, work, self._secure, self._reply)
        self._counts = NoisedEvaluations(ledger)
        self._calibration = SiteCalibration(self.learner)

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Answer a request; one at a time, except that a probe is answered at once.

        Args:
            kind: the message type, see ``fedge.shared.protocol``.
            content: of the request.

        Raises:
            SiteError: 414, the request is refused; 401, weights are not finite; 415, the data changed; 416, out of
                memory; 417, the device failed; 413, any failure without a number of its own.
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
            code = devices.error_code(error) or TASK_FAILED
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
        """Release everything that the next request can compute again."""
        with self._lock:
            self.learner.drop()
            self._calibration.drop()
        devices.free()

    def _answer(self, kind: str, content: RecordDict) -> RecordDict:
        answers: dict[str, Callable[[RecordDict], RecordDict]] = {
            protocol.REGISTER: self._register,
            protocol.TRAIN: self._train,
            **{kind: partial(self._evaluate, kind) for kind in EVALUATIONS},
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
        address, section = requests.address(config), section_of(config)
        self.learner.check_data_unchanged(address.run_id)
        if is_secure(request):
            # Numbers of examples and sums leave the site under secure aggregation only.
            self._secure.require()
            return self._reply(address, MetricRecord({}))
        # Sums leave the site only where all sites standardise alike.
        summed = self.learner.statistics if requests.standardise(config) == "federated" else None
        if summed is not None:
            self._require_statistics(section)
        figures = registration_figures(section, self.learner.data, summed)
        return self._reply(address, MetricRecord(figures))

    def _require_statistics(self, section: PrivacySection) -> None:
        """Mean and standard deviation leave without noise, which the privacy section must declare.

        Raises:
            SiteError: 414, it does not.
        """
        if section.mechanism != "off" and section.statistics == "off":
            raise requests.refuse(
                "privacy.statistics", "unprotected for a task that standardises", "off"
            )

    def _train(self, request: RecordDict) -> RecordDict:
        config = requests.config_of(request, self.task.name)
        terms = requests.terms(config, self.learner.columns)
        training = requests.training(config)
        own_specs = self.learner.control_specs if training.control else {}
        prefixed = {protocol.CONTROL_PREFIX + name: spec for name, spec in own_specs.items()}
        received = requests.arrays(request, self.learner.specs | prefixed)
        examples, _ = self.learner.prepare(terms)
        section = section_of(config)
        if section.mechanism != "off":
            if self.learner.statistics is not None:
                self._require_statistics(section)
            round_ = Round(request, terms, section, config, training, examples)
            return self._private.answer(round_, received)
        if is_secure(request):
            # A site without examples takes part with zeros, so that the other sites do not learn of it.
            train = (
                partial(self.learner.train, terms, training, received, examples)
                if len(examples.y)
                else None
            )
            values = self._secure.train(request, terms, training, received, train, len(examples.y))
            return self._reply(terms.address, values)
        trained, loss = self.learner.train(terms, training, received, examples)
        metrics: dict[str, int | float] = {
            protocol.NUM_EXAMPLES: len(examples.y),
            protocol.TRAIN_LOSS: loss,
        }
        return self._reply(terms.address, MetricRecord({**metrics}), trained)

    def _evaluate(self, kind: str, request: RecordDict) -> RecordDict:
        config = requests.config_of(request, self.task.name)
        terms = requests.terms(config, self.learner.columns)
        received = requests.arrays(request, self.learner.specs)
        train_examples, held_out = self.learner.prepare(terms)
        section = section_of(config)
        if kind == protocol.EVALUATE:
            count = partial(self.learner.count, received, held_out)
            requested = requested_counts.evaluation_counts(
                self.task.counter_names, len(held_out.y), count
            )
        else:
            requested = self._calibration.figures(
                kind, request, terms, received, (train_examples, held_out), section
            )
        noised = self._counts.evaluation(request, terms.address, section, requested)
        if noised is not None:
            return self._evaluate_noised(noised, terms)
        if is_secure(request):
            values = self._secure.evaluate(
                request, terms, requested.kind, requested.names, requested.count
            )
            return self._reply(terms.address, values)
        return self._with_config(requested, terms, MetricRecord({**requested.reported()}))

    def _evaluate_noised(self, evaluation: Evaluation, terms: Terms) -> RecordDict:
        if self.learner.statistics is not None:
            self._require_statistics(
                section_of(requests.config_of(evaluation.request, self.task.name))
            )
        if is_secure(evaluation.request):
            values = self._secure.evaluate(
                evaluation.request,
                terms,
                evaluation.figures.kind,
                evaluation.counts.reported,
                partial(self._counts.charged, evaluation),
                noised=True,
                min_sites=evaluation.min_sites,
            )
            return self._counts.attach_ledger_digest(self._reply(terms.address, values))
        return self._counts.answer(
            evaluation, partial(self._with_config, evaluation.figures, terms)
        )

    def _with_config(
        self, requested: RequestedCounts, terms: Terms, metrics: MetricRecord
    ) -> RecordDict:
        reply = self._reply(terms.address, metrics)
        config = reply[protocol.CONFIG]
        if isinstance(config, ConfigRecord):
            config.update({**requested.config()})
        return reply

    def _sum_statistics(self, request: RecordDict) -> RecordDict:
        config = requests.config_of(request, self.task.name)
        address = requests.address(config)
        self.learner.check_data_unchanged(address.run_id)
        section = section_of(config)
        self._require_statistics(section)
        values = self._secure.statistics(
            request, address, self.learner.statistics, hides_site=section.hides_sites
        )
        return self._reply(address, values)

    def _continue(self, kind: str, request: RecordDict) -> RecordDict:
        address = requests.address(requests.config_of(request, self.task.name))
        reply = self._reply(address)
        reply.update(self._secure.step(kind, request, address))
        return reply

    def _reply(
        self,
        address: Address,
        values: MetricRecord | ConfigRecord | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> RecordDict:
        """A reply: the site's address record, with metrics or the values of a secure exchange, and arrays."""
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


Figures = dict[str, int | float | list[int] | list[float]]


def registration_figures(
    section: PrivacySection, data: SiteData, statistics: Statistics | None
) -> Figures:
    """The site's numbers of examples, and the sums over its standardised columns where they are requested.

    Where whole sites are protected nothing may leave that depends on the data, except values with noise or declared to
    have none: so each site reports one example, which is also its weight, and means in place of sums. Where single
    examples are, the number of training examples is no secret, as it is the weight and tells the epsilon; that of
    held-out ones is.

    Args:
        section: the run's privacy section.
        data: the site's examples.
        statistics: of the training split; None where they do not leave the site.
    """
    train, test, share = len(data.train_labels), len(data.test_labels), 1
    if section.hides_sites:
        share, train = max(train, 1), 1
    if not section.tells_counts:
        test = int(section.metrics == "noised")
    figures: Figures = {protocol.NUM_TRAIN_EXAMPLES: train, protocol.NUM_TEST_EXAMPLES: test}
    if statistics is not None:
        figures[protocol.FEATURE_TOTAL] = [v / share for v in statistics.total]
        figures[protocol.FEATURE_TOTAL_OF_SQUARES] = [
            v / share for v in statistics.total_of_squares
        ]
    return figures
