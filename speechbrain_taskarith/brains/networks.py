"""Networks whole: one module with one state, from features to scores.

SpeechBrain recipes keep a model's parts in several entries of `modules`. A
task vector wants one module: one state dict with telling names, one DDP
wrapper, one thing to copy as a teacher.
"""

import torch

from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    ignore_padding,
    without_padding,
)


class CTCNetwork(torch.nn.Module):
    """Front-end, encoder and output layer of a CTC model.

    Arguments
    ---------
    encoder : torch.nn.Module
        `encoder(x, lens) -> [batch, time, d]`, e.g. SpeechBrain's
        `EncoderWrapper` around a `TransformerASR`, or `Wav2Vec2` (also with a
        wav2vec2-conformer folder) or `HuBERT` from
        `speechbrain.integrations.huggingface`, which take raw waveforms.
    ctc_lin : torch.nn.Module
        Linear layer onto the labels and the blank.
    frontend : torch.nn.Module, optional
        `frontend(x) -> x`, e.g. strided convolutions.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     EncoderWrapper,
    ...     TransformerASR,
    ... )
    >>> encoder = EncoderWrapper(
    ...     TransformerASR(
    ...         tgt_vocab=5,
    ...         input_size=8,
    ...         d_model=8,
    ...         nhead=2,
    ...         num_encoder_layers=1,
    ...         num_decoder_layers=0,
    ...         d_ffn=16,
    ...         encoder_module="conformer",
    ...         normalize_before=True,
    ...         causal=False,
    ...     )
    ... )
    >>> network = CTCNetwork(encoder, torch.nn.Linear(8, 5))
    >>> network(torch.rand(2, 12, 8), torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 12, 5])
    """

    def __init__(self, encoder, ctc_lin, frontend=None):
        super().__init__()
        if frontend is not None:
            self.frontend = frontend
        self.encoder = ignore_padding(encoder)
        self.ctc_lin = ctc_lin

    def forward(self, x, lens):
        """Score every frame.

        Arguments
        ---------
        x : torch.Tensor
            Features [batch, time, features] or waveforms [batch, time].
        lens : torch.Tensor
            [batch], relative lengths in (0, 1].

        Returns
        -------
        torch.Tensor
            [batch, frames, labels], log-probabilities.
        """
        x = without_padding(x, lens)
        if hasattr(self, "frontend"):
            x = without_padding(self.frontend(x), lens)
        return self.ctc_lin(self.encoder(x, lens)).log_softmax(dim=-1)


class Seq2SeqNetwork(torch.nn.Module):
    """Front-end, SpeechBrain encoder-decoder Transformer, output layer.

    Arguments
    ---------
    transformer : speechbrain.lobes.models.transformer.TransformerASR
        With at least one decoder layer.
    seq_lin : torch.nn.Module
        Linear layer onto the tokens.
    frontend : torch.nn.Module, optional
        `frontend(x) -> x`, e.g. strided convolutions.
    pad_index : int
        Padding token of the decoder's input.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     TransformerASR,
    ... )
    >>> transformer = TransformerASR(5, 8, 8, 2, 1, 1, 16, causal=False)
    >>> network = Seq2SeqNetwork(transformer, torch.nn.Linear(8, 5))
    >>> bos = torch.ones(2, 3, dtype=torch.long)
    >>> network(torch.rand(2, 12, 8), torch.ones(2), bos).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, transformer, seq_lin, frontend=None, pad_index=0):
        super().__init__()
        if frontend is not None:
            self.frontend = frontend
        self.transformer = ignore_padding(transformer)
        self.seq_lin = seq_lin
        self.pad_index = pad_index

    def forward(self, x, lens, tokens_bos):
        """Score every next token.

        Arguments
        ---------
        x : torch.Tensor
            Features [batch, time, features].
        lens : torch.Tensor
            [batch], relative lengths in (0, 1].
        tokens_bos : torch.Tensor
            [batch, tokens], the transcript behind its beginning token.

        Returns
        -------
        torch.Tensor
            [batch, tokens, vocabulary], log-probabilities.
        """
        _, decoded = self.transformer(
            self._front(x, lens), tokens_bos, lens, pad_idx=self.pad_index
        )
        return self.seq_lin(decoded).log_softmax(dim=-1)

    def encode(self, x, lens):
        """Encode for a search.

        Arguments
        ---------
        x : torch.Tensor
            Features [batch, time, features].
        lens : torch.Tensor
            [batch], relative lengths in (0, 1].

        Returns
        -------
        torch.Tensor
            [batch, frames, d].
        """
        return self.transformer.encode(self._front(x, lens), lens)

    def decode(self, tokens, encoded, lens):
        """Score the token after each given prefix.

        Arguments
        ---------
        tokens : torch.Tensor
            [batch, tokens], prefixes of equal length.
        encoded : torch.Tensor
            From `encode`.
        lens : torch.Tensor
            [batch], relative lengths of `encoded`.

        Returns
        -------
        torch.Tensor
            [batch, vocabulary], log-probabilities.
        """
        absolute = absolute_lengths(lens, encoded.shape[1])
        # SpeechBrain makes the mask as wide as the longest utterance.
        encoded = encoded[:, : absolute.max()]
        decoded, _ = self.transformer.decode(tokens, encoded, absolute)
        return self.seq_lin(decoded[:, -1]).log_softmax(dim=-1)

    def _front(self, x, lens):
        x = without_padding(x, lens)
        if not hasattr(self, "frontend"):
            return x
        return without_padding(self.frontend(x), lens)


class WhisperNetwork(torch.nn.Module):
    """Whisper from `transformers`, behind the interface of `Seq2SeqNetwork`.

    Arguments
    ---------
    whisper : speechbrain.integrations.huggingface.whisper.Whisper
        Its `source` may be a local folder.

    Example
    -------
    >>> class Tiny(torch.nn.Module):  # in the place of SpeechBrain's Whisper
    ...     def forward(self, wavs, tokens):
    ...         return None, torch.zeros(*tokens.shape, 4), None
    >>> network = WhisperNetwork(Tiny())
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> network(torch.rand(1, 16000), torch.ones(1), tokens).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, whisper):
        super().__init__()
        self.whisper = whisper

    def forward(self, x, lens, tokens_bos):
        """Score every next token: see `Seq2SeqNetwork.forward`.

        `lens` is not used: Whisper pads or cuts everything to its window.
        """
        _, logits, _ = self.whisper(x, tokens_bos)
        return logits.log_softmax(dim=-1)

    def encode(self, x, lens):
        """Encode for a search: see `Seq2SeqNetwork.encode`."""
        return self.whisper.forward_encoder(self.whisper._get_mel(x))

    def decode(self, tokens, encoded, lens):
        """Score the token after each prefix: see `Seq2SeqNetwork.decode`."""
        logits, _, _ = self.whisper.forward_decoder(encoded, tokens)
        return logits[:, -1].log_softmax(dim=-1)
