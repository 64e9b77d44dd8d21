"""The small published functions, each against its rule written out, and how pictures are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from published_models import published_processor
from safecode_mllm import compat
from safecode_mllm.compat.noise import open_picture
from safecode_mllm.errors import ImageError

VOCAB = 902


def logits(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def test_noise_is_the_published_formula_and_uses_the_global_generator() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    torch.manual_seed(3)
    ours = compat.apply_gaussian_noise(picture, 0.1)
    torch.manual_seed(3)
    pixels = np.asarray(picture, np.float32) / 255
    wanted = np.clip(pixels + torch.randn(5, 7, 3).numpy() * np.float32(0.1), 0, 1)
    assert np.array_equal(np.asarray(ours), (wanted * 255).round().astype(np.uint8))
    assert ours.tobytes() != compat.apply_gaussian_noise(picture, 0.1).tobytes()


def test_pictures_are_read_as_published(tmp_path: Path) -> None:
    path = tmp_path / "transparent.png"
    Image.fromarray(np.full((4, 4, 4), (10, 20, 30, 0), np.uint8)).save(path)
    assert open_picture(path).getpixel((0, 0)) == (10, 20, 30)
    for wrong, message in ((tmp_path / "missing.png", "missing.png"), (tmp_path, "cannot be read")):
        with pytest.raises(ImageError, match=message):
            open_picture(wrong)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match="cannot be read"):
        open_picture(tmp_path / "text.png")


def test_phrases_are_ranked_by_the_sum_of_their_tokens() -> None:
    tokenizer = published_processor("llava").tokenizer
    phrases = ["cannot", "I am sorry", "", "Hello", "I am sorry"]
    probabilities = logits().softmax(-1)
    ids = {phrase: tokenizer.encode(phrase, add_special_tokens=False) for phrase in phrases}
    sums = {phrase: float(probabilities[found].double().sum()) for phrase, found in ids.items() if found}
    ranked = compat.rank_candidate_phrases_by_contrastive_prob(logits(), tokenizer, phrases, top_k=3)
    order = sorted((phrase for phrase in phrases if phrase), key=lambda phrase: -sums[phrase])
    assert [phrase for phrase, _ in ranked] == order[:3]
    assert [score for _, score in ranked] == pytest.approx([sums[phrase] for phrase in order[:3]])


@pytest.mark.parametrize(("verdict", "shift"), [("safe", -1.5), ("unsafe", 0.5), ("unsafe.", 0.5), ("n/a", 0.0)])
def test_modulation_moves_tokens_that_open_with_a_prefix(verdict: str, shift: float) -> None:
    tokenizer = published_processor("llava").tokenizer
    best = logits().topk(40).indices
    prefixes = [tokenizer.decode(best[3]).upper(), "so"]
    moved = compat.apply_gpt_guided_modulation(logits(), tokenizer, best, prefixes, verdict, 1.5, 0.5)
    wanted = logits()
    hit = 0
    for token in best.tolist():
        if any(tokenizer.decode(token).lower().startswith(prefix.lower()) for prefix in prefixes):
            wanted[token] += shift
            hit += 1
    assert hit
    assert torch.equal(moved, wanted)


@pytest.mark.parametrize(("verdict", "factor"), [("safe", 0.6), ("unsafe", 1.4), ("n/a", 1.0)])
def test_reweighting_touches_refusal_tokens_among_the_best(verdict: str, factor: float) -> None:
    order = logits().argsort(descending=True).tolist()
    refusing = [order[0], order[7], order[30]]
    ours = compat.reweight_and_renormalize_probs(logits(), None, refusing, verdict, beta=0.4, top_k=10)
    wanted = logits().softmax(-1)
    wanted[refusing[:2]] *= factor
    torch.testing.assert_close(ours, wanted / wanted.sum())


def test_sampling_stays_among_the_best_tokens() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    torch.manual_seed(0)
    assert {compat.adaptive_sample_from_probs(probabilities, 1.0, 0.0) for _ in range(50)} == {0}
    # The token that crosses 0.6 still counts.
    assert {compat.adaptive_sample_from_probs(probabilities, 1.0, 0.6) for _ in range(200)} == {0, 1}
    counts = torch.bincount(
        torch.tensor([compat.adaptive_sample_from_probs(probabilities, 0.5, 1.0) for _ in range(4000)]), minlength=4
    )
    wanted = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(counts / 4000, wanted, rtol=0, atol=0.03)
