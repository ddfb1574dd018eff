"""Parity with the ADM evaluator and torch-fidelity on stored vectors (tests/golden/metrics)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from flashar_pl.metrics.distribution import (
    f1_score,
    frechet_distance,
    frechet_distance_from_moments,
    inception_score,
    kernel_distance,
    precision_recall,
)

FOLDER = Path(__file__).parents[1] / "golden" / "metrics"
CASES = json.loads((FOLDER / "metrics.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "adm_evaluator.npz") as archive:
        return {name: archive[name] for name in archive.files}


def read(arrays: dict[str, np.ndarray], text: str) -> np.ndarray:
    """An input as the case names it: an array, optionally sliced, scaled or with one row replaced."""
    if text.startswith("float32("):
        name, rows, columns, factor = re.fullmatch(r"float32\(([\w/]+)\[:(\d+),:(\d+)\]\*(\d+)\)", text).groups()
        return (arrays[name][: int(rows), : int(columns)] * int(factor)).astype(np.float32)
    name, rest = re.fullmatch(r"([\w/]+)(.*)", text).groups()
    value = arrays[name]
    if rest == "[..., :7].reshape(N,-1)":
        return value[..., :7].reshape(len(value), -1)
    if rest == " / 64":
        return value.astype(np.float32) / 64
    if rest == "[fid/permuted/perm]":
        return value[arrays["fid/permuted/perm"]]
    if match := re.fullmatch(r"\[:(\d+)(?:,\s*:(\d+))?\](?: with row (\d+) = ([\d.]+))?", rest):
        rows, columns, row, number = match.groups()
        value = value[: int(rows), : int(columns) if columns else None].copy()
        if row:
            value[int(row)] = float(number)
        return value
    assert rest == "", f"unread input {text}"
    return value


@pytest.mark.parametrize("name", [name for name, case in CASES["fid"].items() if isinstance(case["adm"], float)])
def test_frechet_distance_equals_adm_and_torch_fidelity(arrays, name):
    """Guards the mean in the rows' own precision, unbiased covariances and singular products."""
    case = CASES["fid"][name]
    value = frechet_distance(*[read(arrays, text) for text in case["inputs"]])
    assert isinstance(value, float)
    assert value >= 0
    for other in (case["adm"], case.get("torch_fidelity")):
        if other is not None:
            assert value == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["identical", "singular_identical"])
def test_equal_sets_have_distance_exactly_zero(arrays, name):
    """The original gives -1.8e-6 for equal singular sets."""
    value = frechet_distance(*[read(arrays, text) for text in CASES["fid"][name]["inputs"]])
    assert str(value) == "0.0"


def test_one_column_where_the_original_fails(arrays):
    a, b = (read(arrays, text) for text in CASES["fid"]["one_dim"]["inputs"])
    assert frechet_distance(a, b) == pytest.approx(CASES["fid"]["one_dim"]["float64"], rel=1e-6)


def test_one_row_is_refused(arrays):
    with pytest.raises(ValueError, match=r"1 row.*at least 2"):
        frechet_distance(*[read(arrays, text) for text in CASES["fid"]["single_row"]["inputs"]])


def test_moments_form_against_stored_statistics(arrays):
    ref = arrays["main/ref"]
    spatial, samples_spatial = (
        read(arrays, f"main/{name}_spatial_map[..., :7].reshape(N,-1)") for name in ("ref", "samples")
    )
    samples, expected = arrays["main/samples"], CASES["precomputed"]
    mu, sigma = ref.astype(np.float64).mean(axis=0) + 0.01, 1.1 * np.cov(ref, rowvar=False)
    pool = frechet_distance_from_moments(samples.mean(axis=0), np.cov(samples, rowvar=False), mu, sigma)
    assert pool == pytest.approx(expected["fid"], rel=1e-5)
    mu, sigma = spatial.mean(axis=0) + 0.02, 0.9 * np.cov(spatial, rowvar=False)
    own = samples_spatial.mean(axis=0), np.cov(samples_spatial, rowvar=False)
    assert frechet_distance_from_moments(*own, mu, sigma) == pytest.approx(expected["sfid"], rel=1e-5)


def test_moments_form_diagonal_and_indefinite(arrays):
    diagonal = [np.diag(arrays[f"fid/diag/var{i}"]) for i in (1, 2)]
    means = [arrays[f"fid/diag/mu{i}"] for i in (1, 2)]
    value = frechet_distance_from_moments(means[0], diagonal[0], means[1], diagonal[1])
    assert value == pytest.approx(CASES["diag"], rel=1e-12)
    with pytest.raises(ValueError, match="not a covariance"):
        frechet_distance_from_moments(np.zeros(6), arrays["fid/indefinite/sigma1"], np.zeros(6), np.eye(6))


