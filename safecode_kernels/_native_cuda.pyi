"""The compiled module (csrc/cuda/bindings.cpp): device addresses; strides in elements; dtypes 0 float32, 1 bfloat16, 2
float16. decode and scores return CUDA's error code, 0 for a launch."""

class Step:
    def __init__(self, device: int, dtype: int, rows: int, vocab_size: int, /) -> None: ...
    def plan(self) -> tuple[bool, int]: ...
    def use_plan(self, clusters: bool, blocks_per_row: int, /) -> None: ...
    def scratch_bytes(self) -> tuple[int, int]: ...
    def set_scratch(self, base: int, /) -> None: ...
    def set_parameters(self, packed: int, /) -> None: ...
    def set_masks(self, words: int, n_masks: int, /) -> None: ...
    def set_key(self, seeds: int, streams: int, /) -> None: ...
    def decode(
        self,
        clean: int,
        clean_stride: int,
        noised: int,
        noised_stride: int,
        mask_ids: int,
        step_of_all: int,
        step_of_row: int,
        token: int,
        logprob: int,
        n_kept: int,
        status: int,
        stream: int,
        /,
    ) -> int: ...
    def scores(
        self,
        clean: int,
        clean_stride: int,
        noised: int,
        noised_stride: int,
        mask_ids: int,
        scores: int,
        biased_clean: int,
        keep: int,
        status: int,
        stream: int,
        /,
    ) -> int: ...

def architectures() -> str: ...
def why_unusable(device: int, /) -> str: ...
def error_text(code: int, /) -> str: ...
