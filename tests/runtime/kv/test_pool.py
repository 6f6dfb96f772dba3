"""Page ids exactly as handed out, and errors on misuse."""

import numpy as np
import pytest

from blockzoo.engines.base import pages_for
from blockzoo.runtime.kv.pool import IntegrityError, OutOfPagesError, PagePool


def test_allocates_ascending_ids_from_a_fresh_pool():
    pool = PagePool(6)
    assert pool.allocate(2).tolist() == [0, 1]
    assert pool.allocate(3).tolist() == [2, 3, 4]
    assert pool.num_free == 1


def test_last_freed_is_handed_out_first():
    pool = PagePool(6)
    pool.allocate(5)
    pool.free(np.array([1, 3]))
    assert pool.free_ids().tolist() == [5, 1, 3]
    assert pool.allocate(3).tolist() == [3, 1, 5]


def test_ids_are_int32_and_a_copy():
    pool = PagePool(4)
    ids = pool.allocate(2)
    assert ids.dtype == np.int32
    ids[:] = 3
    assert pool.free_ids().tolist() == [3, 2]


def test_asking_for_too_many_takes_none():
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(OutOfPagesError, match="3 pages asked for, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.allocate(0).size == 0


@pytest.mark.parametrize("ids", [[0], [0, 3], [1, 1], [-1], [4]])
def test_free_refuses_free_double_and_foreign_ids(ids):
    pool = PagePool(4)
    pool.allocate(3)
    pool.free(np.array([0]))
    with pytest.raises(IntegrityError):
        pool.free(np.array(ids))
    assert pool.num_free == 2
    assert sorted(pool.free_ids().tolist()) == [0, 3]


def test_a_pool_needs_a_page():
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens) == pages


def test_a_pool_grows_and_shrinks_within_its_capacity():
    pool = PagePool(4, capacity=6)
    held = pool.allocate(2)
    assert pool.resize(6).size == 0
    assert (pool.num_pages, pool.num_free) == (6, 4)
    gone = pool.resize(3)
    assert (pool.num_pages, pool.num_free, gone.size) == (3, 1, 3)
    assert not set(gone.tolist()) & {*held.tolist(), *pool.free_ids().tolist()}
    assert sorted(pool.unused_ids().tolist()) == sorted(gone.tolist())
    with pytest.raises(OutOfPagesError):  # two are in use
        pool.resize(1)
    assert pool.num_pages == 3
    pool.free(held)
    assert sorted(pool.allocate(3).tolist()) == sorted({*range(6)} - {*gone.tolist()})
    with pytest.raises(ValueError, match="expected 1 to 6"):
        pool.resize(7)
