"""Who counts as away: nobody who was here a moment ago, and nobody before they had the time to come. And what is worth
a look of those who are here."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from src.aggregator.sessions import AWAY_S, Sessions
from src.provisioning.certificates import VALID_DAYS, Authority


def test_a_party_is_away_once_it_has_had_no_stream_for_long_enough() -> None:
    now = [100.0]
    sessions = Sessions(stopwatch=lambda: now[0])
    stream = sessions.open("a", "1")
    assert sessions.away("ab") == frozenset(), "b has had no time to come yet"
    now[0] += AWAY_S
    assert sessions.away("ab") == frozenset("b")
    sessions.close(stream)
    assert sessions.away("ab") == frozenset("b"), "a may be started again"
    now[0] += AWAY_S - 1
    again = sessions.open("a", "2")
    now[0] += 1
    assert sessions.away("ab") == frozenset("b")
    sessions.close(again)
    now[0] += AWAY_S
    assert sessions.away("ab") == frozenset("ab")


def test_an_older_stream_that_ends_takes_nobody_away() -> None:
    now = [0.0]
    sessions = Sessions(stopwatch=lambda: now[0])
    older = sessions.open("a", "1")
    sessions.open("a", "1")
    sessions.close(older)
    now[0] += 10 * AWAY_S
    assert sessions.away("a") == frozenset()


def test_the_status_names_a_party_whose_certificate_ends_soon() -> None:
    sessions = Sessions()
    for name, age in (("a", 0), ("b", VALID_DAYS - 30)):
        made = datetime.now(UTC) - timedelta(days=age)
        sessions.shown(name, Authority("demo", now=made).client("party", name).pem)
    assert sessions.warnings("a") == ()
    (said,) = sessions.warnings("b")
    assert said.startswith("the certificate of party/b of demo holds until ")
