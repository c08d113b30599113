"""The manifests of one seed: what each model learns, what is held out."""

import random

from characters import scored
from lines import read_csv, tell_long
from slurp_prepare import COLUMNS, write_rows


def prepare_manifests(
    given, prepared, synthetic, targets, sources, folder, seed
):
    """Draw the lines of each domain and side, and put them together.

    Arguments
    ---------
    given : argparse.Namespace
        `lines`, `valid`, `test` (how many of a domain; None: all) and
        `longest` (seconds).
    prepared : pathlib.Path
        From `prepare_slurp`.
    synthetic : dict
        `{domain: manifest}`.
    targets, sources : list of str
        The domains.
    folder : pathlib.Path
        Manifests go into `data` in it.
    seed : int
        For what is drawn; held-out lines are the same for all seeds.

    Returns
    -------
    dict
        `{name of the data: manifest}`
    dict
        `{(domain, "valid" or "test"): manifest}`, recordings only
    dict
        `{target: {"words", "new_speakers"}}`: the words of the sources' texts,
        and the test utterances of speakers whom no source has heard (None
        where nobody knows who spoke)
    """
    drawn, held_out, tests, about = {}, {}, {}, {}
    for domain in dict.fromkeys([*targets, *sources]):
        sides = {
            "real": prepared / f"{domain}_train.csv",
            "synthetic": synthetic[domain],
        }
        for side, path in sides.items():
            rows = read_csv(path)
            tell_long(path, rows, given.longest)
            rows = [
                {**row, "lang": "en"}
                for row in rows
                if float(row["duration"]) <= given.longest
            ]
            if not rows:
                raise ValueError(
                    f"{path}: no utterance of at most {given.longest} s"
                )
            count = min(given.lines or len(rows), len(rows))
            draw = random.Random(f"{seed}/{side}/{domain}")
            drawn[f"{side}/{domain}"] = draw.sample(rows, count)
        for split in ("valid", "test"):
            path = prepared / f"{domain}_{split}.csv"
            rows = read_csv(path)
            tell_long(path, rows, given.longest)
            rows = [
                row for row in rows if float(row["duration"]) <= given.longest
            ]
            if not rows:
                raise ValueError(
                    f"{domain}: no {split} recording of at most "
                    f"{given.longest} s; leave the scenario out (--targets, "
                    "--sources), or lower --held_out"
                )
            random.Random(f"{split}/{domain}").shuffle(rows)
            rows = rows[: vars(given)[split]]
            held_out[domain, split] = write_rows(
                folder / "data" / f"{domain}_{split}.csv", rows
            )
            if split == "test":
                tests[domain] = rows
    for target in targets:
        others = [source for source in sources if source != target]
        real = [r for s in others for r in drawn[f"real/{s}"]]
        spoken = [named(r) for s in others for r in drawn[f"synthetic/{s}"]]
        own = [named(r) for r in drawn[f"synthetic/{target}"]]
        drawn[f"mixed/{target}"] = [*real, *spoken]
        drawn[f"joint/{target}"] = [*real, *own]
        texts = scored(dict(enumerate(r["text"] for r in [*real, *spoken])))
        heard = {row["spk_id"] for row in real}
        test = tests[target]
        about[target] = {
            "words": {word for text in texts.values() for word in text.split()},
            "new_speakers": None
            if any(not row["spk_id"] for row in [*real, *test])
            else {r["ID"] for r in test if r["spk_id"] not in heard},
        }
    manifests = {
        name: write_rows(folder / "data" / f"{name}.csv", rows, COLUMNS)
        for name, rows in drawn.items()
    }
    return manifests, held_out, about


def named(row):
    """Give synthetic speech a name that no recording has."""
    return row | {"ID": f"synthetic_{row['ID']}"}
