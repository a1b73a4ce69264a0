"""What the threads of a backend tell, and the loop that fetches it."""

from __future__ import annotations

import threading

from tars_core.plugin import Report, Reports, TextDelta


def test_nothing_is_fetched_where_nothing_came() -> None:
    assert Reports().fetch() == []


def test_what_each_thread_tells_is_fetched_once_and_in_its_order() -> None:
    reports = Reports()

    def tell(request_id: int) -> None:
        for number in range(200):
            reports.put(request_id, TextDelta(text=str(number)))
        reports.put(request_id, ValueError("the end"))

    threads = [threading.Thread(target=tell, args=(request_id,)) for request_id in range(4)]
    for thread in threads:
        thread.start()
    fetched: list[Report] = []
    while sum(isinstance(event, ValueError) for _, event in fetched) < len(threads):
        fetched += reports.fetch()
    assert reports.fetch() == []
    for request_id in range(4):
        *texts, end = [event for owner, event in fetched if owner == request_id]
        assert [event.text for event in texts if isinstance(event, TextDelta)] == [str(n) for n in range(200)]
        assert isinstance(end, ValueError)
