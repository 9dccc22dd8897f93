"""How ranks come together: in threads over one store, as it may be left by an earlier start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from cpsp_dist.distributed import rendezvous
from cpsp_dist.distributed.card import Card
from cpsp_dist.distributed.launchers import Place
from cpsp_dist.distributed.rendezvous import failures_reported, meet
from cpsp_dist.utils.errors import LostRank, RankError, UserError

WORLD = 3


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that lives longer than a start, as that of torchrun's agent."""
    made = dist.HashStore()
    monkeypatch.setattr(rendezvous, "open_store", lambda place, limit: made)
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 10.0)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return made


def start(*ranks: int, call: Callable[[Place], Any]) -> list[Any]:
    """What `call` gives or raises on each rank of a world of `WORLD`."""
    results: list[Any] = [None] * len(ranks)

    def work(number: int) -> None:
        try:
            results[number] = call(Place(ranks[number], WORLD, ranks[number], "here", 1))
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def join(place: Place, limit: float = 20, **facts: Any) -> Any:
    return meet(place, Card(f"node{place.rank}", "cpu"), {"train.seed": 1} | facts, limit)


def test_every_start_in_one_store_is_a_session_of_its_own(store: Any) -> None:
    """C4: keys of the start before, and of a rank that left only its number, are not taken for this one's."""
    first = start(0, 1, 2, call=join)
    store.set("cpsp_dist//hello/1", "a rank that was killed here")
    second = start(2, 1, 0, call=join)
    ids = [{session.id for session in sessions} for sessions in (first, second)]
    assert len(ids[0]) == len(ids[1]) == 1
    assert ids[0] != ids[1]
    assert second[0].nodes == {"node0": [0], "node1": [1], "node2": [2]}


def test_who_fails_before_ends_the_others_at_once(store: Any) -> None:
    """C2: a rank that cannot read its data, of which the others would know nothing for minutes."""

    def call(place: Place) -> None:
        with failures_reported(place):
            if place.rank == 1:
                raise UserError("no such mount")
        join(place, limit=600)

    results = start(0, 1, 2, call=call)
    assert [type(result) for result in results] == [LostRank, UserError, LostRank]
    assert str(results[0]) == str(results[2]) == "rank 1: no such mount"
    assert results[0].code == 2
    assert (str(results[1]), results[1].claimed_by) == ("no such mount", 1)


def test_what_all_meet_is_printed_by_one(store: Any) -> None:
    def call(place: Place) -> None:
        with failures_reported(place):
            raise UserError("unknown key")

    results = start(0, 1, 2, call=call)
    assert len({result.claimed_by for result in results}) == 1


def test_who_is_about_to_do_something_else_is_named(store: Any) -> None:
    """Ranks of two commands."""
    results = start(0, 1, 2, call=lambda place: join(place, **{"train.seed": 22 if place.rank == 2 else 11}))
    assert all(isinstance(result, UserError) for result in results)
    assert [isinstance(result, RankError) for result in results] == [False, False, True], "who differs says so too"
    text = "rank 2 on node2 is about to do something else: train.seed is 22 there, 11 on rank 0 (node0)"
    assert {str(result).partition(";")[0] for result in results} == {text}


def test_who_does_not_come_is_named(store: Any) -> None:
    results = start(0, 2, call=lambda place: join(place, limit=0.5))
    assert {str(result).partition(";")[0] for result in results} == {"waited 0.5 s at here:1 for rank 1 of 3"}


def test_a_rank_that_comes_twice(store: Any) -> None:
    """Two starts at one address: whoever comes late ends, and the others train on."""
    results = start(0, 1, 1, call=lambda place: join(place, limit=1.0))
    messages = [str(result) for result in results]
    assert any("came to here:1 a second time" in text or "waited" in text for text in messages[1:]), messages


def test_secrets_of_settings_are_not_printed(store: Any) -> None:
    results = start(0, 1, 2, call=lambda place: join(place, uri=f"https://user:pass{place.rank}word@host{place.rank}/"))
    assert "uri is" in str(results[0])
    assert "word" not in str(results[0])
