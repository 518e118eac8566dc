"""Counter-based random numbers: a sample's stream depends on its name alone.

The name is (run seed, step, prompt key, sample id). Batch composition, row order, rank and the
number of tokens asked for do not enter, so any rank can redo any sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_PERSON = b"speciarl-rollout"


def _key(seed: int, step: int, prompt_key: str, sample_id: int) -> np.ndarray:
    """[2] uint64 Philox key. The integers come first, so no two names share an encoding."""
    name = f"{seed}\x1f{step}\x1f{sample_id}\x1f{prompt_key}".encode()
    return np.frombuffer(blake2b(name, digest_size=16, person=_PERSON).digest(), dtype="<u8")


def uniform_rows(seed: int, step: int, names: Sequence[tuple[str, int]], count: int) -> np.ndarray:
    """Uniform numbers of many samples, one row each.

    Args:
        seed: of the run.
        step: of training.
        names: prompt key and sample id of each row.
        count: numbers per row; a shorter row is the beginning of a longer one.

    Returns: [len(names), count] float64 in [0, 1), multiples of 2**-53.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), read as
    raw words: NumPy promises their values for ever, unlike those of its distributions.
    """
    generator = np.random.Philox(key=0)
    state = generator.state  # setting it anew costs a fifth of a new generator
    words = np.empty((len(names), count), dtype=np.uint64)
    for row, (prompt_key, sample_id) in enumerate(names):
        state["state"]["key"] = _key(seed, step, prompt_key, sample_id)
        generator.state = state
        words[row] = generator.random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, step: int, prompt_key: str, sample_id: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the stream of one sample, see `uniform_rows`."""
    return uniform_rows(seed, step, [(prompt_key, sample_id)], count)[0]


def request_seed(seed: int, step: int, prompt_key: str, sample_id: int) -> int:
    """A number in [0, 2**31) for an engine that draws by itself, from the same name."""
    return int(_key(seed, step, prompt_key, sample_id)[0] >> np.uint64(33))
