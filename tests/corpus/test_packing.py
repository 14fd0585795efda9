from hypothesis import given
from hypothesis import strategies as st

from teachercache.corpus.packing import best_fit_decreasing


def naive_best_fit(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(capacity - room for room in rooms)


@given(st.integers(1, 60).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=80))))
def test_packing_equals_the_naive_search(case):
    capacity, sizes = case
    bins = best_fit_decreasing(sizes, capacity=capacity)
    assert sorted(index for each in bins for index in each) == list(range(len(sizes)))
    assert sorted(sum(sizes[index] for index in each) for each in bins) == naive_best_fit(sizes, capacity)
    assert bins == best_fit_decreasing(sizes, capacity=capacity)


def test_many_windows_pack_tightly():
    sizes = [number * 7919 % 500 + 13 for number in range(20_000)]
    bins = best_fit_decreasing(sizes, capacity=512)
    assert sum(sizes) / (len(bins) * 512) > 0.99
