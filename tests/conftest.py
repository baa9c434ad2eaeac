"""Every run draws the same examples; `pytest --hypothesis-profile explore` draws 2,000 others a property."""

import torch
from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=50,
                          suppress_health_check=slow)
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=slow)
settings.load_profile("default")
torch.set_num_threads(1)  # the tensors are tiny
