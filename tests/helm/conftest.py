"""The chart's tests with an API server: it has the chart's definition of our kind."""

import pytest
from stage import chart, define


@pytest.fixture(scope="session")
def api(cluster):
    define(cluster, chart("octavo", "crd"))
    return cluster
