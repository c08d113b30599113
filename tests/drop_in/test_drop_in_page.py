"""docs/drop_in.md: its diffs are read as they are written, and all are run."""

import pytest
import runner
from runner import apply_hunks, page_diffs


def test_recipes_of_speechbrain_were_run(checkout):
    """Skipped where there is no checkout: nothing else here is run then."""
    assert checkout.exists()


def test_hunks_fit_one_place():
    text = "a: 1\nb: 2\nc: 3\n"
    assert apply_hunks(text, [("b: 2\n", "b: 5\n")], "x") == (
        "a: 1\nb: 5\nc: 3\n"
    )
    assert apply_hunks(text, [("", "d: 4\n")], "x") == text + "d: 4\n"
    for before in ("d: 4\n", ": 2\n"):
        with pytest.raises(ValueError, match="0 places"):
            apply_hunks(text, [(before, "")], "x")
    with pytest.raises(ValueError, match="2 places"):
        apply_hunks(text + text, [("a: 1\n", "")], "x")


def test_every_diff_is_yaml_and_is_run():
    diffs = page_diffs()
    assert len(diffs) >= 10
    tests = "".join(
        path.read_text(encoding="utf-8")
        for path in runner.ROOT.glob("tests/drop_in/test_drop_in_*.py")
    )
    for name, (_, hunks) in diffs.items():
        assert f'"{name}"' in tests, f"{name} is not run"
        assert hunks and all(after for _, after in hunks), name
