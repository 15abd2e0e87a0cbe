"""The block pool: what it hands out, what it finds again, in which order it forgets."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from octavo_engine.core.blocks import BlockHash, BlockId, BlockPool, extend_hashes


def hashes_of(tokens: list[int], block_size: int = 4, salt: str | None = None) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, tokens, block_size, salt)
    return hashes


def cached(pool: BlockPool, names: str) -> list[BlockId]:
    """Allocate a block for each letter, let it be found under that letter's hash."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.cache(block, h(name))
    return blocks


def h(name: str) -> BlockHash:
    return BlockHash(name.encode())


def found(pool: BlockPool, names: str) -> int:
    """How many of these the pool finds, one by one."""
    return sum(len(pool.find([h(name)])) for name in names)


def test_each_block_is_handed_out_once():
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(5)

    assert sorted([*first, *second]) == list(range(8))
    assert (pool.num_free, pool.num_used) == (0, 8)
    pool.check_integrity()


def test_too_many_at_once_are_refused_and_nothing_changes():
    pool = BlockPool(4)
    pool.allocate(2)

    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert len(pool.allocate(2)) == 2


def test_asking_for_none_gives_none():
    pool = BlockPool(1)
    pool.allocate(1)

    assert pool.allocate(0) == []


def test_a_prefix_is_found_up_to_its_first_gap():
    pool = BlockPool(8)
    cached(pool, "abd")

    assert len(pool.find([h("a"), h("b"), h("c"), h("d")])) == 2
    assert pool.find([h("c"), h("a")]) == []


def test_a_released_block_is_still_found_until_its_room_is_needed():
    pool = BlockPool(2)
    blocks = cached(pool, "ab")
    pool.release(blocks)

    assert pool.num_free == 2
    assert pool.find([h("a"), h("b")]) == blocks
    pool.allocate(2)
    assert found(pool, "ab") == 0


def test_blocks_without_content_go_before_cached_ones():
    pool = BlockPool(4)
    old = cached(pool, "ab")
    pool.release(old)
    plain = pool.allocate(2)
    pool.release(plain)

    assert sorted(pool.allocate(2)) == sorted(plain)
    assert found(pool, "ab") == 2


def test_of_cached_blocks_the_one_unused_for_longest_goes_first():
    pool = BlockPool(3)
    a, b, c = cached(pool, "abc")
    for block in (b, a, c):
        pool.release([block])
    pool.acquire([b])  # a hit makes it the latest
    pool.release([b])

    order = [pool.allocate(1)[0] for _ in range(3)]
    assert order == [a, c, b]


def test_the_tail_of_a_prefix_goes_before_its_head():
    pool = BlockPool(3)
    pool.release(cached(pool, "abc"))

    pool.allocate(1)
    assert len(pool.find([h("a"), h("b"), h("c")])) == 2
    pool.allocate(1)
    assert len(pool.find([h("a"), h("b"), h("c")])) == 1


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    (block,) = cached(pool, "a")
    pool.acquire([block])
    pool.release([block])

    assert pool.num_used == 1
    pool.release([block])
    assert pool.num_used == 0


def test_what_would_be_left_after_a_hit_counts_only_unused_blocks():
    pool = BlockPool(4)
    a, b = cached(pool, "ab")
    pool.release([b])

    assert pool.num_free == 3
    assert pool.num_free_after([a]) == 3
    assert pool.num_free_after([a, b]) == 2


def test_of_two_blocks_with_one_content_the_first_stays_known():
    pool = BlockPool(2)
    first, second = cached(pool, "aa")

    assert pool.find([h("a")]) == [first]
    pool.release([second])
    pool.release([first])
    assert pool.allocate(1) == [second]
    pool.check_integrity()


def test_without_caching_nothing_is_found():
    pool = BlockPool(2, enable_caching=False)
    cached(pool, "a")

    assert pool.find([h("a")]) == []


def test_forgetting_leaves_used_blocks_used():
    pool = BlockPool(3)
    kept = cached(pool, "a")
    pool.release(cached(pool, "b"))
    pool.forget_cached()

    assert found(pool, "ab") == 0
    assert pool.references(kept[0]) == 1
    pool.check_integrity()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.release([BlockId(0)]),
        lambda pool: pool.acquire([BlockId(0)]),
        lambda pool: pool.cache(BlockId(0), h("a")),
    ],
    ids=["release a free block", "acquire an unknown block", "cache a free block"],
)
def test_misuse_is_our_own_fault_and_stops_at_once(misuse):
    with pytest.raises(AssertionError):
        misuse(BlockPool(2))


@pytest.mark.parametrize(("num_tokens", "full"), [(0, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_a_hash(num_tokens: int, full: int):
    assert len(hashes_of(list(range(num_tokens)))) == full


def test_a_hash_stands_for_all_tokens_up_to_its_end():
    one = hashes_of([1, 2, 3, 4, 5, 6, 7, 8])
    other = hashes_of([9, 2, 3, 4, 5, 6, 7, 8])

    assert one[0] != other[0]
    assert one[1] != other[1]
    assert len({*one, *other}) == 4


def test_hashes_extended_step_by_step_are_those_made_at_once():
    tokens = [random.Random(1).randrange(2**31) for _ in range(40)]
    hashes: list[BlockHash] = []
    for end in range(0, 41, 3):
        extend_hashes(hashes, tokens[:end], 4, "s")

    extend_hashes(hashes, tokens, 4, "s")
    assert hashes == hashes_of(tokens, salt="s")


def test_different_salts_share_no_hash_and_no_salt_is_the_empty_one():
    tokens = list(range(16))

    assert not set(hashes_of(tokens, salt="a")) & set(hashes_of(tokens, salt="b"))
    assert not set(hashes_of(tokens, salt="a")) & set(hashes_of(tokens))
    assert hashes_of(tokens, salt="") == hashes_of(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_random_use_never_leaks_double_books_or_finds_another_content(seed: int):
    """Beside a naive model: who holds what, and what each block was cached as."""
    rng = random.Random(seed)
    pool = BlockPool(rng.randrange(1, 24))
    held: list[list[BlockId]] = []
    content: dict[BlockId, BlockHash] = {}
    names = [h(str(i)) for i in range(30)]
    for _ in range(3000):
        match rng.randrange(5):
            case 0:
                count = rng.randrange(5)
                blocks = pool.allocate(count)
                in_use = {block for blocks_held in held for block in blocks_held}
                if blocks is None:
                    assert count > pool.num_blocks - len(in_use)
                else:
                    assert len(set(blocks)) == count
                    assert not in_use & set(blocks)
                    for block in blocks:
                        content.pop(block, None)
                    held.append(blocks)
            case 1 if held:
                pool.release(held.pop(rng.randrange(len(held))))
            case 2 if held and (blocks := rng.choice(held)):
                block, name = rng.choice(blocks), rng.choice(names)
                known = pool.find([name])
                pool.cache(block, name)
                if not known and block not in content:
                    content[block] = name
            case 3:
                hits = pool.find(rng.sample(names, 3))
                assert pool.num_free_after(hits) >= 0
                pool.acquire(hits)
                held.append(hits)
            case _:
                name = rng.choice(names)
                for block in pool.find([name]):
                    assert content[block] == name
        pool.check_integrity()
        references = Counter(block for blocks_held in held for block in blocks_held)
        assert all(pool.references(BlockId(b)) == references[BlockId(b)] for b in range(pool.num_blocks))
        assert pool.num_used == len(references)
