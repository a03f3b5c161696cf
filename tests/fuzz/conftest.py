"""Hypothesis: in CI the same examples each time; by hand, `make fuzz`, others each time and many more."""

import os

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=SLOW
)
settings.register_profile("free", max_examples=400, deadline=None, print_blob=True, suppress_health_check=SLOW)
settings.load_profile("free" if "FASTAE_FUZZ" in os.environ else "ci")
