"""Products of matrices: which number format this processor is fastest with, and which threads they take."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Products tried in each number format, and how much faster bfloat16 must be to be worth its rounding.
_NUM_TRIALS = 8
_MIN_GAIN = 1.3


@cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than of float32, tried for some milliseconds.

    Instruction sets do not tell: AVX512-BF16 without AMX makes Xeons slower (0.6 times) and Zen 5 four times as fast.
    """
    has_instructions = any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    if not has_instructions:
        return False
    products = {
        dtype: (torch.ones(1024, 192, dtype=dtype), torch.ones(768, 192, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    num_threads = torch.get_num_threads()
    # Alone and by this thread's own clock: whatever else the machine does must not decide.
    torch.set_num_threads(1)
    try:
        seconds = {
            dtype: min(_seconds_of_product(*pair) for _ in range(_NUM_TRIALS)) for dtype, pair in products.items()
        }
    finally:
        torch.set_num_threads(num_threads)
    return seconds[torch.float32] > _MIN_GAIN * seconds[torch.bfloat16]


def product(first_MK: NDArray[np.float32], second_KN: NDArray[np.float32]) -> NDArray[np.float32]:
    """first_MK @ second_KN, by as many threads as torch has in the calling one.

    NumPy's would wake all processors, and have them wait for more, beside forward passes that need them.
    """
    return (torch.from_numpy(first_MK) @ torch.from_numpy(second_KN)).numpy()


@torch.inference_mode()
def _seconds_of_product(tokens_BD: Tensor, weights_FD: Tensor) -> float:
    start = time.thread_time()
    F.linear(tokens_BD, weights_FD)
    return time.thread_time() - start
