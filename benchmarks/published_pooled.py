"""fed-heart's last row: one model trained on all hospitals' training rows together.

Used by published.py. Pooled as in FLamby (NeurIPS 2022, https://arxiv.org/abs/2210.04620): Adam, learning rate .001,
batches of 4, 50 epochs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from fedge.client.data.dataset import SiteData, site_shares
from fedge.client.training.batches import batches, steps_of_epoch
from fedge.client.training.learner import counters
from fedge.client.training.local_steps import Examples, train
from fedge.shared.config.federation import Config
from fedge.shared.config.sections import TrainSection
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

#: The row's name, and the stream of its batches.
POOLED: Final = "pooled"


def central(config: Config) -> list[float]:
    """Accuracy at each hospital, in order of their names, of one model trained on all training rows together.

    As in the published table, training standardises by the pooled training rows, and each
    hospital's test rows by its own training rows.
    """
    task = get_task(config.task.name)
    shares = site_shares(config, task)
    settings = TrainSection.model_validate(
        {"optimizer": "adam", "learning-rate": 0.001, "batch-size": 4, "local-epochs": 50}
    )
    parts = {
        s: preprocessing.statistics(task.preprocessing, d.train_features) for s, d in shares.items()
    }
    together = preprocessing.pooled(list(parts.values())).standardise()
    fit = _examples(
        task,
        together,
        np.concatenate([d.train_features for d in shares.values()]),
        np.concatenate([d.train_labels for d in shares.values()]),
    )
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        network = task.network()
    order = batches(
        seed=config.run.seed,
        site=POOLED,
        rows=len(fit.y),
        batch_size=settings.batch_size,
        first=0,
        steps=50 * steps_of_epoch(len(fit.y), settings.batch_size),
    )
    train(task, network, fit, order, settings)

    def accuracy(data: SiteData, own: Standardise) -> float:
        test = _examples(task, own, data.test_features, data.test_labels)
        return task.values(counters(task, network, test.x, test.y))["accuracy"]

    return [accuracy(shares[h], parts[h].standardise()) for h in shares]


def _examples(task: Task, standardise: Standardise, features: Any, labels: Any) -> Examples:
    steps = preprocessing.fitted(task.preprocessing, standardise)
    return Examples(
        torch.from_numpy(preprocessing.apply(steps, features)), torch.from_numpy(labels)
    )
