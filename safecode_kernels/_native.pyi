"""The compiled module (csrc/bindings.cpp): addresses; strides in elements; dtypes 0 float32, 1 bfloat16, 2 float16."""

class Step:
    def __init__(
        self,
        dtype: int,
        rows: int,
        vocab_size: int,
        packed: int,
        /,
    ) -> None: ...
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
        threads: int,
        /,
    ) -> bool: ...
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
        threads: int,
        /,
    ) -> bool: ...

def decode_once(
    dtype: int,
    rows: int,
    vocab_size: int,
    packed: int,
    words: int,
    n_masks: int,
    seeds: int,
    streams: int,
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
    threads: int,
    /,
) -> bool: ...
def draw(
    dtype: int,
    rows: int,
    vocab_size: int,
    scores: int,
    stride: int,
    seeds: int,
    streams: int,
    step_of_all: int,
    step_of_row: int,
    token: int,
    logprob: int,
    n_kept: int,
    status: int,
    threads: int,
    /,
) -> None: ...
def loops() -> str: ...
def use_loops(name: str, /) -> bool: ...
def read_seconds(data: int, n: int, repetitions: int, /) -> float: ...
