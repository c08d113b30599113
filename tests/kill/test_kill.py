"""A few kills of everything that writes (`kill_writers.py` takes more)."""

import pytest
from kill_writers import WRITERS, kill_writer


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_killed_writers_leave_old_or_new(tmp_path, name):
    found = kill_writer(WRITERS[name], 4, 7, tmp_path)
    assert found["killed"] == 4
