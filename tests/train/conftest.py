import pytest


@pytest.fixture
def gemm_ops():
    """Skips while the op has not landed."""
    pytest.importorskip("glmx.ops.grouped_gemm")
