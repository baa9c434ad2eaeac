"""Every run draws the same examples; `pytest --hypothesis-profile explore` draws 2,000 others a property."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from eval import Watcher
from model import VideoLM

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=50,
                          suppress_health_check=slow)
settings.register_profile("few", derandomize=True, deadline=None, database=None, max_examples=8,
                          suppress_health_check=slow, phases=[Phase.explicit, Phase.generate])  # shrinks nothing
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=slow)
settings.load_profile("default")
torch.set_num_threads(1)  # the tensors are tiny
Watcher.__init__.__defaults__ = (0.0, 0, 20)  # tokens of a reply: a model of a few steps ends none by itself


def pytest_configure(config):
    if config.getoption("--compile"):  # dynamo asks traced tensors for their gradient
        config.addinivalue_line("filterwarnings", "ignore:The .grad attribute of a Tensor that is not a leaf")


def pytest_addoption(parser):
    parser.addoption("--compile", action="store_true", help="the same tests, with the layers compiled")


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch):
    if request.config.getoption("--compile"):
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**6
        compiled = torch.compile(VideoLM.run_layers, backend="aot_eager")
        monkeypatch.setattr(VideoLM, "run_layers", compiled)
