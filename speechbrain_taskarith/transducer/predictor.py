"""Predictors: the networks that read the labels so far.

Searches call `predictor(tokens[B, U], state=None) -> (out[B, U, P], state)`. A
state is None, a tensor or nested tuples of them, with the batch in dimension
1, as in torch's recurrent layers.
"""

import inspect

import torch
from torch.nn.functional import pad

from speechbrain_taskarith.utils.lengths import padding_mask


class LSTMPredictor(torch.nn.Module):
    """Embedding and LSTM layers; the first input is a blank.

    Arguments
    ---------
    vocab_size : int
        Number of labels and blank.
    embedding_dim, hidden_dim : int
        Width of the embedding; of the LSTM and the output.
    num_layers : int
        Number of LSTM layers.
    dropout : float
        After the embedding, between layers and after the last one.
    blank_index : int
        Index of the blank, which stands for the beginning.

    Example
    -------
    >>> predictor = LSTMPredictor(10, embedding_dim=4, hidden_dim=6)
    >>> out, state = predictor(torch.tensor([[0, 3, 1]]))
    >>> out.shape
    torch.Size([1, 3, 6])
    >>> more, _ = predictor(torch.tensor([[5]]), state)
    >>> more.shape
    torch.Size([1, 1, 6])
    """

    def __init__(
        self,
        vocab_size,
        embedding_dim=512,
        hidden_dim=512,
        num_layers=3,
        dropout=0.0,
        blank_index=0,
    ):
        super().__init__()
        self.blank_index = blank_index
        self.embedding = torch.nn.Embedding(vocab_size, embedding_dim)
        self.dropout = torch.nn.Dropout(dropout)
        self.lstm = torch.nn.LSTM(
            embedding_dim,
            hidden_dim,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )

    def forward(self, tokens, state=None):
        """Read labels.

        Arguments
        ---------
        tokens : torch.Tensor
            [B, U], label indices; the blank at the beginning.
        state : tuple of torch.Tensor or None
            From the previous call; None at the beginning.

        Returns
        -------
        out : torch.Tensor
            [B, U, hidden_dim].
        state : tuple of torch.Tensor
            Two of [num_layers, B, hidden_dim].
        """
        out, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.dropout(out), state


class SpeechBrainPredictor(torch.nn.Module):
    """The predictor's layers of a SpeechBrain recipe, in a row.

    Arguments
    ---------
    layers : sequence of torch.nn.Module
        E.g. `[emb, dec, proj_dec]`. A layer whose `forward` takes `hx`
        is recurrent and returns output and state.
    blank_index : int
        Index of the blank, which stands for the beginning.

    Example
    -------
    >>> from speechbrain.nnet.embedding import Embedding
    >>> from speechbrain.nnet.RNN import GRU
    >>> emb = Embedding(10, 9, consider_as_one_hot=True, blank_id=0)
    >>> dec = GRU(hidden_size=6, input_size=9)
    >>> predictor = SpeechBrainPredictor([emb, dec], blank_index=0)
    >>> out, state = predictor(torch.tensor([[0, 3, 1]]))
    >>> out.shape
    torch.Size([1, 3, 6])
    """

    def __init__(self, layers, blank_index=0):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.blank_index = blank_index

    def forward(self, tokens, state=None):
        """See `LSTMPredictor.forward`."""
        x, states = tokens, []
        for layer in self.layers:
            if "hx" in inspect.signature(layer.forward).parameters:
                before = state[len(states)] if state is not None else None
                x, after = layer(x, hx=before)
                states.append(after)
            else:
                x = layer(x)
        return x, tuple(states)


def predictor_input(targets, labels, blank_index):
    """Put a blank in front of targets [B, U]; padding becomes blanks, too."""
    padding = padding_mask(labels.to(targets.device), targets.shape[1])
    targets = targets.long().masked_fill(padding, blank_index)
    return pad(targets, (1, 0), value=blank_index)


def select_state(state, rows):
    """Select batch rows of a predictor's state."""
    if isinstance(state, torch.Tensor):
        return state.index_select(1, rows)
    if state is None:
        return None
    return tuple(select_state(part, rows) for part in state)


def join_states(states):
    """Concatenate states of the same form along the batch."""
    first = states[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(states, dim=1)
    if first is None:
        return None
    return tuple(join_states(list(parts)) for parts in zip(*states))
