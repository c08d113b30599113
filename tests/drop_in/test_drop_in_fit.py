"""docs/drop_in.md: its diffs fit the recipes; the table is the scan's."""

import scan
import yaml
from runner import apply_hunks, page_diffs


def test_diffs_fit_the_recipes(checkout):
    for name, (stock, hunks) in page_diffs().items():
        text = (checkout / "recipes" / stock).read_text(encoding="utf-8")
        after = apply_hunks(text, hunks, name)
        assert after != text
        yaml.compose(after, yaml.BaseLoader)


def test_the_table_is_what_the_scan_finds(checkout):
    page = scan.PAGE.read_text(encoding="utf-8")
    shown = page.split(scan.BEGIN)[1].split(scan.END)[0]
    assert shown.strip() == "\n".join(scan.table(checkout)).strip(), (
        "run tests/drop_in/scan.py <checkout> --write"
    )
