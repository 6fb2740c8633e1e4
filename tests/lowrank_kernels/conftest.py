"""What the tests of the CUDA kernels share."""

import pytest


@pytest.fixture(scope="session")
def ptx_folder(request, tmp_path_factory):
    """Where PTX is kept, from run to run if pytest has a cache."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("ptx") if cache else tmp_path_factory.mktemp("ptx")
