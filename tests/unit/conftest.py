"""Fixtures of several unit tests."""

import pytest
from hub_server import Hub, serving


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve an empty hub, to which the client of this process is sent."""
    constants = pytest.importorskip("huggingface_hub.constants")
    found = Hub()
    with serving(found) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Large files go the old way (LFS), not to the store's own client.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found
