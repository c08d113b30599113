"""Labels into a folder, and how its YAML makes text of them again."""

import json

from speechbrain_taskarith.utils.model_folder.description import FOLDER_KEY


def describe_labels(labels, folder, name):
    """Write labels into a folder; return the YAML that makes text of them.

    Takes what turns text into labels in the Brains: SentencePieces after
    reserved labels, or a list of units after the blank.
    """
    if hasattr(labels, "processor"):
        file = f"{name}.model"
        (folder / file).write_bytes(labels.processor.serialized_model_proto())
        kind, key = "SentencePieceText", "model_file"
        more = f"offset: {len(labels.reserved)}"
    elif hasattr(labels, "units") and hasattr(labels, "joint"):
        file = f"{name}.txt"
        wrong = [unit for unit in labels.units if set(unit) & set("\r\n")]
        if wrong:
            raise ValueError(f"the {name} label {wrong[0]!r} has a line break")
        lines = ["<blank>", *labels.units]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        kind, key = "LabelText", "labels"
        more = f"separator: {json.dumps(labels.joint)}"
    else:
        raise ValueError(
            f"{name} labels: a {type(labels).__name__}; expected PieceLabels, "
            "WordLabels or CharacterLabels"
        )
    return (
        f"!new:speechbrain_taskarith.data.{kind}\n"
        f"{key}: !ref <{FOLDER_KEY}>/{file}\n{more}\n"
    )
