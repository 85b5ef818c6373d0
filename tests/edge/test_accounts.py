"""The accounts: what a request's steering came to, from the frames of its streams."""

import asyncio

import pytest

from costeer_vllm.edge.accounts import Account, Accounts
from costeer_vllm.protocol.messages import Begin, Delta, End, Query

from .hub import advance, begin, run


def of(ref: str, stream: str) -> Begin:
    return begin(stream, Query(prompt="Hi", ref=ref))


def totals(account: Account) -> tuple[int, int, int, int]:
    return account.tokens_steered, account.tokens_missed, account.bytes_up, account.bytes_down


def test_tokens_and_bytes_of_all_streams_of_a_request_and_of_no_other() -> None:
    accounts = Accounts()
    with accounts.account("r", 2) as account, accounts.account("other", 1) as other:
        for stream in ("a", "b"):
            accounts.received(of("r", stream), 100)
            accounts.sent(Delta(stream, 0, 0, b""), 1000)
            accounts.received(advance(stream, [1]), 10)
        accounts.received(of("other", "c"), 7)
        accounts.received(begin("nobody's"), 9)
        accounts.sent(Delta("nobody's", 0, 0, b""), 9)
        assert not account.is_settled
        accounts.received(End("a", "finished", "", 2, 0), 5)
        assert not account.is_settled
        accounts.received(End("b", "finished", "", 1, 1), 5)
        assert account.is_complete
        assert totals(account) == (3, 1, 2000, 220)
        assert account.num_answers == 2
        assert totals(other) == (0, 0, 0, 7)


def test_a_preempted_stream_is_counted_and_goes_on_as_another() -> None:
    accounts = Accounts()
    with accounts.account("r", 1) as account:
        accounts.received(of("r", "a"), 100)
        accounts.received(End("a", "preempted", "", 5, 1), 5)
        assert not account.is_settled
        accounts.received(of("r", "a2"), 100)
        accounts.received(End("a2", "finished", "", 3, 0), 5)
        assert account.is_complete
        assert totals(account) == (8, 1, 0, 200)


def test_a_stream_that_begins_again_is_one() -> None:
    accounts = Accounts()
    with accounts.account("r", 1) as account:
        accounts.received(of("r", "a"), 100)
        accounts.received(of("r", "a"), 100)
        accounts.received(End("a", "finished", "", 3, 0), 5)
        assert account.is_complete
        assert totals(account) == (3, 0, 0, 200)


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda accounts: accounts.sent(End("a", "overloaded", "too many"), 5), "too many"),
        (lambda accounts: accounts.received(End("a", "engine_gone", "it fell silent"), 5), "it fell silent"),
        (lambda accounts: accounts.received(End("a", "detached"), 5), "detached"),
        (lambda accounts: accounts.detached(), "the link to the hub was lost"),
    ],
)
def test_a_stream_that_ends_without_counts_is_lost(lose: object, why: str) -> None:
    accounts = Accounts()
    with accounts.account("r", 2) as account:
        for stream in ("a", "b"):
            accounts.received(of("r", stream), 100)
        accounts.received(End("b", "finished", "", 3, 0), 5)
        lose(accounts)  # type: ignore[operator]
        assert account.is_settled
        assert not account.is_complete
        assert account.why == why
        accounts.received(End("a", "finished", "", 9, 9), 5)
        assert totals(account)[:2] == (3, 0)


def test_nothing_is_kept_of_a_request_that_is_over() -> None:
    accounts = Accounts()
    with accounts.account("r", 1) as account:
        accounts.received(of("r", "a"), 100)
    assert not accounts._by_ref
    assert not accounts._by_stream
    accounts.received(advance("a", [1]), 10)
    accounts.received(of("r", "b"), 100)
    accounts.detached()
    assert totals(account) == (0, 0, 0, 100)


def test_waiting_ends_with_the_last_stream_or_with_patience() -> None:
    async def main() -> None:
        accounts, loop = Accounts(), asyncio.get_running_loop()
        with accounts.account("r", 2) as account:
            await account.settle(0.01)
            for stream in ("a", "b"):
                accounts.received(of("r", stream), 100)
            loop.call_later(0.01, accounts.received, End("a", "finished", "", 1, 0), 5)
            loop.call_later(0.02, accounts.received, End("b", "finished", "", 1, 0), 5)
            start = loop.time()
            await account.settle(20.0)
            assert loop.time() - start < 10
            assert account.is_complete

    run(main())
