"""Counter-based random numbers: a function of (seed, position, purpose, token id) and of nothing else.

Neither the batch, the order of requests, preemption nor the layout can therefore change a sampled text. The numbers are
those of the generator SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): its output function applied to a key plus a
multiple of its increment. Integers are 64 bits wide and wrap around. Shapes: R rows, V token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN, DRAFT, ACCEPTANCE, RESIDUAL = range(4)
"""Purposes of random numbers. Numbers for different purposes are independent."""

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_WORD = 2**64


def key(seed: int, position: int, purpose: int) -> int:
    """The key of one choice, as a signed 64-bit integer."""
    mixed = _mix(_mix(_mix(seed + _INCREMENT) + position * _INCREMENT) + (purpose + 1) * _INCREMENT)
    return _signed(mixed)


def uniform(seed: int, position: int, purpose: int) -> float:
    """One number in [0, 1), a multiple of 2^-53."""
    return (_mix(key(seed, position, purpose) % _WORD) >> 11) / 2**53


def exponentials(keys_R: Tensor, ids_V: Tensor) -> Tensor:
    """Exponentially distributed fp32 numbers [R, V] with mean 1, one for every key and token id.

    The token with the largest weight / exponential is a sample from the weights: the race of exponential clocks, the
    same thing as the Gumbel-max trick without its second logarithm. The smallest number is 2^-33.
    """
    z = _mix_each(keys_R[:, None] + (ids_V + 1) * _signed(_INCREMENT))
    uniforms = (((z >> 32) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    # 1 - u is exact for the small ones, which win; a u that rounds to 1 gives infinity, which never wins
    return torch.log1p(-uniforms).neg_()


def seed_state(seed: int) -> int:
    """What `keys` needs of a seed, as a signed 64-bit integer."""
    return _signed(_mix(seed + _INCREMENT))


def keys(states_R: Tensor, positions_R: Tensor, purpose: int) -> Tensor:
    """`key` of every row, computed where the tensors are: int64 [R]. states_R: see `seed_state`."""
    mixed_R = _mix_each(states_R + positions_R * _signed(_INCREMENT))
    return _mix_each(mixed_R + _signed((purpose + 1) * _INCREMENT))


def _mix_each(z: Tensor) -> Tensor:
    """`_mix` of every number, in place."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        # >> keeps the sign of a signed integer: the mask makes it the logical shift
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        if multiplier != 1:
            z *= _signed(multiplier)
    return z


def _mix(z: int) -> int:
    z %= _WORD
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        z = ((z ^ (z >> shift)) * multiplier) % _WORD
    return z


def _signed(z: int) -> int:
    z %= _WORD
    return z - _WORD if z >= _WORD // 2 else z
