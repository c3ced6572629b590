"""Megatron-core's rotary embedding on `rope`; `hooks_megatron.enable` puts it in the place of theirs."""

from __future__ import annotations

from typing import Any

import torch

from .rope import rope
from .rope_table import rotation_tables


class Rotary:
    """Megatron's apply_rotary_pos_emb on `rope`.

    All layers of a pass rotate by the same angles at the same positions, which take ten small kernels to find: the last ones are
    kept, with the tensors that they came from, so that another tensor is never taken for one of these.
    """

    def __init__(self) -> None:
        self._angles_of: tuple[object, ...] = ()
        self._places_of: tuple[object, ...] = ()

    def __call__(
        self, t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: torch.Tensor | None = None, mscale: float = 1.0,
        cp_group: Any = None, mla_rotary_interleaved: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """t [tokens, batch, heads, D], or packed [tokens, heads, D]; freqs [positions, 1, 1, size]."""
        if config.rotary_interleaved or mla_rotary_interleaved or (cp_group is not None and cp_group.size() > 1):
            raise ValueError(
                "rotary_interleaved or context parallelism is on; allowed: half rotation and context_parallel_size 1"
            )
        size = freqs.shape[-1]
        angles_of = (freqs, _changes(freqs), mscale)
        if not _same(self._angles_of, angles_of):
            self._tables = rotation_tables(freqs[:, 0, 0, : size // 2].float().contiguous(), mscale)
            self._angles_of = angles_of
        spread = 1 if cu_seqlens is not None else t.shape[1]
        places_of = (cu_seqlens, _changes(cu_seqlens), t.shape[0], spread, freqs.shape[0], t.device)
        if not _same(self._places_of, places_of):
            self._positions = _positions(t.shape[0], spread, cu_seqlens, freqs.shape[0], t.device)
            self._places_of = places_of
        flat = t.reshape(-1, *t.shape[-2:])
        whole = size == t.shape[-1]
        turned, _ = rope(flat if whole else flat[..., :size], flat.detach()[:, :0, :size], *self._tables, self._positions)
        return turned.view(t.shape) if whole else torch.cat((turned, flat[..., size:]), -1).view(t.shape)


def _same(kept: tuple[object, ...], given: tuple[object, ...]) -> bool:
    """Whether these are the very tensors and equal numbers."""
    same = (a is b if isinstance(b, torch.Tensor) else a == b for a, b in zip(kept, given, strict=True))
    return bool(kept) and all(same)


def _changes(tensor: torch.Tensor | None) -> int:
    """How often it was written to."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _positions(
    tokens: int, spread: int, cu_seqlens: torch.Tensor | None, frequencies: int, device: torch.device
) -> torch.Tensor:
    """Each row's position: of its token, or inside its packed sequence."""
    positions = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return positions.repeat_interleave(spread)
    if frequencies == tokens:  # Megatron takes the frequencies for the whole pack's
        return positions
    starts = cu_seqlens.to(positions.dtype)
    return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
