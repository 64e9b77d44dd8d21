"""SafeCoDe's decode step as kernels: image contrast, refusal bias and plausibility from two rows of logits.

Knows logits and nothing else; needs torch only.
"""

from . import torch_ops as torch_ops  # defines torch.ops.safecode_kernels
from .bitmask import pack_mask, pack_masks, unpack_mask
from .contract import Status, StepResult, StepScores
from .errors import ArgumentError, ArgumentTypeError, BackendUnavailable, LaunchError
from .ops import PreparedStep, decode_scores, decode_step, draw, plausible, prepare_step
from .params import StepParams, pack_params
from .registry import Backend, Explanation, explain, list_backends, resolve

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Backend",
    "BackendUnavailable",
    "Explanation",
    "LaunchError",
    "PreparedStep",
    "Status",
    "StepParams",
    "StepResult",
    "StepScores",
    "decode_scores",
    "decode_step",
    "draw",
    "explain",
    "list_backends",
    "pack_mask",
    "pack_masks",
    "pack_params",
    "plausible",
    "prepare_step",
    "resolve",
    "unpack_mask",
]
