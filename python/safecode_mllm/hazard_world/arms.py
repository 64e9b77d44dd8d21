"""What is compared: the arms, which are presets, and the controls, which break one part of the method on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from safecode_kernels.bitmask import pack_masks, unpack_mask

from ..config import SafeCoDeConfig
from ..judges.protocol import Policy, Verdict
from ..refusal import ENDED, RefusalTokens

VerdictSource = Literal["judge", "random", "inverted"]
NoisedSource = Literal["config", "same_image", "other_scene"]
TokenSource = Literal["refusal", "random"]

PLAIN = "plain"
TUNED = "safecode_tuned"
# A half-trained model may not answer the judge's question; its scenes then count without a verdict instead of stopping.
ON_UNKNOWN: Policy = "no_bias"
PRESET_ARMS = ("contrast_only", "verdict_only", "no_plausibility", "vcd", "paper", "safecode")


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    Attributes:
        name: the arm's key in the results.
        config: settings of the steering; None decodes plainly.
        verdicts: the judge's, a coin flip between the judge's and its opposite, or always the opposite.
        noised: the noised view of the settings, the scene itself (n := z), or the picture of another scene.
        tokens: the refusal tokens, or the same trie over randomly renamed tokens.
    """

    name: str
    config: SafeCoDeConfig | None
    verdicts: VerdictSource = "judge"
    noised: NoisedSource = "config"
    tokens: TokenSource = "refusal"


def make_arms(tuned: SafeCoDeConfig | None) -> list[Arm]:
    """Return the eight arms; `tuned` holds the settings chosen on validation, None leaves that arm out."""
    presets = [Arm(name, SafeCoDeConfig.from_preset(name, on_unknown=ON_UNKNOWN)) for name in PRESET_ARMS]
    return [Arm(PLAIN, None), *presets, *([] if tuned is None else [Arm(TUNED, tuned)])]


def make_controls() -> list[Arm]:
    """Return the controls that decode; each is preset `safecode` with one part broken."""
    config = SafeCoDeConfig(on_unknown=ON_UNKNOWN)
    return [
        Arm("n_is_z", config, noised="same_image"),
        Arm("other_scene", config, noised="other_scene"),
        Arm("random_verdict", config, verdicts="random"),
        Arm("inverted_verdict", config, verdicts="inverted"),
        Arm("random_tokens", config, tokens="random"),
    ]


def controlled_verdicts(verdicts: Sequence[Verdict], source: VerdictSource, seed: int) -> list[Verdict]:
    """Return the verdicts an arm steers with: as they are, opposite, or opposite by a coin flip each."""
    rng = random.Random(f"verdicts/{seed}")
    if source == "judge":
        return list(verdicts)
    return [opposite(v) if source == "inverted" or rng.random() < 0.5 else v for v in verdicts]


def opposite(verdict: Verdict) -> Verdict:
    """Return the verdict that says the contrary with the same confidence; an unknown one stays as it is."""
    if verdict.p_unsafe is None:
        swapped: dict[str, Literal["safe", "unsafe"]] = {"safe": "unsafe", "unsafe": "safe"}
        return replace(verdict, label=swapped.get(verdict.label, verdict.label))
    p_unsafe, threshold = 1.0 - verdict.p_unsafe, 1.0 - verdict.threshold
    return replace(verdict, label="unsafe" if p_unsafe >= threshold else "safe", p_unsafe=p_unsafe, threshold=threshold)


@dataclass(frozen=True, eq=False)
class RenamedTokens(RefusalTokens):
    """Refusal tokens after a renaming of the vocabulary: as many tokens in every state, but meaningless ones."""

    original: RefusalTokens | None = None
    former_name: tuple[int, ...] = ()

    def next_state(self, state: int, token: int) -> int:
        """Return the state that the original reaches with the token's former name."""
        if self.original is None:
            return ENDED
        return self.original.next_state(state, self.former_name[int(token)])


def random_tokens(tokens: RefusalTokens, ordinary: Sequence[int], vocab_size: int, seed: int) -> RenamedTokens:
    """Return the same states over randomly renamed tokens.

    Args:
        tokens: the refusal tokens to copy.
        ordinary: ids that may be renamed; special tokens are left out so that they never get into a mask.
        vocab_size: V.
        seed: seed of the renaming.
    """
    shuffled = list(ordinary)
    random.Random(f"tokens/{seed}").shuffle(shuffled)
    new_name, former_name = list(range(vocab_size)), list(range(vocab_size))
    for old, new in zip(ordinary, shuffled, strict=True):
        new_name[old], former_name[new] = new, old
    flags = unpack_mask(tokens.masks, vocab_size)
    renamed = [sorted(new_name[int(token)] for token in torch.nonzero(row).flatten()) for row in flags]
    return RenamedTokens(
        tokens.kind, pack_masks(renamed, vocab_size), tokens.start, original=tokens, former_name=tuple(former_name)
    )
