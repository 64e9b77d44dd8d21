"""The one table of sizes: how a batch is cut into programs, and how much each of them holds in registers.

Chosen from compiled register counts and by reasoning about memory traffic. NOT YET MEASURED ON A GPU: see
docs/gpu-status.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ArgumentError

# Slots per row for what is known of its slices; a longer vocabulary gets longer slices, never more of them.
MAX_SLICES = 64
# Positions are int32, and a program looks a block beyond the end.
MAX_VOCAB_SIZE = 2**31 - 2**16


@dataclass(frozen=True)
class Sizes:
    """Sizes that the kernels are compiled for, in tokens; all are powers of two.

    Attributes:
        block: what a program reads of a row at a time.
        memory_block: what it reads at a time where it does more with each token.
        tile: slots in which the candidates of all slices are looked through at a time.
        log_room: log2 of the candidates that a row may have in registers; a row with more goes through memory.
        max_split_rows: batches of more rows than this, about the SMs of a GPU, have one program per row, others one per
            slice.
    """

    block: int = 4096
    memory_block: int = 2048
    tile: int = 2048
    log_room: int = 9
    max_split_rows: int = 128

    @property
    def room(self) -> int:
        """Candidates that a row may have in registers."""
        return 2**self.log_room


@dataclass(frozen=True)
class Split:
    """How each row of a batch is cut.

    Attributes:
        slices: programs per row, S.
        slice_size: tokens per slice, a multiple of the block; the last may be shorter.
        padded_size: room per row in the scratch tensors, a multiple of the block.
        column_bits: log2 of the slots that each slice has in a tile.
    """

    slices: int
    slice_size: int
    padded_size: int
    column_bits: int


SIZES = Sizes()

# Warps of each kernel.
WARPS = {
    "scan_slices": 8,
    "finish_rows": 8,
    "decode_rows": 8,
    "rest_rows": 8,
    "race_slices": 8,
    "merge_slices": 2,
    "max_slices": 8,
    "gather_slices": 8,
    "bound_rows": 8,
    "score_slices": 8,
    "keep_slices": 8,
}
# Registers that a thread may have, where the assembler's own choice is worse: a scan needs two programs per SM, so that
# one reads while the other thinks; the others it would let spill to make room for a second, which few rows have.
MAX_REGISTERS = {"scan_slices": 128, "finish_rows": 255, "rest_rows": 255, "race_slices": 255}


def options_of(kernel_name: str) -> dict[str, int | bool]:
    """Return how a kernel is compiled. No a * b + c becomes one instruction: it would be rounded once."""
    options: dict[str, int | bool] = {"num_warps": WARPS[kernel_name], "enable_fp_fusion": False}
    if kernel_name in MAX_REGISTERS:
        options["maxnreg"] = MAX_REGISTERS[kernel_name]
    return options


def split_rows(batch: int, vocab_size: int, sizes: Sizes) -> Split:
    """Return how the rows of logits [B, V] are cut.

    Raises:
        ArgumentError: the vocabulary is too large for the int32 positions of the kernels.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        raise ArgumentError(f"vocab_size={vocab_size}; legal for the back end triton: at most {MAX_VOCAB_SIZE}")
    blocks = -(-vocab_size // sizes.block)
    per_slice = blocks if batch > sizes.max_split_rows else -(-blocks // MAX_SLICES)
    slices = -(-blocks // per_slice)
    columns = sizes.tile >> (slices - 1).bit_length()
    return Split(slices, per_slice * sizes.block, blocks * sizes.block, columns.bit_length() - 1)


# Arguments whose value makes no variant of a kernel: 1, or a multiple of 16, would else be compiled in.
NOT_SPECIALIZED = [
    "batch",
    "has_noised",
    "words_per_row",
    "column_bits",
    "slices",
    "some_uncut",
    "step_of_all",
]
