"""What a site says of itself before the first round."""

from __future__ import annotations

from fedge.client.data import SiteData
from fedge.shared import protocol
from fedge.shared.preprocess import Statistics
from fedge.shared.privacy.section import PrivacySection

Shown = dict[str, int | float | list[int] | list[float]]


def shown_of(section: PrivacySection, data: SiteData, statistics: Statistics | None) -> Shown:
    """How many examples the site has, and the sums over its standardised columns where they are asked for.

    Under local noise nothing that leaves may depend on the data but what has noise, or was declared to have none: so
    each site says that it has one example, which is also what it weighs, and gives means in place of sums.

    Args:
        section: the run's mechanism.
        data: the site's.
        statistics: of the training split, where they leave the site.
    """
    train, test, share = len(data.train_labels), len(data.test_labels), 1
    if section.mechanism == "local":
        share, train = max(train, 1), 1
        if section.metrics != "unprotected":
            test = int(section.metrics == "noised")
    shown: Shown = {protocol.NUM_TRAIN_EXAMPLES: train, protocol.NUM_TEST_EXAMPLES: test}
    if statistics is not None:
        shown[protocol.FEATURE_TOTAL] = [v / share for v in statistics.total]
        shown[protocol.FEATURE_TOTAL_OF_SQUARES] = [v / share for v in statistics.total_of_squares]
    return shown
