"""Many answers at once, among them some that keep a verifier busy for ever."""

import pytest

from dovetail.rlhf.verifiers.pool import VerifierError, verdicts

ENDLESS = ("a" * 40 + "b", {"pattern": "(a+)+$"})


def test_verdicts_stand_in_the_order_of_the_requests() -> None:
    requests = [(f"It is {i}.", {"answer": i if i % 3 else i + 1}) for i in range(20)]
    assert verdicts("number", requests) == [float(i % 3 != 0) for i in range(20)]


def test_an_answer_that_takes_for_ever_costs_the_others_nothing() -> None:
    found = verdicts(
        "regex", [ENDLESS, ("b", {"pattern": "b"}), ENDLESS, ("c", {"pattern": "b"})], seconds=0.5
    )
    assert [type(one) for one in found] == [VerifierError, float, VerifierError, float]
    assert "gave no verdict within 0.5 s" in str(found[0])
    assert (found[1], found[3]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (("3", {"answer": "many"}), "raised ValueError: there is no number"),
        (("3", {"answer": "3", "more": 1}), "raised TypeError"),
    ],
)
def test_what_a_verifier_raises_is_told(request_: tuple[str, dict[str, object]], reason: str) -> None:
    (found,) = verdicts("number", [request_])
    assert isinstance(found, VerifierError)
    assert str(found).startswith(reason)


def test_a_worker_that_does_not_start_is_told() -> None:
    (found,) = verdicts("no such verifier", [("3", {"answer": "3"})])
    assert str(found) == "could not be started"


def test_nothing_is_asked_where_there_is_nothing_to_ask() -> None:
    assert verdicts("number", []) == []
