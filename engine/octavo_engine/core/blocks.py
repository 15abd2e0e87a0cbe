"""Who owns which block of the KV cache, and which finished blocks can be used again.

Called by the scheduler; knows no tensors and no requests. A block is `block_size` consecutive tokens of one
sequence in every layer.

Life of a block:
1. free, without a hash: never used, or its content was given up.
2. taken by `allocate`: one reference, content being written.
3. cached by `cache`: full, and found by its hash; `acquire` adds references for requests with the same prefix.
4. released by every holder: free again but still cached, until `allocate` evicts the one unused for longest.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NewType

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)


class BlockPool:
    """Reference counts, hashes and the order of eviction for `num_blocks` blocks."""

    def __init__(self, num_blocks: int, enable_caching: bool = True) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self._enable_caching = enable_caching
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._cached: dict[BlockHash, BlockId] = {}
        # Blocks without references, next to be handed out first. An ordered dict, as a hit takes from the middle.
        self._free: OrderedDict[BlockId, None] = OrderedDict((BlockId(i), None) for i in range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks with one reference each, evicting cached ones as needed; None when there are too few."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The cached blocks of the longest known prefix of these hashes. Changes nothing."""
        blocks = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_after(self, found: Sequence[BlockId]) -> int:
        """Free blocks that would be left once `found` (from `find`) is acquired."""
        return len(self._free) - sum(1 for block in found if self._references[block] == 0)

    def acquire(self, found: Sequence[BlockId]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block in found:
            assert self._hash_of[block] is not None, f"block {block} is not cached"
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def cache(self, block: BlockId, block_hash: BlockHash) -> None:
        """The block is full and may be found by its hash from now on."""
        assert self._references[block] > 0, f"block {block} is free"
        # Two requests may compute the same content side by side: the first stays known, the second stays private.
        if self._enable_caching and self._hash_of[block] is None and block_hash not in self._cached:
            self._hash_of[block] = block_hash
            self._cached[block_hash] = block

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give one reference of each back; `blocks` in the order of the sequence."""
        # Backwards, so that a prefix's tail is evicted before its head: a head without its tail is still a hit,
        # a tail without its head never is.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:  # nothing to lose: hand it out before anything cached
                    self._free.move_to_end(block, last=False)

    def forget_cached(self) -> None:
        """Drop every hash; used blocks stay used."""
        for block in list(self._cached.values()):
            self._forget(block)

    def check_integrity(self) -> None:
        """Assert that every block is either used or free, and that hashes point both ways."""
        for block in range(self.num_blocks):
            free = BlockId(block) in self._free
            assert free == (self._references[block] == 0), f"block {block}: free={free}, {self._references[block]} refs"
            assert self._references[block] >= 0
            block_hash = self._hash_of[block]
            assert block_hash is None or self._cached.get(block_hash) == block, f"block {block}: hash of another"
        assert len(self._cached) == sum(1 for h in self._hash_of if h is not None)

    def references(self, block: BlockId) -> int:
        return self._references[block]

    def _forget(self, block: BlockId) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hash_of[block] = None


def extend_hashes(hashes: list[BlockHash], tokens: Sequence[int], block_size: int, salt: str | None) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` does not cover yet.

    Chained: a hash stands for all tokens up to its block's end. The salt is part of the first link, so requests
    with different salts share nothing. 128 bits of BLAKE2b: not predictable from outside and fast on short input.
    """
    for index in range(len(hashes), len(tokens) // block_size):
        parent = hashes[index - 1] if index else hashlib.blake2b((salt or "").encode(), digest_size=16).digest()
        content = array("i", tokens[index * block_size : (index + 1) * block_size]).tobytes()
        hashes.append(BlockHash(hashlib.blake2b(content, digest_size=16, key=parent).digest()))
