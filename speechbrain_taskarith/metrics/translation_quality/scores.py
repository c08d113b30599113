"""How good a translation is: BLEU and chrF by sacrebleu, and its length."""

from dataclasses import dataclass

from speechbrain_taskarith.utils.optional import require

# Languages without spaces between words; others have "13a".
_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}


@dataclass(frozen=True)
class TranslationReport:
    """Scores of a set of translations, made by `translation_scores`.

    Arguments
    ---------
    bleu, chrf : float
        BLEU and chrF2, 0 to 100.
    length_ratio : float
        Length of what was written over that of the references, in the tokens
        that BLEU counts.
    sentences : int
        How many.
    bleu_signature, chrf_signature : str
        sacrebleu's, to be quoted with the figures.

    Example
    -------
    >>> print(TranslationReport(23.456, 51.2, 0.98, 514, "sig", "sig"))
    BLEU 23.46, chrF 51.20, length ratio 0.980 (514 sentences)
    """

    bleu: float
    chrf: float
    length_ratio: float
    sentences: int
    bleu_signature: str
    chrf_signature: str

    def __str__(self):
        return (
            f"BLEU {self.bleu:.2f}, chrF {self.chrf:.2f}, length ratio "
            f"{self.length_ratio:.3f} ({self.sentences} sentences)"
        )


def translation_scores(
    references, hypotheses, *, lowercase=False, tokenize="13a"
):
    """Score translations with sacrebleu.

    Arguments
    ---------
    references : sequence of str, or sequence of sequence of str
        One translation for every sentence, or several sets of them, each as
        long as `hypotheses`.
    hypotheses : sequence of str
        What was written, detokenised.
    lowercase : bool
        True: the case of letters does not count.
    tokenize : str
        sacrebleu's tokeniser for BLEU: `"13a"`, `"zh"`, `"ja-mecab"`,
        `"none"`, ...

    Returns
    -------
    TranslationReport
        With both signatures.

    Raises
    ------
    ImportError
        Without sacrebleu, naming the extra to install.
    ValueError
        Numbers of sentences that differ, or none.
    TypeError
        A single string in place of a list, or a sentence that is no string,
        naming it.

    Example
    -------
    >>> try:
    ...     report = translation_scores(["le chat dort ici"], ["le chat dort"])
    ...     ratio = report.length_ratio
    ... except ImportError:
    ...     ratio = 0.75                      # the extra is not installed
    >>> ratio
    0.75
    """
    sacrebleu = require("sacrebleu", "translation", "BLEU")
    sets, hypotheses = checked(references, hypotheses)
    bleu = sacrebleu.BLEU(lowercase=lowercase, tokenize=tokenize)
    chrf = sacrebleu.CHRF(lowercase=lowercase)
    score = bleu.corpus_score(hypotheses, sets)
    written, expected = score.sys_len, score.ref_len
    return TranslationReport(
        bleu=score.score,
        chrf=chrf.corpus_score(hypotheses, sets).score,
        length_ratio=written / expected if expected else float(written > 0),
        sentences=len(hypotheses),
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )


def bleu_tokenizer(languages):
    """Return the tokeniser for BLEU of a language, for `translation_scores`.

    Arguments
    ---------
    languages : str or sequence of str
        Codes: `"de"`, `"zh-CN"`, ... Of several that need different ones,
        characters are counted (`"char"`).

    Returns
    -------
    str
        Of sacrebleu. Japanese and Korean need its own extras (`sacrebleu[ja]`).

    Example
    -------
    >>> bleu_tokenizer("zh-CN"), bleu_tokenizer(["de", "fr"])
    ('zh', '13a')
    >>> bleu_tokenizer(["de", "zh-CN"])
    'char'
    """
    languages = [languages] if isinstance(languages, str) else languages
    found = {
        _TOKENIZERS.get(language.replace("_", "-").split("-")[0].lower(), "13a")
        for language in languages
    }
    return found.pop() if len(found) == 1 else "char"


def checked(references, hypotheses):
    """Return sets of references and hypotheses, as lists that fit."""
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise TypeError(
            "expected lists of sentences, got a single string; write "
            "translation_scores([reference], [hypothesis])"
        )
    hypotheses, references = list(hypotheses), list(references)
    sets = [references]
    if references and isinstance(references[0], list | tuple):
        sets = [list(one) for one in references]
    for what, one in [("hypothesis", hypotheses)] + [
        ("reference", one) for one in sets
    ]:
        for number, sentence in enumerate(one):
            if not isinstance(sentence, str):
                raise TypeError(
                    f"sentence {number}: the {what} is {sentence!r}, "
                    "expected a string"
                )
    if not hypotheses or any(len(one) != len(hypotheses) for one in sets):
        raise ValueError(
            f"{len(hypotheses)} hypotheses, {[len(one) for one in sets]} "
            "references: expected as many, and at least one"
        )
    return sets, hypotheses
