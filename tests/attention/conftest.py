import pytest

from kernel_pytorch.attention import api


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path, monkeypatch):
    """Keep choices of each test to itself."""
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path / "cache"))
    api.forget()
    yield
    api.forget()
