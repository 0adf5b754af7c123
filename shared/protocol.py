"""The wire format between server and site: names of records and keys.

Every exchange is a Flower message. A request carries ``config`` (and ``arrays``, except to register); a reply
carries ``config`` (site, run and round), ``metrics``, and after training ``arrays``. A site's failure travels as a
Flower ``Error`` whose code is fedge's number and whose reason is that number only: the text stays at the site.
"""

from __future__ import annotations

from typing import Final

# Message types (Flower: category, or category.action).
REGISTER: Final = "query.register"
TRAIN: Final = "train"
EVALUATE: Final = "evaluate"
CALIBRATE: Final = "evaluate.calibrate"  # the final model's activation ranges
QUALIFY: Final = "evaluate.qualify"  # metrics of graphs derived from it
PROBE: Final = "query.probe"  # liveness check while a reply is missing

# Records of a message.
ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"

# Keys of CONFIG, both ways.
RUN_ID: Final = "run-id"  # str, fedge's own, outlives Flower's
SERVER_ROUND: Final = "server-round"  # int, 0 to register
SITE: Final = "site"  # str, replies only
PRIVACY_LEDGER: Final = "privacy-ledger"  # str, replies under privacy: SHA-256 of the ledger
TASK: Final = "task"  # str
STANDARDISE: Final = "standardise"  # "federated" | "site", requests only
VERSION: Final = "fedge-version"  # str, of the server's fedge; requests only
COHORT: Final = "cohort"  # int, sites invited to this exchange; requests only

# Keys of CONFIG, requests to train and evaluate.
SEED: Final = "seed"  # int
THREADS: Final = "threads"  # int
FEATURE_MEAN: Final = "feature-mean"  # list[float], where the task standardises over all sites
FEATURE_STD: Final = "feature-std"  # list[float]

PRIVACY: Final = (
    "privacy"  # str, JSON of PrivacySection, to register too; none where the mechanism is off
)

ROUNDS: Final = "rounds"  # int, of the whole run; with a privacy mechanism only
EVALUATE_EVERY: Final = (
    "evaluate-every"  # int, rounds between evaluations; with noised metrics only, else 1
)

# Keys of CONFIG, requests to calibrate and qualify; CALIBRATION in all requests where such figures get noise.
CALIBRATION: Final = "calibration"  # str, JSON of config.CalibrationSection
GRAPH: Final = "graph-sha256"  # str, hex, of the fp32 graph; replies too
CANDIDATES: Final = "candidates"  # list[str], kinds of graphs
CANDIDATE_DIGESTS: Final = (
    "candidate-sha256"  # list[str], hex, one a candidate; replies too, "" for none
)
RANGE_LOW: Final = (
    "range-low"  # list[float], one a tensor, in the graph's order; METRICS of replies too
)
RANGE_HIGH: Final = "range-high"  # list[float]

# Keys of CONFIG, requests to train.
SETTINGS: Final = "train"  # str, JSON of config.TrainSection
PROXIMAL_MU: Final = "proximal-mu"  # float; Flower's FedProx sets it
CONTROL: Final = "control"  # bool; SCAFFOLD: arrays hold "control/<name>" beside each "<name>"
ACCEPTED_ROUND: Final = (
    "accepted-round"  # int; the last round whose update of this site was counted, 0 for none
)
LOSS_AT: Final = (
    "loss-at"  # "running" (mean over the local steps) | "received" (of the weights as received)
)

# Keys of METRICS.
NUM_EXAMPLES: Final = "num-examples"  # int
TRAIN_LOSS: Final = "train-loss"  # float
COUNTS: Final = "counts"  # list[float], counters too many for names
NUM_TRAIN_EXAMPLES: Final = "num-train-examples"  # int, when registering
NUM_TEST_EXAMPLES: Final = "num-test-examples"  # int, when registering
EPSILON_CONSUMERS: Final = (
    "epsilon-consumers"  # float, spent by the site's privacy budget account; under privacy only
)
EPSILON_SERVER: Final = "epsilon-server"  # float
EPSILON_DELTA: Final = "epsilon-delta"  # float, at which both are: the run's
FEATURE_TOTAL: Final = "feature-total"  # list[float], when registering
FEATURE_TOTAL_OF_SQUARES: Final = "feature-total-of-squares"  # list[float], when registering

#: Prefix of SCAFFOLD's control variates among the arrays.
CONTROL_PREFIX: Final = "control/"

#: Allowed names of a site.
SITE_NAME: Final = r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$"
#: Largest number of sites of one secure sum; the limit of its exact counters.
MAX_SITES: Final = 2048
