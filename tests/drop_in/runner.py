"""Runs a recipe of a SpeechBrain checkout, its `train.py` untouched.

What a run uses is the recipe's own YAML, changed by a diff that
`docs/drop_in.md` shows, and sizes given on the command line. The page is the
only place where the diffs stand.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "drop_in.md"
PRELOADED = [
    "speechbrain",
    "speechbrain.integrations.huggingface.whisper",
    "speechbrain.integrations.huggingface.wav2vec2",
    "speechbrain.lobes.models.transformer.TransformerASR",
    "speechbrain_taskarith.vectors",
    "transformers.models.whisper.modeling_whisper",
    "transformers.models.wav2vec2.modeling_wav2vec2",
]
EMPTY = "def __getattr__(name):\n    return type(name, (), {})\n"
STAND_INS = {
    "flair/__init__": "",
    "flair/data": EMPTY,
    "flair/embeddings": EMPTY,
    "flair/models": EMPTY,
    "spacy/__init__": "from spacy import language, tokens",
    "spacy/language": EMPTY,
    "spacy/tokens": EMPTY,
    "sacremoses": """class MosesDetokenizer:
    def __init__(self, lang):
        pass

    def detokenize(self, words):
        return " ".join(words)
""",
}
# Input statistics that are loaded, and not counted on.
STILL = {"normalize": {"update_until_epoch": 1}}
# One for every run: (recipe, YAML, what was done, seconds, exit status).
RUNS = []


def page_diffs(page=PAGE):
    """Return `{new name: (stock path, hunks)}` of the page's diffs.

    A hunk is a pair of texts: what the stock YAML has, and what the recipe
    has then.
    """
    found = {}
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```diff\n(.*?)^```", text, re.M | re.S):
        old, new, *lines = block.splitlines()
        stock, name = old.removeprefix("--- "), new.removeprefix("+++ ")
        assert (old, new) == (f"--- {stock}", f"+++ {name}"), block
        assert name not in found, f"{name} stands twice on the page"
        hunks, lines = [], [line for line in lines if line]
        for line in lines:
            if line.startswith("@@"):
                hunks.append(("", ""))
                continue
            kind, rest = line[0], line[1:] + "\n"
            assert kind in " +-", f"{name}: {line!r}"
            before, after = hunks[-1]
            hunks[-1] = (
                before + rest * (kind in " -"),
                after + rest * (kind in " +"),
            )
        found[name] = (stock, hunks)
    return found


def apply_hunks(text, hunks, label):
    """Return a YAML's text after a diff; each hunk fits at one place."""
    for before, after in hunks:
        if not before:
            text += after
            continue
        places = len(re.findall(f"^{re.escape(before)}", text, re.M))
        if places != 1:
            raise ValueError(f"{label}: {places} places for:\n{before}")
        at = re.search(f"^{re.escape(before)}", text, re.M)
        text = text[: at.start()] + after + text[at.end() :]
    return text


def md5(path):
    """Return the digest of a file's bytes."""
    return hashlib.md5(path.read_bytes()).hexdigest()


