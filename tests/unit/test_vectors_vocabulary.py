"""Grown vocabularies: rows follow their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.vectors import TaskVector, align_vocabulary
from speechbrain_taskarith.vectors.states.vocabulary import read_vocabulary

WORDS = [chr(ord("a") + i) for i in range(8)]


def model(tokens, seed):
    """Rows that can be told apart: a value for each token and model."""
    torch.manual_seed(seed)
    return {
        "emb.weight": torch.randn(len(tokens), 2),
        "out.bias": torch.randn(len(tokens)),
        "enc.weight": torch.randn(3, 3),
    }


def naive(states, vocabularies):
    """Token by token, with dictionaries."""
    union = []
    for tokens in vocabularies:
        union += [token for token in tokens if token not in union]
    tables = [
        {token: state["emb.weight"][row] for row, token in enumerate(tokens)}
        for state, tokens in zip(states, vocabularies)
    ]
    base = {}
    for token in union:
        base[token] = next(t[token] for t in tables if token in t)
    aligned = [base]
    for table in tables[1:]:
        aligned.append({t: table.get(t, base[t]) for t in union})
    return union, [
        torch.stack([rows[token] for token in union]) for rows in aligned
    ]


vocabulary = st.lists(
    st.sampled_from(WORDS), unique=True, min_size=1, max_size=8
)


@settings(max_examples=50, deadline=None)
@given(vocabularies=st.lists(vocabulary, min_size=1, max_size=4))
def test_rows_follow_their_tokens(vocabularies):
    states = [model(tokens, i) for i, tokens in enumerate(vocabularies)]
    aligned, tokens = align_vocabulary(
        states, vocabularies, ["emb.*", "out.bias"]
    )
    expected_tokens, expected = naive(states, vocabularies)
    assert tokens == expected_tokens
    for before, after, table in zip(states, aligned, expected):
        assert torch.equal(after["emb.weight"], table)
        assert after["out.bias"].shape == (len(tokens),)
        assert torch.equal(after["enc.weight"], before["enc.weight"])


def test_an_edit_copies_new_rows_whatever_its_scale():
    base = model(["a", "b"], 0)
    tuned = model(["b", "ß", "a"], 1)
    (base, tuned), tokens = align_vocabulary(
        [base, tuned], [["a", "b"], ["b", "ß", "a"]], ["emb.weight", "out.*"]
    )
    tau = TaskVector.between(base, tuned)
    for scale in (0.0, 0.3, 1.0):
        edited = tau.apply(base, scale)
        row = tokens.index("ß")
        assert torch.equal(edited["out.bias"][row], tuned["out.bias"][row])
    torch.testing.assert_close(
        tau.apply(base, 1.0)["emb.weight"], tuned["emb.weight"]
    )


def test_inputs_stay_as_they_are():
    base, tuned = model(["a"], 0), model(["b", "a"], 1)
    kept = [{k: v.clone() for k, v in s.items()} for s in (base, tuned)]
    align_vocabulary([base, tuned], [["a"], ["b", "a"]], ["emb.*", "out.*"])
    for state, copy in zip((base, tuned), kept):
        assert all(torch.equal(state[k], copy[k]) for k in state)


def test_tied_tables_stay_tied():
    def tied(rows):
        table = torch.randn(rows, 2)
        return {"emb.weight": table, "out.weight": table}

    (base, tuned), _ = align_vocabulary(
        [tied(1), tied(2)], [["a"], ["b", "a"]], ["emb.weight", "out.weight"]
    )
    for state in (base, tuned):
        assert state["emb.weight"] is state["out.weight"]


@pytest.mark.parametrize(
    "vocabularies, rows, error, match",
    [
        ([["a", "b"], ["a", "b", "b"]], "emb.*", ValueError, "more than once"),
        ([["a", "b"], ["a", "b", "c", "d"]], "emb.*", ValueError, "4 tokens"),
        ([["a", "b"], ["a", "b", "c"]], "enc.*", ValueError, "2 tokens"),
        ([["a", "b"], ["a", "b", "c"]], "embed.*", ValueError, "matches no"),
        ([["a", "b"]], "emb.*", ValueError, "one vocabulary for each"),
    ],
)
def test_mistakes_are_named(vocabularies, rows, error, match):
    states = [model(["a", "b"], 0), model(["a", "b", "c"], 1)]
    with pytest.raises(error, match=match):
        align_vocabulary(states, vocabularies, rows)


def test_reading_vocabularies(tmp_path):
    from speechbrain.dataio.encoder import CTCTextEncoder

    encoder = CTCTextEncoder()
    encoder.insert_blank()
    encoder.update_from_iterable(["it's a", 'quote "'])
    encoder.save(tmp_path / "encoder.txt")
    tokens = read_vocabulary(tmp_path / "encoder.txt")
    assert len(tokens) == len(encoder.lab2ind)
    for token, row in encoder.lab2ind.items():
        assert tokens[row] == token
    (tmp_path / "sp.vocab").write_text("<unk>\t0\n▁a\t-1.5\nb\t-2\n")
    assert read_vocabulary(tmp_path / "sp.vocab") == ["<unk>", "▁a", "b"]
    (tmp_path / "vocab.json").write_text('{"b": 1, "a": 0}')
    assert read_vocabulary(tmp_path / "vocab.json") == ["a", "b"]
    (tmp_path / "vocab.json").write_text('{"b": 2, "a": 0}')
    with pytest.raises(ValueError, match="vocab.json"):
        read_vocabulary(tmp_path / "vocab.json")


def test_an_encoder_without_labels_has_no_tokens(tmp_path):
    """Some recipes of SpeechBrain keep such a one; its extras are no tokens."""
    from speechbrain.dataio.encoder import CTCTextEncoder

    path = tmp_path / "label_encoder.txt"
    CTCTextEncoder().save(path)
    assert read_vocabulary(path) == []


@pytest.mark.parametrize(
    "labels", [["a", "b"], [3, 7, 5], ["a", 5, ("x", 1), None, -0.5, "5"]]
)
def test_labels_of_any_type_are_tokens(tmp_path, labels):
    from speechbrain.dataio.encoder import CategoricalEncoder

    encoder, path = CategoricalEncoder(), tmp_path / "encoder.txt"
    encoder.update_from_iterable(labels, sequence_input=False)
    encoder.save(path)
    assert read_vocabulary(path) == labels


@pytest.mark.parametrize(
    "text",
    ["'a' => 0\nb => 1\n", "'a' => 0\n'b'\n", "a\nb\n=====\n"],
    ids=["no literal", "no row", "no encoder"],
)
def test_a_line_that_is_no_token_is_refused(tmp_path, text):
    (tmp_path / "encoder.txt").write_text(text)
    with pytest.raises(ValueError, match=r"encoder.txt: cannot read the line"):
        read_vocabulary(tmp_path / "encoder.txt")
