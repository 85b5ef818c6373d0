"""The front end's part: what becomes of a client's request, against a hub over real sockets."""

import asyncio
from typing import Any

import pytest

from costeer_vllm.engine.admission import Permission, ask_permission, chat_query, prompt_query
from costeer_vllm.errors import AdmissionRefused, HubUnavailable, InvalidParameter
from costeer_vllm.protocol.keys import grant, key_digest
from costeer_vllm.protocol.messages import MAX_QUERY_BYTES, Admit, Admitted, Message, Query, Refused, Turn, Vocabulary
from costeer_vllm.request import Options, parse_admitted, parse_options

from .fake_hub import FakeHub

VOCABULARY = Vocabulary("0" * 64, 100)
KEY = "open-sesame-4711"
QUERY = Query(messages=[Turn("user", "Hello?")])


@pytest.fixture(autouse=True)
def server(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSTEER_HUB", hub.endpoint)
    monkeypatch.setenv("COSTEER_CACHE_SECRET", "secret")
    monkeypatch.delenv("COSTEER_ATTACH_KEY", raising=False)


def admitting(worker: str, keyed: bool) -> Any:
    return lambda message: [Admitted(message.ticket, worker, keyed)] if isinstance(message, Admit) else []


def ask(options: Options, user: str | None = None) -> Permission:
    return asyncio.run(ask_permission(options, user, VOCABULARY))


def test_a_permission_names_the_worker_that_the_hub_chose(hub: FakeHub) -> None:
    hub.answer = admitting("laptop", False)
    permission = ask(parse_options({"T": 5}), "martin")
    assert (permission.worker, permission.key_digest) == ("laptop", None)
    question = hub.next(Admit)
    assert (question.worker, question.user, question.key_digest, question.vocabulary) == (None, "martin", None, VOCABULARY)
    admitted = parse_admitted(permission.steer("chatcmpl-1", QUERY))
    assert (admitted.worker, admitted.query, admitted.grant) == ("laptop", QUERY, None)
    assert admitted.strength == parse_options({"T": 5}).strength


def test_edge_fusion_is_asked_for_and_goes_to_the_engine(hub: FakeHub) -> None:
    hub.answer = admitting("laptop", False)
    permission = ask(parse_options({"fusion": "edge", "candidates": 32, "rounding": 0.25, "max_bits": 20, "confidence": 0.9}))
    assert hub.next(Admit).fusion == "edge"
    admitted = parse_admitted(permission.steer("chatcmpl-1", QUERY))
    fields = admitted.fusion, admitted.candidates, admitted.rounding, admitted.max_bits, admitted.confidence
    assert fields == ("edge", 32, 0.25, 20.0, 0.9)
    ask(parse_options({}))
    assert hub.next(Admit).fusion == "cloud"


def test_a_key_goes_no_further_than_its_digest(hub: FakeHub) -> None:
    hub.answer = admitting("laptop", True)
    permission = ask(parse_options({"worker": "laptop", "key": KEY}))
    assert hub.next(Admit).key_digest == key_digest(KEY)
    plain = permission.steer("chatcmpl-1", QUERY)
    assert plain["grant"] == grant(key_digest(KEY), "laptop", QUERY)
    for text in (repr(permission), str(permission), repr(plain)):
        assert KEY not in text
        assert key_digest(KEY) not in text  # whoever has the digest can make grants


def test_a_key_for_a_worker_without_one_makes_no_grant(hub: FakeHub) -> None:
    hub.answer = admitting("laptop", False)
    assert "grant" not in ask(parse_options({"key": KEY})).steer("chatcmpl-1", QUERY)


def test_a_refusal_is_the_hubs_sentence(hub: FakeHub) -> None:
    def refuse(message: Message) -> list[Any]:
        return [Refused("worker", "no edge worker is attached", message.ticket)] if isinstance(message, Admit) else []

    hub.answer = refuse
    with pytest.raises(AdmissionRefused, match="costeer: no edge worker is attached"):
        ask(parse_options({}))


def test_a_user_of_any_length_does_not_make_the_question_unreadable(hub: FakeHub) -> None:
    hub.answer = admitting("laptop", False)
    assert ask(parse_options({}), "u" * 10_000).worker == "laptop"
    assert ask(parse_options({}), "").worker == "laptop"
    assert [len(question.user or "") for question in hub.messages(Admit)] == [512, 0]


def test_many_questions_at_once_get_their_own_answers(hub: FakeHub) -> None:
    hub.answer = lambda message: [Admitted(message.ticket, message.worker or "x", False)] if isinstance(message, Admit) else []

    async def all_at_once() -> list[Permission]:
        questions = (ask_permission(parse_options({"worker": f"w{i}"}), None, VOCABULARY) for i in range(30))
        return await asyncio.gather(*questions)

    assert [permission.worker for permission in asyncio.run(all_at_once())] == [f"w{i}" for i in range(30)]


def test_no_address_of_a_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSTEER_HUB", "")
    with pytest.raises(HubUnavailable, match="COSTEER_HUB is not set"):
        ask(parse_options({}))
    monkeypatch.setenv("COSTEER_HUB", "nonsense")
    with pytest.raises(HubUnavailable, match="is no address"):
        ask(parse_options({}))


@pytest.mark.parametrize(
    ("request_id", "query", "words"),
    [
        ("x" * 161, QUERY, "request"),
        ("two words", QUERY, "request"),
        ("chatcmpl-1", Query(prompt="x" * (MAX_QUERY_BYTES + 1)), "prompt"),
        ("chatcmpl-1", Query(messages=[Turn("user", "x" * (MAX_QUERY_BYTES // 2))] * 3), "the query"),
        ("chatcmpl-1", Query(messages=[Turn("", "x")]), "role"),
        ("chatcmpl-1", Query(prompt_ids=[-1]), "prompt_ids"),
    ],
)
def test_what_the_engine_would_not_take_is_refused_before_the_answer_starts(request_id: str, query: Query, words: str) -> None:
    permission = Permission(parse_options({}), "laptop", None)
    with pytest.raises(InvalidParameter, match=words):
        permission.steer(request_id, query)


def test_the_cache_salt_keeps_workers_and_keys_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse_options({})
    permissions = [Permission(options, worker, digest) for worker in ("a", "b") for digest in (None, "0" * 64, "1" * 64)]
    salts = [permission.cache_salt() for permission in permissions]
    assert len(set(salts)) == len(salts)
    assert salts == [permission.cache_salt() for permission in permissions]
    assert all(len(salt) == 32 and salt.isalnum() for salt in salts)
    monkeypatch.setenv("COSTEER_CACHE_SECRET", "another server's")
    assert permissions[0].cache_salt() != salts[0]


def test_conversations_become_queries() -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool"},
    ]
    turns = [Turn("system", "Be brief."), Turn("user", "One\ntwo"), Turn("assistant", ""), Turn("tool", "")]
    assert chat_query(conversation, True) == Query(messages=turns, continue_final_message=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages\\[0\\].content is 'a part of type image_url'"),
        ([{"type": "text", "text": 5}], "a part of type text"),
        (["text"], "a part of type str"),
        (5, "a part of type int"),
    ],
)
def test_what_is_not_text_is_refused(content: Any, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        chat_query([{"role": "user", "content": content}], False)
    with pytest.raises(InvalidParameter, match="messages"):
        chat_query([], False)


def test_prompts_become_queries() -> None:
    assert prompt_query("Hello?") == prompt_query({"prompt": "Hello?"}) == Query(prompt="Hello?")
    assert prompt_query([1, 2]) == prompt_query({"prompt_token_ids": [1, 2], "prompt": "x"}) == Query(prompt_ids=[1, 2])
    for nothing in (None, [], ["a"], {}, {"prompt_embeds": 1}, 5):
        with pytest.raises(InvalidParameter, match="prompt"):
            prompt_query(nothing)


def test_what_a_client_chose_reaches_the_engine_and_is_covered_by_the_grant() -> None:
    digest, query = "0" * 64, Query(prompt="Hi")
    options = parse_options({"context_ref": "row/7", "confidence": 0.25, "strength": 1})
    admitted = parse_admitted(Permission(options, "laptop", digest).steer("r", query))
    chosen = Query(prompt="Hi", ref="row/7")
    assert (admitted.query, admitted.confidence) == (chosen, 0.25)
    assert admitted.grant == grant(digest, "laptop", chosen) != grant(digest, "laptop", query)
