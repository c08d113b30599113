"""A few hundred altered inputs for every reader (`fuzz_readers.py` takes more)."""

import pytest
from fuzz_readers import TARGETS, fuzz


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_altered_inputs_are_refused_by_name(tmp_path, name):
    # As in a run by hand; another stretch of numbers than the one of there.
    [(counts, examples)] = fuzz(80, [name], start=10**6, parent=tmp_path)
    assert not examples
    found = counts[name]
    assert sum(found.values()) == 80
    assert found["error"] > 20 or name == "edits-copy"
