"""Turns between owners: by size, bounded, and at nobody's expense but that of whoever has most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.meter.fair_queue import FairQueue, QueueFull


def queue_of(capacity: int = 100, per_owner: int = 100) -> FairQueue[str]:
    return FairQueue(capacity=capacity, per_owner=per_owner)


def popped(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_owner_is_served_in_order() -> None:
    queue = queue_of()
    for number in range(5):
        queue.push("a", 10 - number, str(number))
    assert popped(queue) == list("01234")


def test_a_flood_of_one_owner_is_not_before_anothers() -> None:
    queue = queue_of()
    for number in range(50):
        queue.push("flood", 1, f"flood-{number}")
    queue.push("other", 1, "other")
    assert "other" in popped(queue)[:2]


def test_turns_are_fair_by_size() -> None:
    queue = queue_of()
    for number in range(20):
        queue.push("long", 100, f"long-{number}")
        queue.push("short", 10, f"short-{number}")
    first = popped(queue)[:11]
    assert sum(item.startswith("short") for item in first) == 10


def test_who_comes_back_has_nothing_saved_up() -> None:
    queue = queue_of()
    queue.push("idle", 1, "idle")
    for number in range(20):
        queue.push("busy", 1, f"busy-{number}")
    for _ in range(12):
        queue.pop()
    for number in range(8):
        queue.push("idle", 1, f"idle-{number}")
    assert sum(item.startswith("busy") for item in popped(queue)[:8]) == 4


def test_what_one_owner_may_have_waiting_is_bounded() -> None:
    queue = queue_of(per_owner=2)
    queue.push("a", 1, "1")
    queue.push("a", 1, "2")
    with pytest.raises(QueueFull) as full:
        queue.push("a", 1, "3")
    assert (full.value.of_owner, full.value.limit) == (True, 2)
    queue.push("b", 1, "4")


def test_when_it_is_full_who_has_most_gives_way_to_who_has_less() -> None:
    queue = queue_of(capacity=4)
    for number in range(4):
        queue.push("most", 1, f"most-{number}")
    with pytest.raises(QueueFull) as full:
        queue.push("most", 1, "one more")
    assert not full.value.of_owner
    assert queue.push("other", 1, "other-0") == "most-3"
    assert queue.push("other", 1, "other-1") == "most-2"
    with pytest.raises(QueueFull):
        queue.push("other", 1, "other-2")  # now they have as many
    assert sorted(popped(queue)) == ["most-0", "most-1", "other-0", "other-1"]


_STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "pop", "remove"]), st.sampled_from("abc"), st.integers(1, 50)), max_size=80
)


@given(_STEPS)
def test_what_went_in_comes_out_once_and_the_bounds_hold(steps: list[tuple[str, str, int]]) -> None:
    queue, inside = FairQueue[tuple[str, int]](capacity=6, per_owner=4), set[tuple[str, int]]()
    for number, (step, owner, size) in enumerate(steps):
        if step == "push":
            try:
                gone = queue.push(owner, size, (owner, number))
            except QueueFull:
                continue
            inside.add((owner, number))
            if gone is not None:
                inside.remove(gone)
        elif step == "pop" and len(queue):
            inside.remove(queue.pop())
        elif step == "remove" and inside:
            item = min(inside)
            queue.remove(item[0], item)
            inside.remove(item)
        assert len(queue) == len(inside) <= 6
        assert all(sum(each[0] == owner for each in inside) <= 4 for owner in "abc")
    assert set(queue.drain()) == inside
    assert len(queue) == 0
