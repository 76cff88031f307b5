"""Full collections of garbage happen when nobody waits."""

import gc

from appliance.live.garbage import AT_LEAST_APART, AT_MOST_APART, NEVER, Collector


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.idle = False
        self.collections: list[float] = []
        self.collector = Collector(
            lambda: self.idle,
            clock=lambda: self.now,
            collect=lambda: self.collections.append(self.now),
        )


def test_a_busy_server_collects_only_after_a_long_time() -> None:
    world = World()
    while world.now < 2.5 * AT_MOST_APART:
        world.now += 1.0
        world.collector.look()
    assert world.collections == [AT_MOST_APART, 2 * AT_MOST_APART]


def test_an_idle_server_collects_at_once_but_not_all_the_time() -> None:
    world = World()
    world.now = 3 * AT_LEAST_APART
    world.collector.look()
    assert world.collections == []
    world.idle = True
    for _ in range(int(2.5 * AT_LEAST_APART)):
        world.collector.look()
        world.now += 1.0
    begun = 3 * AT_LEAST_APART
    assert world.collections == [begun, begun + AT_LEAST_APART, begun + 2 * AT_LEAST_APART]


async def test_the_interpreter_makes_no_full_collections_meanwhile_and_gets_its_ways_back() -> None:
    before = gc.get_threshold()
    collector = World().collector
    collector.start()
    try:
        assert gc.get_threshold()[2] == NEVER
        assert gc.get_freeze_count() > 0
    finally:
        collector.stop()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
