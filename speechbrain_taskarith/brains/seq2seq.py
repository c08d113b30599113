"""A ready Brain for attention encoder-decoders, Whisper among them."""

import speechbrain as sb
import torch

from speechbrain_taskarith.brains.ctc import CTCBrain, bare
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class Seq2SeqBrain(CTCBrain):
    """Train and test a `Seq2SeqNetwork` or `WhisperNetwork`.

    As `CTCBrain`, with these differences:

    - `model(x, lens, tokens_bos) -> log-probabilities of the next tokens`,
      and `model.encode`, `model.decode` for the search;
    - `seq_cost` in place of `ctc_cost`: e.g.
      `!name:speechbrain.nnet.losses.nll_loss` with `label_smoothing` and
      `reduction: batchmean`;
    - `prompt`: list of token indices that every transcript starts with (the
      beginning token; for Whisper also language and task), and
      `eos_index`; the hypotheses are without them, and without the
      `reserved` labels of the tokenizer, such as blank;
    - `max_tokens`: longest transcript of the search;
    - `searcher` (optional): `searcher(encoded, lens)` whose first result
      are the hypotheses, as SpeechBrain's; without it a greedy search of
      our own is used.

    A batch's `tokens` are those of the transcript alone: prompt and end are
    put around them here.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer : object
        As `sb.Brain` takes them.

    Example
    -------
    >>> from functools import partial
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     TransformerASR,
    ... )
    >>> from speechbrain.nnet.losses import nll_loss
    >>> from speechbrain_taskarith.brains import (
    ...     CharacterLabels,
    ...     Seq2SeqNetwork,
    ... )
    >>> transformer = TransformerASR(5, 4, 8, 2, 1, 1, 16, causal=False)
    >>> model = Seq2SeqNetwork(transformer, torch.nn.Linear(8, 5))
    >>> labels = CharacterLabels("AB")
    >>> brain = Seq2SeqBrain(
    ...     {"model": model},
    ...     hparams={
    ...         "seq_cost": partial(nll_loss, reduction="batchmean"),
    ...         "prompt": [3],
    ...         "eos_index": 4,
    ...         "max_tokens": 5,
    ...         "tokenizer": labels,
    ...     },
    ...     run_opts={"device": "cpu"},
    ... )
    >>> batch = PaddedBatch(
    ...     [
    ...         {
    ...             "id": "u1",
    ...             "sig": torch.rand(6, 4),
    ...             "tokens": labels.encode("AB"),
    ...             "wrd": "AB",
    ...         }
    ...     ]
    ... )
    >>> log_probs, lens = brain.compute_forward(batch, sb.Stage.TRAIN)
    >>> log_probs.shape, lens
    (torch.Size([1, 3, 5]), tensor([1.]))
    >>> loader = torch.utils.data.DataLoader([batch], collate_fn=lambda b: b[0])
    >>> _ = brain.evaluate(loader, progressbar=False)
    >>> set(brain.hypotheses[0]) <= set("AB")
    True
    """

    def compute_forward(self, batch, stage):
        """Score what follows each token, from the last of the prompt on."""
        batch = batch.to(self.device)
        features, lens = self.features(batch, stage)
        bos, self._targets, token_lens = self._around(batch)
        self._inputs = (features, lens, bos)
        log_probs = self._score(self.modules.model, *self._inputs)
        return log_probs, token_lens

    def _score(self, model, *inputs):
        # The prompt is given: what follows its last token is scored.
        return model(*inputs)[:, len(self.hparams.prompt) - 1 :]

    def _around(self, batch):
        """Return decoder input, targets, and the targets' lengths."""
        tokens, lens = batch.tokens
        count = absolute_lengths(lens, tokens.shape[1])
        prompt = torch.as_tensor(self.hparams.prompt, device=tokens.device)
        prompt = prompt.expand(len(tokens), -1)
        eos = self.hparams.eos_index
        targets = torch.nn.functional.pad(tokens, (0, 1), value=eos)
        beyond = padding_mask(count, targets.shape[1])
        targets = targets.masked_fill(beyond, eos)
        bos = torch.cat([prompt, targets[:, :-1]], dim=1)
        return bos, targets, (count + 1) / targets.shape[1]

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss; outside training also search for words."""
        log_probs, token_lens = predictions
        loss = self.hparams.seq_cost(
            log_probs, self._targets, length=token_lens
        )
        if stage == sb.Stage.TRAIN:
            return loss
        features, lens, _ = self._inputs
        with torch.no_grad():
            encoded = bare(self.modules.model).encode(features, lens)
            labels = self._search(encoded, lens)
        labels = self._without_marks(labels)
        self._collect(batch, self.hparams.tokenizer.decode(labels))
        return loss

    def _without_marks(self, labels):
        """Leave out what a model may emit and no transcript has."""
        first = len(getattr(self.hparams.tokenizer, "reserved", ()))
        prompt = list(self.hparams.prompt)
        return [
            [label for label in row if label >= first and label not in prompt]
            for row in labels
        ]

    def _search(self, encoded, lens):
        searcher = getattr(self.hparams, "searcher", None)
        if searcher is not None:
            return searcher(encoded, lens)[0]
        return greedy_search(
            bare(self.modules.model),
            encoded,
            lens,
            self.hparams.prompt,
            self.hparams.eos_index,
            self.hparams.max_tokens,
        )

    def loss_of(self, batch):
        """Return the loss of a batch, with gradient and no augmentation.

        Arguments
        ---------
        batch : PaddedBatch
            See the class; of one utterance, for the Fisher information.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        batch = batch.to(self.device)
        x, lens = self.features(batch, sb.Stage.VALID)
        bos, targets, token_lens = self._around(batch)
        log_probs = self._score(bare(self.modules.model), x, lens, bos)
        return self.hparams.seq_cost(log_probs, targets, length=token_lens)


def greedy_search(model, encoded, lens, prompt, eos_index, max_tokens):
    """Take the best next token, batched, until all have ended.

    `model.decode(tokens, encoded, lens)` gives scores [batch, vocabulary];
    returns lists of tokens without prompt and end.
    """
    start = torch.tensor([list(prompt)], device=encoded.device)
    tokens = start.expand(len(encoded), -1)
    ended = torch.zeros(len(encoded), dtype=torch.bool, device=encoded.device)
    for _ in range(max_tokens):
        best = model.decode(tokens, encoded, lens).argmax(dim=-1)
        best = torch.where(ended, eos_index, best)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
        ended = ended | (best == eos_index)
        if ended.all():
            break
    found = []
    for row in tokens[:, len(prompt) :].tolist():
        end = row.index(eos_index) if eos_index in row else len(row)
        found.append(row[:end])
    return found
