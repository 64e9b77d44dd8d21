"""Calibration: metrics against brute force, a fit that finds what was put in, and a file that judges load."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bad_server import Handler, completion, number_in, serving, truth
from judging import picture
from safecode_mllm import cli
from safecode_mllm.errors import ConfigError
from safecode_mllm.judges import FixedJudge, Verdict, make_judge
from safecode_mllm.judges.calibration import Calibration, decide, logit, sigmoid
from safecode_mllm.judges.fitting import fit_calibration
from safecode_mllm.judges.metrics import expected_calibration_error, quality, reliability, roc_auc
from safecode_mllm.judges.protocol import failed

probability = st.floats(0, 1, allow_nan=False)


def verdict(p: float, threshold: float = 0.5) -> Verdict:
    return Verdict("unsafe" if p >= threshold else "safe", p, threshold)


def sample(n: int, scale: float, bias: float, seed: int = 0) -> tuple[list[Verdict], list[bool]]:
    """Verdicts whose truth follows sigmoid(scale * logit(p) + bias)."""
    rng = random.Random(seed)
    ps = [sigmoid(rng.gauss(0, 2)) for _ in range(n)]
    return [verdict(p) for p in ps], [rng.random() < sigmoid(scale * logit(p) + bias) for p in ps]


# ---- metrics ----


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(cases: list[tuple[float, bool]]) -> None:
    p, unsafe = np.array([c[0] for c in cases]), np.array([c[1] for c in cases])
    pairs = [(a > b) + 0.5 * (a == b) for a in p[unsafe] for b in p[~unsafe]]
    if pairs:
        assert roc_auc(p, unsafe) == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(roc_auc(p, unsafe))


def test_ece_by_hand() -> None:
    p, unsafe = np.array([0.15, 0.15, 0.95, 1.0]), np.array([False, True, True, True])
    assert expected_calibration_error(p, unsafe) == pytest.approx((2 * 0.35 + 2 * 0.025) / 4)
    table = reliability(p, unsafe)
    assert (table[1].n, table[1].unsafe, table[9].n) == (2, 0.5, 2)
    assert sum(b.n for b in table) == 4 and math.isnan(table[0].mean_p)
    assert math.isnan(expected_calibration_error(p[:0], unsafe[:0]))


def test_quality_counts_what_is_missing_as_wrong() -> None:
    verdicts = [verdict(0.9), verdict(0.1), Verdict("unsafe"), Verdict("unknown"), failed("j", "x"), verdict(0.8)]
    found = quality(verdicts, [True, False, True, False, True, False])
    assert found.n == 6 and found.accuracy == pytest.approx(0.5)
    assert found.precision == pytest.approx(2 / 3) and found.recall == pytest.approx(2 / 3)
    assert found.outcomes == {"safe": 1, "unsafe": 3, "unknown": 1, "error": 1}
    assert found.n_with_probability == 3 and found.auc == 1.0
    json.dumps(found.as_dict(), allow_nan=False)
    assert math.isnan(quality([Verdict("safe")], [False]).precision)


# ---- the fit ----


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (0.4, 1.5), (2.5, -1.0)])
def test_the_fit_finds_what_was_put_in(scale: float, bias: float) -> None:
    verdicts, unsafe = sample(6000, scale, bias)
    fit = fit_calibration(verdicts, unsafe, judge="j", version="v", threshold=0.4)
    assert fit.calibration.scale == pytest.approx(scale, rel=0.1)
    assert fit.calibration.bias == pytest.approx(bias, abs=0.15)
    assert (fit.calibration.judge, fit.calibration.version, fit.calibration.n) == ("j", "v", 6000)
    assert fit.calibration.threshold == 0.4
    assert fit.after.ece < 0.03
    assert fit.after.ece <= fit.before.ece + 0.01
    assert fit.after.auc == pytest.approx(fit.before.auc, abs=0.01)


def test_what_is_told_was_measured_on_other_requests() -> None:
    """Coin flips: a fit to the same few requests would look better than chance."""
    rng = random.Random(3)
    verdicts, unsafe = [verdict(rng.random()) for _ in range(40)], [n % 2 == 0 for n in range(40)]
    try:
        fit = fit_calibration(verdicts, unsafe, judge="j", version="v")
    except ConfigError:
        pytest.skip("these flips run against the labels")
    assert fit.after.auc < 0.65


def test_perfectly_separated_labels_have_a_finite_fit() -> None:
    verdicts = [verdict(p) for p in (0.0, 0.0, 0.1, 0.1, 0.2, 0.8, 0.9, 0.9, 1.0, 1.0)]
    fit = fit_calibration(verdicts, [v.label == "unsafe" for v in verdicts], judge="j", version=None)
    assert 0 < fit.calibration.scale < 100 and math.isfinite(fit.calibration.bias)
    assert fit.after.auc > 0.9


def test_equal_probabilities_and_a_shifted_judge() -> None:
    # Nine tenths of what this judge calls 0.6 or 0.7 are safe.
    unsafe = [True] * 3 + [False] * 47 + [True] * 7 + [False] * 43
    fit = fit_calibration([verdict(0.6)] * 50 + [verdict(0.7)] * 50, unsafe, judge="j", version=None)
    assert fit.calibration.apply(0.65) == pytest.approx(0.1, abs=0.05)
    assert fit.after.outcomes["unsafe"] == 0


@pytest.mark.parametrize(
    ("verdicts", "unsafe", "text"),
    [
        ([Verdict("safe")] * 20, [True, False] * 10, "gives no probabilities"),
        ([verdict(0.3)] * 20, [True] * 4 + [False] * 16, "at least 5 of each"),
        ([verdict(0.9), verdict(0.1)] * 10, [False, True] * 10, "no higher probabilities"),
    ],
)
def test_what_cannot_be_fitted_is_said(verdicts: list[Verdict], unsafe: list[bool], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fit_calibration(verdicts, unsafe, judge="j", version=None)


# ---- applying it ----


@given(p=probability, scale=st.floats(0.01, 50), bias=st.floats(-50, 50), threshold=st.floats(0.01, 0.99))
def test_label_and_probability_always_agree(p: float, scale: float, bias: float, threshold: float) -> None:
    said = "unsafe" if p >= 0.5 else "safe"
    label, q, t = decide(said, p, 0.5, Calibration(scale, bias, threshold))  # type: ignore[arg-type]
    assert q is not None and 0 <= q <= 1 and t == threshold
    assert (q >= t) == (label == "unsafe")


@given(p=probability)
def test_the_neutral_calibration_changes_nothing(p: float) -> None:
    assert Calibration().apply(p) == pytest.approx(p, abs=1e-6)


def test_words_stand_where_there_is_no_probability() -> None:
    assert decide("unsafe", None, 0.7, Calibration(1.0, -5.0)) == ("unsafe", None, 0.7)
    assert decide("unknown", 0.9, 0.5, None) == ("unknown", None, 0.5)
    assert decide("unsafe", 0.2, 0.5, None) == ("unsafe", None, 0.5), "a probability that contradicts the words"


# ---- the file ----


def test_a_file_comes_back(tmp_path: Path) -> None:
    written = Calibration(0.7, -0.3, 0.4, "self", "abc", 120)
    written.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == written


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"scale": 1}', '{"scale": 0, "bias": 0}', '{"scale": -1, "bias": 0}',
     '{"scale": 1, "bias": NaN}', '{"scale": true, "bias": 0}', '{"scale": "1", "bias": 0}',
     '{"scale": 1, "bias": 0, "threshold": 1}', '{"scale": 1, "bias": 0, "n": "x"}', '{"scale": 1, "bias": 0, "x": 1}',
     '{"scale": 1, "bias": 0, "judge": 3}'],
)  # fmt: skip
def test_a_file_that_holds_no_calibration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError):
        Calibration.load(tmp_path / "c.json")


def test_make_judge_loads_the_file(tmp_path: Path) -> None:
    Calibration(2.0, 0.0).save(tmp_path / "c.json")
    judge = make_judge("self", calibration=tmp_path / "c.json")
    assert judge is not None and judge.settings["calibration"] == [2.0, 0.0]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"none\.json"):
        make_judge("self", calibration=tmp_path / "none.json")
    with pytest.raises(ConfigError, match="always says the same"):
        make_judge("safe", calibration=tmp_path / "c.json")
    assert isinstance(make_judge("unsafe", p_unsafe=0.7), FixedJudge)


# ---- the command ----


def over_sure(handler: Handler, body: dict[str, Any], seen: int) -> None:
    """Right in five of six, and always as sure."""
    number = number_in(body)
    label = truth(number) if number % 6 != 5 else "unsafe"
    rival = "safe" if label == "unsafe" else "unsafe"
    tops = [{"token": label, "logprob": math.log(0.99)}, {"token": rival, "logprob": math.log(0.01)}]
    logprobs = {"content": [{"token": label, "top_logprobs": tops}]}
    handler.send(200, json.dumps(completion(label, logprobs=logprobs)).encode())


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    picture().save("p.png")
    rows = [{"image": "p.png", "prompt": f"How do I do number {n}?", "label": truth(n), "id": n} for n in range(60)]
    Path("labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_calibrate_writes_a_file_that_a_judge_loads(
    labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["judge", "calibrate", "--data", "labelled.jsonl", "--judge", "openai:m", "--cache", "c.sqlite"]
    with serving(over_sure) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert cli.main([*command, "--plot", "out/r.png", "--save", "out/c.json"]) == 0
        out = capsys.readouterr().out
        assert "60 labelled requests: 30 safe, 30 unsafe, 0 unknown, 0 error" in out
        assert "ROC-AUC" in out and "0.9 - 1.0" in out and "out/c.json" in out
        assert Image.open("out/r.png").size[0] > 100
        assert cli.main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["after"]["ece"] < report["before"]["ece"]
        assert len(server.calls) == 60, "the cache answers the second time"
        judged = ["judge", "--judge", "openai:m", "--image", "p.png", "--prompt", "How do I do number 0?"]
        assert cli.main([*judged, "--calibration", "out/c.json", "--json"]) == 0
        verdict = json.loads(capsys.readouterr().out)
    assert 0.5 < verdict["p_unsafe"] < 0.95, "less sure than 0.99"
    fitted = Calibration.load("out/c.json")
    assert fitted.judge == "openai:m" and fitted.n == 60


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "none.jsonl", "--judge", "unsafe"], "none.jsonl"),
        (["--data", "unlabelled.jsonl", "--judge", "unsafe"], "label=None"),
        (["--data", "labelled.jsonl", "--judge", "unsafe"], "gives no probabilities"),
        (["--data", "labelled.jsonl", "--judge", "unsafe", "--save", "."], "is a folder"),
        (["--data", "labelled.jsonl", "--judge", "unsafe", "--calibration", "c"], "leave it out"),
        (["--data", "labelled.jsonl"], "needs --model"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    options: list[str], text: str, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled / "unlabelled.jsonl").write_text('{"image": "p.png", "prompt": "x"}')
    assert cli.main(["judge", "calibrate", *options]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1
