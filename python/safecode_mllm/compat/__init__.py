"""Drop-in for the published code of SafeCoDe, and VCD under its own names.

The functions have the published names and signatures and give the same token ids from the same torch seed, with one
vision call and one KV cache; `install()` puts them into an installed copy of the published package. docs/compat.md
lists every difference.
"""

from __future__ import annotations

from safecode_mllm.extras import optional_imports

with optional_imports():
    from safecode_mllm.compat.decode import (
        contrastive_decode_multistep_no_verdict,
        contrastive_decode_multistep_with_modulation,
    )
    from safecode_mllm.compat.distributions import (
        adaptive_sample_from_probs,
        apply_gpt_guided_modulation,
        rank_candidate_phrases_by_contrastive_prob,
        reweight_and_renormalize_probs,
    )
    from safecode_mllm.compat.installing import install, uninstall
    from safecode_mllm.compat.judging import (
        AVAILABLE_JUDGES,
        get_judge,
        prepare_caption_and_verdict,
        prepare_caption_and_verdict_qwen,
        set_judge,
    )
    from safecode_mllm.compat.loading import load_model
    from safecode_mllm.compat.noise import apply_gaussian_noise
    from safecode_mllm.compat.visual_contrast import add_diffusion_noise, vcd, vcd_generate

__all__ = [
    "AVAILABLE_JUDGES",
    "adaptive_sample_from_probs",
    "add_diffusion_noise",
    "apply_gaussian_noise",
    "apply_gpt_guided_modulation",
    "contrastive_decode_multistep_no_verdict",
    "contrastive_decode_multistep_with_modulation",
    "get_judge",
    "install",
    "load_model",
    "prepare_caption_and_verdict",
    "prepare_caption_and_verdict_qwen",
    "rank_candidate_phrases_by_contrastive_prob",
    "reweight_and_renormalize_probs",
    "set_judge",
    "uninstall",
    "vcd",
    "vcd_generate",
]
