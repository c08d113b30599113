"""Which of SpeechBrain's recipes each method drops into.

    python tests/drop_in/scan.py <checkout> [--write]

prints the table of docs/drop_in_recipes.md, or writes it there.

A recipe is a training script with the YAML files that SpeechBrain's own
`tests/recipes/*.csv` list for it, or else those beside it. Only source text is
read, none is run.
"""

import ast
import csv
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "drop_in_recipes.md"
BEGIN = "<!-- by tests/drop_in/scan.py -->"
END = "<!-- up to here -->"

# What tests/drop_in runs, by script and column of the table.
RAN = {
    "CommonVoice/ASR/transformer/train_with_whisper.py": (
        "editing",
        "merging",
        "adapters",
    ),
    "Fisher-Callhome-Spanish/ST/transformer/train.py": ("editing", "shrinking"),
    "IWSLT22_lowresource/AST/transformer/train.py": ("editing",),
    "LibriSpeech/ASR/CTC/train_with_wav2vec.py": ("editing", "adapters"),
    "LibriSpeech/ASR/transducer/train.py": ("editing", "transducer"),
    "LibriSpeech/ASR/transformer/train.py": (
        "editing",
        "merging",
        "adapters",
        "shrinking",
    ),
}
COLUMNS = ("editing", "merging", "adapters", "transducer", "shrinking")
NOTES = {
    "a": "averages checkpoints and saves the mean in its test, as "
    "LibriSpeech/ASR/transformer does",
    "b": "tells the checkpointer of no optimizer, as "
    "IWSLT22_lowresource/AST/transformer does",
    "c": "its YAML with LoRA saves adapters only, which is refused; make a "
    "vector of the LoRA (`TaskVector.from_lora`) and merge that",
    "d": "no: `train.py` calls no Pretrainer. Merge first (`taskarith merge`) "
    "and name the file as `base:` of an EditingCheckpointer",
    "e": "in the YAML, `freeze: False` for the encoder's wrapper: under "
    "`freeze` it runs without gradients, and adapters train inside it",
    "f": "no: `train.py` cuts the encoder's layers off after the YAML is "
    "loaded; with `keep_n_layers` at the model's own number it cuts none",
    "g": "no: `forward_mt_decoder_only` gets features without lengths, and "
    "there is no CTC head nor a transcript",
    "h": "no: `train.py` takes the encoder apart, or calls it past `modules`",
    "i": "no: the model has no decoder that attends to frames",
    "k": "no: it has no `Checkpointer` in its YAML, or gives the Brain none",
}
WRAPPER = re.compile(
    r"integrations\.huggingface\.(whisper|wav2vec2|hubert|wavlm|weighted_ssl)"
)
TRANSFORMER = re.compile(r"TransformerASR\.TransformerASR|TransformerST\.\w+")


@dataclass
class Recipe:
    """What a recipe's script and YAML files say.

    Arguments
    ---------
    script : pathlib.Path
    hparams : list of pathlib.Path
    """

    script: Path
    hparams: list = field(default_factory=list)

    def __post_init__(self):
        """Read the files."""
        self.source = self.script.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.yaml = "\n".join(
            re.sub(r"(?m)#.*$", "", path.read_text(encoding="utf-8"))
            for path in sorted(self.hparams)
            if path.exists()
        )

    def method(self, name):
        """Return the source of the methods of a name."""
        return "\n".join(
            ast.get_source_segment(self.source, node)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef) and node.name == name
        )

    @property
    def saves_in_test(self):
        """It saves a checkpoint in the test stage: the mean of the others."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.If) and _is_test(node.test):
                body = ast.unparse(ast.Module(node.body, []))
                if (
                    ".save_and_keep_only(" in body
                    or ".save_checkpoint(" in body
                ):
                    return True
        return False

    @property
    def registers_no_optimizer(self):
        """It makes its optimizers and does not tell the checkpointer."""
        made = self.method("init_optimizers")
        return bool(made) and "add_recoverable" not in made

    @property
    def names_a_device(self):
        """It calls `load_collected` with a device, which SpeechBrain refuses."""
        return re.search(r"load_collected\([^)]", self.source) is not None

    @property
    def has_pretrainer(self):
        """It calls the Pretrainer that a YAML names."""
        return "load_collected(" in self.source

    @property
    def has_checkpointer(self):
        """A YAML names SpeechBrain's own Checkpointer, and the Brain gets it."""
        named = "utils.checkpoints.Checkpointer" in self.yaml
        return named and "checkpointer=" in self.source

    @property
    def has_lora(self):
        """A YAML wraps its model with LoRA, which saves adapters only."""
        return "AdaptedModel" in self.yaml

    @property
    def has_wrapper(self):
        """The encoder is one of SpeechBrain's wrappers of Hugging Face."""
        return WRAPPER.search(self.yaml) is not None

    @property
    def has_layers(self):
        """There is an encoder that `insert_adapters` finds layers in."""
        return self.has_wrapper or TRANSFORMER.search(self.yaml) is not None

    @property
    def cuts_layers(self):
        """It removes layers from the encoder that the YAML has built."""
        return "keep_n_layers" in self.source

    @property
    def why_not_shrinking(self):
        """Letter of the note, or nothing where ShrinkingTransformer fits."""
        if "forward_mt_decoder_only" in self.source:
            return "g"
        called = re.search(
            r"modules\.Transformer\(\s*\w+,\s*\w+,\s*wav_lens", self.source
        )
        if "S2STransformerBeamSearcher" not in self.yaml:
            return "i"
        return "" if called and "bayes" not in self.source.lower() else "h"


