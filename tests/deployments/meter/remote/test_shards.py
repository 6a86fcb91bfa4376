"""Which meter decides on whom."""

from __future__ import annotations

from collections import Counter

from deployments.contracts import owner_of
from deployments.meter.remote.shards import meter_names, shard_of

OWNERS = [owner_of(f"key-{number}", None) for number in range(1000)]


def test_the_first_meter_keeps_its_name_whatever_their_number() -> None:
    assert [meter_names(count) for count in (1, 3)] == [("Meter",), ("Meter", "Meter-1", "Meter-2")]


def test_owners_are_spread_evenly() -> None:
    counts = Counter(shard_of(owner, 4) for owner in OWNERS)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 1.25 * min(counts.values())


def test_another_meter_takes_over_its_share_only() -> None:
    moved = [owner for owner in OWNERS if shard_of(owner, 3) != shard_of(owner, 4)]
    assert all(shard_of(owner, 4) == 3 for owner in moved)
    assert 200 < len(moved) < 300


def test_the_keys_of_a_team_are_together() -> None:
    assert owner_of("key-1", "red") == owner_of("key-2", "red") != owner_of("key-1", None)
    assert owner_of("red", None) != owner_of("key-1", "red")
