"""Fixtures of the tests of backprop."""

import pytest

from sparsetrain import sparse_gradient


@pytest.fixture(params=["gradient", "weight"])
def kernel(request, monkeypatch):
    """Each kind of kernel, forced: those that skip zeros of the gradient, and the ordinary ones."""
    monkeypatch.setattr(sparse_gradient, "skips", lambda weight, geometry, density: request.param == "gradient")
    return request.param
