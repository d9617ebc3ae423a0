"""Agreement of volumes, and risk, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from raybrats.predict.agreement import risk_coverage, volume_agreement


def rows(pairs, region="WT"):
    return [
        {"region": region, "volume_mm3": ours, "reference_volume_mm3": due} for ours, due in pairs
    ]


def test_limits_of_agreement_of_planted_volumes():
    found = volume_agreement(rows([(1100, 1000), (2300, 2000), (2900, 3000)]))["WT"]
    assert found.difference == pytest.approx([0.1, 0.3, -0.1])
    assert found.mean == pytest.approx([1.05, 2.15, 2.95])
    deviation = math.sqrt((0.0 + 0.04 + 0.04) / 2)
    assert found.bias == pytest.approx(0.1)
    assert found.limits == pytest.approx((0.1 - 1.96 * deviation, 0.1 + 1.96 * deviation))


def test_cases_without_a_volume_are_left_out():
    mixed = [*rows([(5000, 4000), (None, 3000)]), *rows([(None, None)], "ET"), {"region": "TC"}]
    found = volume_agreement(mixed)
    assert list(found) == ["WT"]
    assert found["WT"].bias == 1
    assert found["WT"].limits is None
    assert volume_agreement([]) == {}


def test_risk_is_the_mean_of_the_cases_that_are_kept():
    kept, risk = risk_coverage(np.array([0.2, 0.9, 0.6]), np.array([0.1, 0.8, 0.7]))
    assert kept == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk == pytest.approx([0.2, 0.25, (0.2 + 0.3 + 0.9) / 3])
