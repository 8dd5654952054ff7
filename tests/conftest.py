"""Shapes in annotations are checked while tests run; small tests use one thread, which is faster for them."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

hook = install_import_hook("eora_lab", "beartype.beartype")

settings.register_profile("eora_lab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("eora_lab")


@pytest.fixture(autouse=True)
def one_thread(request):
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("real"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
