"""The speech of the quickstart: two domains out of a corpus or manifest."""

import collections
import csv
import json
import math
import random
import re
import sys
from pathlib import Path

from common.rows import load_rows
from synthesize import synthesize
from whisper_window import languages_of

from studies.lines import check_splits, write_csv

RECIPES = Path(__file__).resolve().parents[4]
SPLITS = ("train", "valid", "test")
EXPECTED = (
    "expected a folder that a prepare script of recipes/ wrote (train.csv, "
    "test.csv), the packages of Fish Fillets NG (.deb), a clone of the "
    "Kathleen ARCTIC corpus, or a CSV file with the columns ID, duration, "
    "wav, text (or wrd), split and domain or lang"
)
# Of all lines, that have to fit into a short window.
MOST = 0.7


def read_corpus(data, prepared):
    """Return `{split: rows}` of what DATA names; raw corpora are prepared."""
    data = Path(data).expanduser().resolve()
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or folder; {EXPECTED}")
    if data.is_file():
        return by_split(data, read_rows(data))
    if not is_prepared(data):
        if (found := data / "manifest.csv").is_file() and is_whole(found):
            return by_split(found, read_rows(found))
        prepare(data, prepared)
        data = prepared
    return {
        split: read_rows(data / f"{split}.csv")
        for split in SPLITS
        if (data / f"{split}.csv").exists()
    }


def is_prepared(folder):
    """Tell whether a prepare script of ours, or one like it, wrote it."""
    train = folder / "train.csv"
    if not (train.is_file() and (folder / "test.csv").is_file()):
        return False
    return bool({"domain", "lang"} & set(columns_of(train)))


def is_whole(manifest):
    """Tell whether a manifest says all that is needed, for all splits."""
    columns = set(columns_of(manifest))
    return all(
        columns & some
        for some in ({"split"}, {"text", "wrd"}, {"domain", "lang"})
    )


def columns_of(path):
    """Return a manifest's columns."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream, skipinitialspace=True), [])


def prepare(data, save):
    """Prepare one of the corpora that are known, or say what is expected."""
    for corpus in ("FilletsNG", "KathleenArctic"):
        sys.path.append(str(RECIPES / corpus))
    from fillets_prepare import find_tree, prepare_fillets
    from kathleen_prepare import prepare_kathleen

    if find_tree(data) or any(data.glob("fillets-ng-data*.deb")):
        prepare_fillets(str(data), str(save))
    elif any((data / f).exists() for f in ("cmuarctic.data", "manifest.csv")):
        try:
            prepare_kathleen(str(data), str(save))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{data}: {EXPECTED} ({error})") from error
    else:
        raise ValueError(f"{data}: {EXPECTED}")


def read_rows(path):
    """Read a manifest: paths absolute, `text` filled, durations numbers."""
    rows = load_rows(path, path.parent, ("duration", "wav"))
    rows = [{"ID": key, **row} for key, row in rows.items()]
    if not {"text", "wrd"} & set(rows[0]):
        raise ValueError(
            f"{path}: no column text (or wrd); found {', '.join(rows[0])}"
        )
    for row in rows:
        row["wav"] = str(path.parent / row["wav"])
        # `wrd` is in capitals, as nobody writes.
        row["text"] = (row.get("text") or row.get("wrd", "").lower()).strip()
        # It becomes the name of a file.
        row["ID"] = re.sub(r"[^\w.-]", "_", row["ID"])
    counts = collections.Counter(row["ID"] for row in rows)
    key, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: ID {key!r} stands there {count} times")
    silent = [row["ID"] for row in rows if not row["text"]]
    if silent:
        raise ValueError(
            f"{path}: {len(silent)} utterances have no text, e.g. "
            f"{', '.join(silent[:3])}; fill the column or leave them out"
        )
    return rows


def by_split(path, rows):
    """Take a manifest of all splits apart."""
    if "split" not in rows[0]:
        raise ValueError(
            f"{path}: no column split, with train, test and, if any, valid"
        )
    found = {}
    for row in rows:
        found.setdefault(row["split"], []).append(row)
    return found


def domains_of(splits, data, language=None):
    """Return `{domain: {split: rows}}`, the largest first.

    The column `domain` tells domains apart or, where all rows have the same,
    `lang`. Every row gets a language.
    """
    for split in ("train", "test"):
        if not splits.get(split):
            raise ValueError(f"{data}: no utterances of the split {split!r}")
    rows = [row for split in SPLITS for row in splits.get(split, ())]
    column = "domain"
    if len({row.get(column) or "" for row in rows}) < 2:
        column = "lang"
    found, written = {}, {}
    for split in SPLITS:
        for row in splits.get(split, ()):
            row["lang"] = row.get("lang") or language
            if not row["lang"]:
                raise ValueError(
                    f"{data}: {row['ID']} has no language; fill the column "
                    "lang, or give SPOKEN=en (--language)"
                )
            value = row.get(column) or "none"
            name = re.sub(r"[^\w-]", "_", value)
            if written.setdefault(name, value) != value:
                raise ValueError(
                    f"{data}: the domains {written[name]!r} and {value!r} "
                    f"would both be named {name!r}; rename one"
                )
            parts = found.setdefault(name, {split: [] for split in SPLITS})
            parts[split].append(row)
    whole = {n: p for n, p in found.items() if p["train"] and p["test"]}
    if len(whole) < 2:
        raise ValueError(
            f"{data}: {len(whole)} domain(s) with lines in train and in test "
            f"({', '.join(whole) or 'none'}); two are needed, told apart by "
            "the column domain or lang"
        )
    for name, parts in whole.items():
        check_splits(name, parts)
    return dict(sorted(whole.items(), key=lambda item: -len(item[1]["train"])))


def check_languages(domains, languages, model):
    """Refuse languages that the model's tokenizer does not know."""
    for name, parts in domains.items():
        for rows in parts.values():
            for row in rows:
                if row["lang"] in languages:
                    continue
                if languages == {"en"}:
                    raise ValueError(
                        f"{model}: an English-only Whisper, but domain {name} "
                        f"has lines in {row['lang']!r}, e.g. {row['ID']}; "
                        "give a multilingual one, e.g. openai/whisper-base"
                    )
                raise ValueError(
                    f"{row['ID']} in domain {name}: language {row['lang']!r} "
                    f"is none that {model} knows; give a code such as 'nl'"
                )