class Recipe:
    """A recipe's folder, copied; its training script is never written to.

    Arguments
    ---------
    checkout : pathlib.Path
        SpeechBrain's repository.
    script : str
        The training script, from the checkout's root.
    folder : pathlib.Path
        Where the copy and its results go.
    hparams : str
        The stock YAML, from the recipe's folder.
    sizes : dict
        Overrides that make the recipe small, for every run.
    """

    def __init__(self, checkout, script, folder, hparams, sizes):
        self.stock = Path(checkout) / script
        self.name = str(Path(script).relative_to("recipes"))
        self.folder = Path(folder) / "recipe"
        shutil.copytree(self.stock.parent, self.folder)
        self.results = Path(folder) / "results"
        self.script = self.folder / self.stock.name
        self.digest = md5(self.stock)
        self.hparams, self.sizes = hparams, sizes

    def changed(self, *names):
        """Write the YAML that diffs of the page make; return its name."""
        here = self.stock.parent / self.hparams
        text = here.read_text(encoding="utf-8")
        for name in names:
            stock, hunks = page_diffs()[name]
            assert str(here).endswith(stock), f"{name} is a diff of {stock}"
            text = apply_hunks(text, hunks, name)
        (self.folder / name).write_text(text, encoding="utf-8")
        return name

    def run(self, output, *flags, diff=None, expect=0, sizes=(), **overrides):
        """Train and evaluate in a process of its own; return a `Run`.

        Arguments
        ---------
        output : str
            Name of the output folder; an existing one is resumed.
        *flags : str
            Command-line options, as `--test_only`.
        diff : str, sequence of str or None
            A diff of the page, or several; None for the stock YAML.
        expect : int or None
            The exit status; None for any but 0.
        sizes : dict
            Overrides that replace some of the recipe's.
        **overrides : object
            Top-level keys of the YAML; a dictionary changes what it names.
        """
        assert md5(self.script) == self.digest
        diffs = (diff,) if isinstance(diff, str) else diff
        hparams = self.changed(*diffs) if diffs else self.hparams
        folder = self.results / output
        overrides = merged(self.sizes, merged(dict(sizes), overrides))
        overrides["output_folder"] = str(folder)
        arguments = [hparams, "--device=cpu", "--noprogressbar", *flags]
        arguments += [f"--{k}={as_yaml(v)}" for k, v in overrides.items()]
        log = self.results.parent / f"{output}.log"
        started = time.monotonic()
        status = run_script(self.script, arguments, log)
        seconds = time.monotonic() - started
        RUNS.append((self.name, hparams, output, seconds, status))
        assert md5(self.script) == self.digest, "train.py was changed"
        run = Run(folder, log.read_text(errors="replace"), status)
        fine = status == expect if expect is not None else status != 0
        assert fine, (
            f"python {self.script} {' '.join(arguments)}: {status}\n"
            f"{run.log[-6000:]}"
        )
        return run

    def run_from(self, base, output, **overrides):
        """Fine-tune from a checkpoint by SpeechBrain's own classes alone.

        The oracle of an edited run: from the same weights and statistics,
        held still, with the same seed, it trains the same.
        """
        loadables = "{model: !ref <model>, normalizer: !ref <normalize>}"
        paths = (
            f"{{model: {base}/model.ckpt, normalizer: {base}/normalizer.ckpt}}"
        )
        return self.run(
            output,
            pretrainer=f"{{loadables: {loadables}, paths: {paths}}}",
            **{**STILL, **overrides},
        )


class Run:
    """What a run left behind.

    Arguments
    ---------
    folder : pathlib.Path
        Its output folder.
    log : str
        What it printed.
    status : int
        Of its process.
    """

    def __init__(self, folder, log, status):
        self.folder, self.log, self.status = Path(folder), log, status
        self.save = self.folder / "save"

    @property
    def checkpoints(self):
        """The checkpoint folders, the oldest first."""
        return sorted(
            self.save.glob("CKPT+*"),
            key=lambda p: (p / "CKPT.yaml").stat().st_mtime,
        )

    @property
    def scores(self):
        """The results on the last two test sets, as the recipe logs them."""
        lines = (self.folder / "train_log.txt").read_text().splitlines()
        return [line.partition(" - ")[2] for line in lines[-2:]]

    @property
    def error(self):
        """The last line that was printed: what went wrong."""
        return self.log.strip().splitlines()[-1]


def run_script(script, arguments, log):
    """Run a script as `python <script> <arguments>`; return its exit status.

    The process is a fork of one that has imported the libraries, which halves
    the time of a run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(
        target=_be_python, args=(str(script), arguments, str(log))
    )
    process.start()
    process.join(timeout=600)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _be_python(script, arguments, log):
    folder = os.path.dirname(script)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    # Tests' own modules must not stand before the recipe's.
    sys.path[:] = [p for p in sys.path if p != str(HERE)]
    sys.path[:0] = [folder, str(ROOT)]
    sys.path.append(stand_ins(os.path.dirname(log)))
    sys.argv = [script, *arguments]
    os.chdir(folder)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()


def stand_ins(folder):
    """Write a stand-in for each package that the BLEU recipes lack.

    SpeechBrain's BLEU stands beside wrappers of flair and spaCy, which are
    imported with it and never used; sacremoses joins words.
    """
    folder = Path(folder) / "stand_ins"
    for name, text in STAND_INS.items():
        if importlib.util.find_spec(name.partition("/")[0]) is None:
            path = folder / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return str(folder)


def as_yaml(value):
    """Return an override as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def merged(sizes, overrides):
    """Return overrides over sizes; dictionaries are merged, not replaced."""
    result = dict(sizes)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def table(rows):
    """Yield lines of text for some runs."""
    yield f"{'recipe':50} {'YAML':35} {'run':15} {'s':>5} rc"
    for recipe, hparams, output, seconds, status in rows:
        hparams = hparams.removeprefix("hparams/")
        yield f"{recipe:50} {hparams:35} {output:15} {seconds:5.1f} {status:2}"
    yield f"{len(rows)} runs, {sum(row[3] for row in rows):.0f} s"