@pytest.mark.parametrize("name", CASES["inception_score"])
def test_inception_score_equals_adm(arrays, name):
    """Guards the shorter last part, which counts as much as the others."""
    case = CASES["inception_score"][name]
    for rows in (arrays["is/acts"] @ arrays["is/weight"], arrays["is/probs"]):
        value = inception_score(rows, split_size=case["split_size"])
        assert value == pytest.approx(case["official_from_acts"], rel=1e-5)
    if name == "split_size_default":
        assert inception_score(arrays["is/probs"]) == pytest.approx(case["official_from_acts"], rel=1e-5)


def test_inception_score_at_the_edges(arrays):
    """A zero probability made the original's whole score nan."""
    probs = arrays["is/zero_probs"].astype(np.float64)
    mean = probs.mean(axis=0)
    terms = [sum(p * np.log(p / q) for p, q in zip(row, mean) if p > 0) for row in probs]
    assert inception_score(probs) == pytest.approx(np.exp(np.mean(terms)), rel=1e-12)
    assert inception_score(np.full((40, 8), 1 / 8)) == pytest.approx(1.0, rel=1e-12)
    nearly = np.full((40, 8), 1e-7, np.float32)
    nearly[np.arange(40), np.arange(40) % 8] = 1 - 7e-7
    assert inception_score(nearly) == pytest.approx(CASES["nearly_onehot"], rel=1e-5)


@pytest.mark.parametrize("name", CASES["torch_fidelity"]["isc"])
def test_inception_score_equals_torch_fidelity(arrays, name):
    """The stored scores come from logits that were a float32 product on another machine."""
    splits, shuffle = re.fullmatch(r"splits(\d+)_shuffle(\w+)", name).groups()
    logits = arrays["is/acts"] @ arrays["is/weight"]
    score = inception_score(logits, int(splits), shuffle_seed=2020 if shuffle == "True" else None)
    expected = CASES["torch_fidelity"]["isc"][name]
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-6)


@pytest.mark.parametrize("name", CASES["precision_recall"])
def test_precision_recall_equals_adm_in_float32(arrays, name):
    """Exact shares: guards k counted without the row itself, < instead of <=, and rounding at ties and duplicates."""
    case = CASES["precision_recall"][name]
    reference, samples = (read(arrays, text) for text in case["inputs"])
    assert list(precision_recall(samples, reference)) == case["float32"]
    if name == "main":  # the original tries float16 first and loses one sample in 250 here
        assert case["float16"] != case["float32"]


@pytest.mark.parametrize("name", ["main", "duplicates", "integer_ties", "four_points", "pool2048", "ref_vs_ref"])
def test_precision_recall_equals_torch_fidelity(arrays, name):
    reference, samples = (read(arrays, text) for text in CASES["precision_recall"][name]["inputs"])
    expected = CASES["torch_fidelity"]["prc"][name]["value"]
    precision, recall = precision_recall(samples, reference)
    got = (precision, recall, f1_score(precision, recall))
    assert got == pytest.approx([expected["precision"], expected["recall"], expected["f_score"]], abs=1e-6)


@pytest.mark.parametrize("name", CASES["torch_fidelity"]["kid"])
def test_kernel_distance_equals_torch_fidelity(arrays, name):
    """Same subsets, so the means agree to the float32 rounding of the original."""
    sets, options = name.split("|")
    rename = {"kid_subsets": "subsets", "kid_subset_size": "subset_size", "rng_seed": "seed", "kid_kernel": "kernel"}
    rename |= {f"kid_kernel_poly_{key}": key.rstrip("0") for key in ("degree", "gamma", "coef0")}
    options = {rename[key]: value for key, value in json.loads(options).items()}
    reference = arrays["main/ref"]
    samples = arrays["main/samples"] if sets == "main_pool" else reference
    case = CASES["torch_fidelity"]["kid"][name]
    if "exception" in case:
        with pytest.raises(ValueError, match="subset_size is 1000"):
            kernel_distance(samples, reference, **options)
        return
    value = kernel_distance(samples, reference, **options)
    assert value == pytest.approx(case["value"]["kernel_inception_distance_mean"], rel=1e-5, abs=1e-6)