def choose_window(domains, whole, short):
    """Return the whole seconds that the model is to hear, at most `whole`.

    As long as the longest line, or `short` where that keeps most lines.
    """
    lengths = [
        row["duration"]
        for parts in domains.values()
        for rows in parts.values()
        for row in rows
    ]
    kept = [seconds for seconds in lengths if seconds <= short]
    if len(kept) < MOST * len(lengths):
        kept = lengths
    kept = [seconds for seconds in kept if seconds <= whole]
    if not kept:
        raise ValueError(
            f"all {len(lengths)} lines are longer than {whole:g} s, the "
            "window of the model, e.g. "
            f"{min(lengths):g} s; cut the recordings into sentences"
        )
    return min(whole, math.ceil(max(kept)))


def draw_lines(domains, longest, folder, *, lines, test, seed):
    """Draw lines of both sides; the same texts, recorded and synthetic.

    Returns `{training: manifest}`, `{(domain, "test"): manifest}` and how
    many lines were too long, `{domain: count}`.
    """
    drawn, held_out, left_out = {}, {}, {}
    for name, parts in domains.items():
        kept = {
            split: [row for row in rows if row["duration"] <= longest]
            for split, rows in parts.items()
        }
        left_out[name] = sum(map(len, parts.values())) - sum(
            map(len, kept.values())
        )
        for split in ("train", "test"):
            if not kept[split]:
                raise ValueError(
                    f"domain {name}: no line of {split} of at most {longest:g}"
                    " s, which the model can hear"
                )
        # Some more: synthetic speech may be longer than what was recorded.
        rows = kept["train"]
        random.Random(f"{seed}/{name}").shuffle(rows)
        rows = rows[: math.ceil(1.25 * lines)]
        held = kept["test"]
        random.Random(f"test/{name}").shuffle(held)
        held = held[:test]
        check_files(name, [*rows, *held])
        spoken = speak(name, rows, folder)
        both = [row for row in rows if spoken[row["ID"]]["duration"] <= longest]
        if not both:
            raise ValueError(
                f"domain {name}: every text takes the synthetic voice more "
                f"than {longest:g} s"
            )
        both = both[:lines]
        drawn[f"real/{name}"] = both
        drawn[f"synthetic/{name}"] = [spoken[row["ID"]] for row in both]
        held_out[name, "test"] = write_csv(
            folder / "data" / f"{name}_test.csv", held
        )
    for target in domains:
        drawn[f"joint/{target}"] = [
            row | {"ID": f"{side}_{row['ID']}"}
            for name in domains
            for side in ("synthetic" if name == target else "real",)
            for row in drawn[f"{side}/{name}"]
        ]
    manifests = {
        name: write_csv(folder / "data" / f"{name}.csv", rows)
        for name, rows in drawn.items()
    }
    return manifests, held_out, left_out


def check_files(name, rows):
    """Refuse rows without a recording before anything is trained."""
    for row in rows:
        if not Path(row["wav"]).is_file():
            raise FileNotFoundError(
                f"{row['wav']}: no such file; the recording of {row['ID']} "
                f"in domain {name}"
            )


def speak(name, rows, folder):
    """Speak a domain's texts, each language by its own voice."""
    spoken = {}
    for lang in sorted({row["lang"] for row in rows}):
        lines = [row for row in rows if row["lang"] == lang]
        texts = write_csv(folder / "data" / f"texts_{name}_{lang}.csv", lines)
        manifest = synthesize(
            texts,
            folder / "synthetic" / name / lang,
            {"en": "en-us"}.get(lang, lang),
        )
        for row in read_rows(Path(manifest)):
            spoken[row["ID"]] = row
    return spoken


def describe(folder):
    """Return a Whisper folder's languages, and its window in seconds."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no config.json; expected a folder with a Whisper as "
            "transformers writes it, or a hub name such as openai/whisper-base"
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "whisper":
        raise ValueError(
            f"{folder}: a {config.get('model_type')} model; expected a Whisper"
        )
    if config["vocab_size"] < 51865:
        return {"en"}, config["max_source_positions"] / 50
    from transformers import WhisperTokenizer

    tokenizer = WhisperTokenizer.from_pretrained(folder)
    return languages_of(tokenizer), config["max_source_positions"] / 50
