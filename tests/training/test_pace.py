"""How often something that costs time is done: by a clock that the test moves."""

from __future__ import annotations

from rl_ebm.training.pace import FREE, SHARE, Pace


def test_nothing_is_done_before_its_time():
    pace = Pace(10.0, 100.0)
    assert not pace.due(109.9)
    assert pace.due(110.0)
    pace.did(110.0, 110.5)
    assert not pace.due(120.4)  # counted from the end of the last time
    assert pace.due(120.5)


def test_what_was_spent_and_is_to_come_stays_within_the_share():
    pace = Pace(1.0, 0.0)
    pace.did(5.0, 7.0)  # 2 spent, and 2 to come: due after 40 seconds
    assert SHARE == 0.1
    assert not pace.due(39.9)
    assert pace.due(40.0)
    pace.did(40.0, 41.0)  # 3 spent, and 1 to come
    assert not pace.due(39.9)
    assert pace.due(42.0)
    assert not Pace(1.0, 0.0, (0.0, 3.0)).due(29.0)  # expected to take more than ever before
    assert Pace(1.0, 0.0, (0.0, 3.0)).due(30.0)


def test_something_small_is_put_off_only_where_it_is_slow_again_and_again():
    pace = Pace(1.0, 0.0, small=True)
    pace.did(1.0, 9.0)  # another program held it up
    assert pace.due(10.0)
    pace.did(10.0, 18.0)  # twice
    assert not pace.due(19.0)
    assert not pace.due(239.0)
    assert pace.due(240.0)  # 16 spent, and 8 to come
    pace.did(240.0, 240.0 + FREE / 2)
    assert pace.due(242.0)
    large = Pace(1.0, 0.0)
    large.did(1.0, 9.0)
    assert not large.due(10.0)
