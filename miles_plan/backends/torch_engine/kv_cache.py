"""The paged KV cache: which pages are free or shared, and the tensors behind them (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles_plan.kernels.attention import PreparedKeyValue

FILLER_PAGE = 0  # pads page tables; never written, so its numbers stay finite


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free; nothing was taken."""


class PageAllocator:
    """Counts the holders of each of pages 1 .. num_pages; a page is free when nobody holds it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._holders = [0] * (num_pages + 1)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take free pages, one holder each. OutOfPagesError when there are fewer."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages are needed, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add a holder to each page. ValueError for a page that nobody holds."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a holder from each page; those without one become free. ValueError for a page that nobody holds."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free already")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]


class KvPool:
    """One `PreparedKeyValue` per layer: keys, values [pages + 1, kv_heads, page_tokens, head_dim]; scales lack the last."""

    def __init__(
        self, *, num_layers: int, num_pages: int, kv_heads: int, page_tokens: int, head_dim: int, device: str = "cpu"
    ) -> None:
        self.page_tokens = page_tokens
        shape = (num_pages + 1, kv_heads, page_tokens)
        self.layers = tuple(
            PreparedKeyValue(
                keys=torch.zeros(*shape, head_dim, dtype=torch.float64, device=device),
                values=torch.zeros(*shape, head_dim, dtype=torch.float64, device=device),
                value_scale=torch.ones(shape, dtype=torch.float64, device=device),
            )
            for _ in range(num_layers)
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the pool, for `free_storage` and `restore_storage`."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values, layer.value_scale)]

    @property
    def size_bytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy page to page, (source, target) each, in every layer."""
        if not copies:
            return
        source, target = (torch.tensor(pages, device=self.layers[0].keys.device) for pages in zip(*copies, strict=True))
        for tensor in self.tensors:
            tensor[target] = tensor[source]

    def reset(self) -> None:
        """Finite numbers everywhere, as after construction: masked keys are multiplied by zero, which NaN would survive."""
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()
            layer.value_scale.fill_(1.0)
