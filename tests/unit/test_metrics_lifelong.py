"""Lifelong measures against formulas written out, files, CL-MASR's logs."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.metrics import LifelongMatrix, wer, write_cl_masr_log

NAMES = ["us", "de", "gr", "fr", "it", "es"]


def filled(values):
    """Matrix of the lower triangle of a square array."""
    matrix = LifelongMatrix(NAMES[: len(values)])
    for k, after in enumerate(matrix.domains):
        for j, on in enumerate(matrix.domains[: k + 1]):
            matrix.record(after, on, values[k][j])
    return matrix


def random_values(n, seed):
    return np.random.default_rng(seed).uniform(1, 60, (n, n))


def test_measures_are_those_that_are_defined():
    one, two = filled(random_values(1, 0)), filled(random_values(3, 1))
    fine_tuning, perfect = filled(random_values(3, 2)), filled(np.zeros((3, 3)))
    assert one.measures() == {"average_wer": one.average_wer()}
    assert two.measures(perfect).keys() == {"average_wer", "bwt"}
    assert two.measures(fine_tuning) == {
        "average_wer": two.average_wer(),
        "bwt": two.bwt(),
        "werr": two.werr(fine_tuning),
    }
    # Joint training learns no domain after another.
    joint = LifelongMatrix(two.domains)
    for domain in two.domains:
        joint.record(two.domains[-1], domain, two[two.domains[-1], domain])
    assert joint.measures().keys() == {"average_wer"}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_measures_follow_their_definitions(n, seed):
    R = random_values(n, seed)
    base = random_values(n, seed + 1)
    refs = np.random.default_rng(seed + 2).uniform(1, 60, n)
    matrix, baseline = filled(R), filled(base)
    by_name = dict(zip(matrix.domains, refs))
    average, bwt, fwt, im, werr = [], [], [], [], []
    for k in range(n):
        average.append(sum(R[k][j] for j in range(k + 1)) / (k + 1))
        other = sum(base[k][j] for j in range(k + 1)) / (k + 1)
        werr.append(100 * (other - average[-1]) / other)
        fwt.append(refs[k] - R[k][k])
        im.append(R[k][k] - refs[k])
        if k:
            bwt.append(sum(R[j][j] - R[k][j] for j in range(k)) / k)
    for k, name in enumerate(matrix.domains):
        assert matrix.average_wer(at=name) == pytest.approx(average[k])
        assert matrix.werr(baseline, at=name) == pytest.approx(werr[k])
        assert matrix.fwt(by_name, at=name) == pytest.approx(fwt[k])
        assert matrix.im(by_name, at=name) == pytest.approx(im[k])
        if k:
            assert matrix.bwt(at=name) == pytest.approx(bwt[k - 1])
    assert matrix.average_wer() == matrix.average_wer(at=NAMES[n - 1])
    assert matrix.bwt() == matrix.bwt(at=NAMES[n - 1])
    assert matrix.average_wer("mean") == pytest.approx(np.mean(average))
    assert matrix.bwt("mean") == pytest.approx(np.mean(bwt))
    assert matrix.fwt(by_name, "mean") == pytest.approx(np.mean(fwt[1:]))
    assert matrix.im(by_name, "mean") == pytest.approx(np.mean(im[1:]))
    assert matrix.werr(baseline, "mean") == pytest.approx(np.mean(werr[1:]))


def test_signs_mean_what_the_words_say():
    forgets = filled([[10, 0], [30, 20]])
    assert forgets.bwt() == -20.0
    improves = filled([[10, 0], [5, 20]])
    assert improves.bwt() == 5.0
    # Average WER 12.5 against 25: half the errors are gone.
    assert improves.werr(forgets) == 50.0
    assert improves.werr(25.0) == 50.0
    assert forgets.werr(forgets) == 0.0
    assert forgets.fwt(24.0) == 4.0
    assert forgets.im(24.0) == -4.0


def test_domains_not_learned_yet_are_kept_but_not_counted():
    matrix = filled([[10, 0], [30, 20]])
    before = matrix.average_wer("mean"), matrix.bwt()
    matrix.record(after="us", on="de", wer=90.0)
    assert matrix["us", "de"] == 90.0
    assert (matrix.average_wer("mean"), matrix.bwt()) == before


def test_takes_reports_and_the_newest_value():
    matrix = LifelongMatrix(["us"])
    matrix.record("us", "us", wer(["a b"], ["a c"]))
    assert matrix["us", "us"] == 50.0
    matrix.record("us", "us", np.float32(25))
    assert matrix.average_wer() == 25.0
    two = filled([[10, 0], [30, 20]])
    report = wer(["a b"], ["a c"])
    assert two.im({"de": report}) == two.im(report) == -30.0
    assert two.fwt({"de": report}) == two.fwt(report) == 30.0
    assert two.werr(report) == 50.0


def test_mean_over_seeds():
    first, second = random_values(3, 0), random_values(3, 1)
    mean = LifelongMatrix.mean([filled(first), filled(second)])
    expected = np.tril((first + second) / 2)
    assert np.nan_to_num(mean.rows()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="other domains or other cells"):
        LifelongMatrix.mean([filled(first), filled(random_values(2, 0))])
    with pytest.raises(ValueError, match="no matrices"):
        LifelongMatrix.mean([])


def test_frame():
    frame = filled([[10, 0], [30, 20]]).to_frame()
    assert frame.loc["de", "us"] == 30
    assert math.isnan(frame.loc["us", "de"])
    assert frame.index.name == "after"


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_saved_equals_loaded(tmp_path, suffix):
    matrix = filled(random_values(4, 3))
    matrix.record("us", "fr", 1 / 3)
    path = matrix.save(tmp_path / f"inside/wer{suffix}")
    assert LifelongMatrix.load(path) == matrix
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    odd = LifelongMatrix(['a, "b"', "ünder", "x y"])
    assert LifelongMatrix.load(odd.save(path)) == odd


@pytest.mark.parametrize(
    "name, text",
    [
        ("w.csv", ""),
        ("w.csv", "x,us\nus,1\n"),
        ("w.csv", "after,us,de\nus,1,\n"),
        ("w.csv", "after,us\nus,nan\n"),
        ("w.csv", "after,us\nus,1,2\n"),
        ("w.csv", "after,us\nus,abc\n"),
        ("w.json", "{"),
        ("w.json", "[]"),
        ("w.json", '{"domains": ["us"]}'),
        ("w.json", '{"domains": ["us"], "cells": [{"after": "us"}]}'),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        LifelongMatrix.load(path)


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="use .csv or .json"):
        LifelongMatrix(["us"]).save(tmp_path / "w.xls")
    with pytest.raises(ValueError, match="use .csv or .json"):
        LifelongMatrix.load(tmp_path / "w.xls")


def test_missing_cell_is_named():
    matrix = LifelongMatrix(["us", "de"])
    matrix.record("us", "us", 10)
    with pytest.raises(KeyError, match="no WER on 'us' after 'de'"):
        matrix.average_wer()
    assert matrix.average_wer(at="us") == 10
    assert ("us", "us") in matrix and ("de", "us") not in matrix


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_impossible_wer_is_refused(value):
    with pytest.raises(ValueError, match="WER on 'us' after 'us'"):
        LifelongMatrix(["us"]).record("us", "us", value)


@pytest.mark.parametrize(
    "domains", [[], ["us", "us"], ["mean"], ["us", ""], [1, 2]]
)
def test_bad_domains_are_refused(domains):
    with pytest.raises(ValueError):
        LifelongMatrix(domains)


def test_questions_without_an_answer():
    matrix = filled([[10, 0], [30, 20]])
    one = filled([[10]])
    with pytest.raises(TypeError, match="single string"):
        LifelongMatrix("us")
    with pytest.raises(ValueError, match="unknown domain 'it'"):
        matrix.average_wer(at="it")
    with pytest.raises(ValueError, match="unknown domain 'it'"):
        matrix.record("us", "it", 3)
    with pytest.raises(ValueError, match="not defined"):
        matrix.bwt(at="us")
    with pytest.raises(ValueError, match="not defined"):
        one.bwt()
    with pytest.raises(ValueError, match="two domains"):
        one.bwt("mean")
    with pytest.raises(KeyError, match="no reference WER for 'de'"):
        matrix.fwt({"us": 3.0})
    with pytest.raises(TypeError, match="reference per domain"):
        matrix.im(3.0, at="mean")
    with pytest.raises(TypeError, match="LifelongMatrix"):
        matrix.werr(3.0, at="mean")
    with pytest.raises(ValueError, match="like with like"):
        matrix.werr(one)
    with pytest.raises(ValueError, match="above 0"):
        matrix.werr(0.0)


def read_as_cl_masr_does(path):
    """Read a log as CL-MASR's analysis does, written anew.

    The file name gives method, base and new languages; every line is
    `name: value` pairs between commas, with ` - ` in front of each group.
    """
    name = re.fullmatch(r"(.*?)(?:_.*)?_base=(.*)_new=(.*)\.txt", path.name)
    method, base, new = name.groups()
    wers = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pairs = re.split(r", | - ", line.strip())
        # Exactly one colon a pair, or the script stops.
        values = dict(pair.split(": ") for pair in pairs)
        wers.append(float(values["test WER"]))
    return method, base.split(","), new.split(","), np.array(wers)


def test_log_is_what_cl_masr_reads(tmp_path):
    values = random_values(4, 7)
    path = write_cl_masr_log(filled(values), tmp_path, "task_arithmetic")
    method, base, new, wers = read_as_cl_masr_does(path)
    assert (method, base, new) == ("task-arithmetic", ["us"], NAMES[1:4])
    expected = [values[k][j] for k in range(4) for j in range(k + 1)]
    assert wers == pytest.approx(expected, abs=1e-6)


def test_logs_of_several_seeds_lie_side_by_side(tmp_path):
    matrix = filled(random_values(2, 0))
    paths = {write_cl_masr_log(matrix, tmp_path, "ft", seed=s) for s in (0, 1)}
    assert len(paths) == 2
    for path in paths:
        assert read_as_cl_masr_does(path)[0] == "ft"


@pytest.mark.parametrize("name", ["a,b", "a: b", "a/b", "a - b", " a", "_new="])
def test_names_that_would_break_the_log_are_refused(tmp_path, name):
    matrix = LifelongMatrix(["us", name])
    for cell in [("us", "us"), (name, "us"), (name, name)]:
        matrix.record(*cell, 3.0)
    with pytest.raises(ValueError, match="cannot stand in a CL-MASR log"):
        write_cl_masr_log(matrix, tmp_path, "ft")
    assert not list(tmp_path.iterdir())


def test_log_needs_a_whole_matrix(tmp_path):
    matrix = LifelongMatrix(["us", "de"])
    with pytest.raises(KeyError, match="no WER"):
        write_cl_masr_log(matrix, tmp_path, "ft")
    with pytest.raises(ValueError, match="two domains"):
        write_cl_masr_log(filled([[1]]), tmp_path, "ft")
    assert not list(tmp_path.iterdir())


def test_json_is_plain(tmp_path):
    path = filled([[10, 0], [30, 20]]).save(tmp_path / "w.json")
    content = json.loads(path.read_text())
    assert content["domains"] == ["us", "de"]
    assert {"after": "de", "on": "us", "wer": 30.0} in content["cells"]