def _is_test(test):
    text = ast.unparse(test)
    return re.search(r"==\s*(sb\.|core\.)*Stage\.TEST", text) is not None


def recipes(checkout):
    """Return `{path below recipes: Recipe}` of a checkout."""
    root = Path(checkout)
    listed = {}
    for table in sorted((root / "tests" / "recipes").glob("*.csv")):
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, skipinitialspace=True):
                files = listed.setdefault(root / row["Script_file"], set())
                files.add(root / row["Hparam_file"])
    found = {}
    for script in sorted((root / "recipes").rglob("train*.py")):
        if not script.is_symlink():
            files = listed.get(script) or script.parent.rglob("hparams/*.yaml")
            name = str(script.relative_to(root / "recipes"))
            found[name] = Recipe(script, sorted(files))
    return found


def cells(name, recipe):
    """Return a recipe's row of the table, a text for each column."""
    row = {column: "" for column in COLUMNS}
    # How a stock recipe of this kind fares, in the words of NOTES.
    if recipe.has_checkpointer:
        notes = "a" * recipe.saves_in_test + "b" * recipe.registers_no_optimizer
        row["editing"] = "yes " + notes + "c" * recipe.has_lora
    else:
        row["editing"] = "k"
    row["merging"] = "yes" if recipe.has_pretrainer else "d"
    if recipe.has_layers:
        row["adapters"] = "f" if recipe.cuts_layers else "yes"
        row["adapters"] += " e" * recipe.has_wrapper * (not recipe.cuts_layers)
    if "transducer_loss" in recipe.yaml:
        row["transducer"] = "yes"
    if "TransformerASR" in recipe.yaml or "TransformerST" in recipe.yaml:
        row["shrinking"] = recipe.why_not_shrinking or "yes"
    for column in RAN.get(name, ()):
        assert row[column].startswith("yes"), (name, column)
        row[column] = row[column].replace("yes", "**run**")
    return [_mark(cell) for cell in row.values()]


def _mark(cell):
    words = cell.split()
    notes = [word for word in words if set(word) <= set(NOTES)]
    text = " ".join(word for word in words if word not in notes) or "no"
    return f"{text} {','.join(''.join(notes))}".strip() if words else "-"


def touched(recipe):
    """Tell whether the table has a row for it: there is something to say."""
    if re.search("quantization|self-supervised", str(recipe.script)):
        return False  # nothing is fine-tuned
    return (
        recipe.has_layers
        or recipe.saves_in_test
        or recipe.registers_no_optimizer
        or recipe.names_a_device
        or "transducer_loss" in recipe.yaml
    )


def table(checkout):
    """Yield the lines of the page's table, and its notes."""
    yield f"| recipe | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    rest, used = 0, set()
    for name, recipe in recipes(checkout).items():
        if touched(recipe):
            row = cells(name, recipe)
            used |= {word for cell in row for word in re.split("[ ,]", cell)}
            yield f"| `{name}` | {' | '.join(row)} |"
        else:
            rest += recipe.has_checkpointer
    yield ""
    for letter, text in NOTES.items():
        if letter in used:
            yield f"- {letter}: {text}"
    yield ""
    yield (
        f"{rest} more recipes name a `Checkpointer` in their YAML and do "
        "nothing else of this. Editing is the same change there; nobody has "
        "tried it."
    )


def main(checkout, *flags):
    """Print the table, or with `--write` put it into the page."""
    text = "\n".join(table(checkout))
    if "--write" not in flags:
        print(text)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
