"""The routes of the device's own page over real sockets: what they show, whom they refuse, and what of it is kept."""

import base64
import hashlib
import json
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from costeer_vllm import __version__
from costeer_vllm.cli import app
from costeer_vllm.edge import ledger as ledgers
from costeer_vllm.edge.ledger import Entry, Ledger, default_path, read
from costeer_vllm.edge.page import MAX_PLOTTED, content_security_policy, sums
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.edge.traces import MAX_TOKENS, MAX_TRACES, Trace, Traces
from costeer_vllm.edge.worker import EXIT_INVALID
from costeer_vllm.edge.worker import run as run_worker
from costeer_vllm.errors import InvalidParameter
from costeer_vllm.protocol.messages import Candidates, Choice, Delta, End, Fusion, Query, Sampling

from .device import Device, device
from .hub import advance, begin, run

ROUTES = ("/costeer/state", "/costeer/answers/x", "/costeer/strength")


def answered(books: Any, stream: str, fusion: Fusion, num_tokens: int = 3, end: bool = True) -> None:
    """A stream as the books see it: 100 bytes down, and per token 30 bytes up and 7 down."""
    sampling = Sampling() if fusion == "edge" else None
    books.received(begin(stream, Query(prompt="Hi", ref="r"), sampling=sampling, strength=1.5), 100)
    for i in range(num_tokens):
        if fusion == "edge":
            books.received(Candidates(stream, i, 0, b""), 7)
            books.sent(Choice(stream, i, 0, 70 + i), 30)
            books.traces.disclosed(stream, 1.25 * (i + 1), 20.0)
        else:
            books.sent(Delta(stream, i, 0, b""), 30)
            books.received(advance(stream, list(range(70, 71 + i))), 7)
        books.traces.moved(stream, 70 + i, 0.5, 0.123456789)
    if end:
        books.received(End(stream, "finished", "", num_tokens, 1), 10)


def page(at: Device) -> httpx.AsyncClient:
    """A client of the page's own routes."""
    return httpx.AsyncClient(base_url=at.gateway.url.removesuffix("/v1"), trust_env=False, timeout=10)


# --- the page and its routes ---


def test_the_page_may_do_nothing_but_ask_its_own_gateway(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            answer = await browser.get("/")
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
            assert policy["connect-src"] == "'self'"
            assert "unsafe" not in str(policy)
            for element in ("style", "script"):
                (content,) = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
                digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
                assert policy[f"{element}-src"] == f"'sha256-{digest}'"
            assert not re.search(r"""(src|href)=["'](?!data:)|style="|\son[a-z]+=|innerHTML|@import|url\(""", answer.text)
            assert "tiny" not in answer.text
            for path in ("/", "/costeer/state"):
                headers = (await browser.get(path)).headers
                assert headers["cache-control"] == "no-store"
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["referrer-policy"] == "no-referrer"
                assert headers["cross-origin-resource-policy"] == "same-origin"
                assert "access-control-allow-origin" not in headers
            for method, path in (("POST", "/"), ("GET", "/costeer/strength"), ("POST", "/costeer/state"), ("GET", "/costeer")):
                refused = await browser.request(method, path)
                assert refused.status_code in (404, 405)
                assert refused.json()["error"]["code"] == "unknown_route"

    run(main())


def test_a_page_with_two_scripts_has_no_policy() -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        content_security_policy("<style></style><script></script><script></script>")


def test_the_state_of_a_device(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, tokens_only=True, max_bits=20.0) as at, page(at) as browser:
            at.books.ledger = Ledger(tmp_path / "ledger.jsonl", "laptop")
            answered(at.books, "one", "edge")
            answered(at.books, "two", "cloud", num_tokens=2)
            answered(at.books, "three", "edge", end=False)
            state = (await browser.get("/costeer/state")).json()
            assert {name: state[name] for name in state if name not in ("answers", "ledger", "default_strength")} == {
                "version": __version__, "worker": "laptop", "model": "tiny", "attached": True, "hub": "127.0.0.1:1",
                "server": at.server.url, "tokens_only": True, "max_bits": 20.0, "strength": None, "live": 1,
            }  # fmt: skip
            assert state["default_strength"] == pytest.approx(1.783, abs=1e-3)
            three, two, one = state["answers"]
            assert [answer["stream"] for answer in (three, two, one)] == ["three", "two", "one"]
            assert time.time() - 60 < one.pop("began") <= one.pop("ended") < time.time() + 1
            assert one == {
                "stream": "one", "request": "one", "fusion": "edge", "strength": 1.5, "num_before": 0, "num_tokens": 0,
                "num_shown": 3, "bytes_up": 90, "bytes_down": 121, "bits": 3.75, "max_bits": 20.0, "reason": "finished",
                "tokens_steered": 3, "tokens_missed": 1,
            }  # fmt: skip
            assert [two[name] for name in ("fusion", "bits", "num_tokens", "bytes_up", "bytes_down")] == [
                "cloud",
                None,
                2,
                60,
                114,
            ]
            assert (three["ended"], three["reason"], three["tokens_steered"]) == (None, None, None)
            ledger = state["ledger"]
            assert ledger["told"] == [[pytest.approx(time.time(), abs=60), 3.75]]
            assert time.time() - 60 < ledger["since"] < time.time() + 1
            assert {name: ledger[name] for name in ("kept", "edge", "cloud", "bytes_down")} == {
                "kept": True, "edge": {"answers": 1, "bytes_up": 90, "bits": 3.75},
                "cloud": {"answers": 1, "bytes_up": 60}, "bytes_down": 235,
            }  # fmt: skip
            at.steerable = None
            at.books.received(End("three", "finished", "", 3, 0), 10)
            state = (await browser.get("/costeer/state")).json()
            assert (state["attached"], state["live"]) == (False, 0)
            assert state["ledger"]["edge"] == {"answers": 2, "bytes_up": 180, "bits": 7.5}

    run(main())


def test_without_a_ledger_the_last_answers_are_summed(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            empty = (await browser.get("/costeer/state")).json()["ledger"]
            assert (empty["kept"], empty["since"], empty["told"], empty["edge"]["answers"]) == (False, None, [], 0)
            answered(at.books, "one", "edge")
            answered(at.books, "two", "cloud", end=False)
            ledger = (await browser.get("/costeer/state")).json()["ledger"]
            assert ledger["edge"] == {"answers": 1, "bytes_up": 90, "bits": 3.75}
            assert ledger["cloud"] == {"answers": 0, "bytes_up": 0}

    run(main())


def test_the_tokens_of_an_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            at.books.traces.decode = lambda ids: "".join(map(chr, ids))
            answered(at.books, "chatcmpl-1/0 a", "edge")
            path = "/costeer/answers/chatcmpl-1%2F0%20a"
            found = (await browser.get(path)).json()
            assert found["tokens"] == [{"token": 70 + i, "text": chr(70 + i), "plain": 0.5, "personal": 0.1235} for i in range(3)]
            assert found["num_shown"] == 3
            for start, texts in (("0", "FGH"), ("2", "H"), ("3", ""), ("999999999", "")):
                tokens = (await browser.get(path, params={"from": start})).json()["tokens"]
                assert "".join(token["text"] for token in tokens) == texts
            for start in ("-1", "x", "", "1.0", "9" * 10, "\u0663"):
                refused = await browser.get(path, params={"from": start})
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_parameter")
            for stream in ("two", "", "chatcmpl-1", "..%2f..", "%00"):
                refused = await browser.get(f"/costeer/answers/{stream}")
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_stream")
            assert refused.headers["content-type"] == "application/json"

    run(main())


# --- strength ---


def test_the_strength_is_that_of_the_requests_that_say_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:

            async def sent(costeer: Any = None) -> dict[str, Any]:
                await at.chat(**({} if costeer is None else {"costeer": costeer}))
                return dict(at.server.calls[-1].json.get("costeer", {}))

            assert "strength" not in await sent()
            for strength in (0.5, 0, 3, -1.25, 1000):
                answer = await browser.post("/costeer/strength", json={"strength": strength})
                assert (answer.status_code, answer.json()) == (200, {"strength": strength})
                assert (await browser.get("/costeer/state")).json()["strength"] == strength
                assert (await sent())["strength"] == strength
            assert (await sent({"strength": 2}))["strength"] == 2
            assert "strength" not in await sent({"T": 1})
            assert await sent(False) == {}
            answer = await at.chat()
            assert answer.json()["costeer"]["strength"] == 1000
            assert (await browser.post("/costeer/strength", json={"strength": None})).json() == {"strength": None}
            assert "strength" not in await sent()

    run(main())


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b'{"strength": 1}', "text/plain", 415, "bad_content_type"),
        (b'{"strength": 1}', "", 415, "bad_content_type"),
        (b"strength=1", "application/x-www-form-urlencoded", 415, "bad_content_type"),
        (b"", "application/json", 400, "bad_json"),
        (b"{", "application/json", 400, "bad_json"),
        (b"1", "application/json", 400, "bad_json"),
        (b"[1]", "application/json", 400, "bad_json"),
        (b"{}", "application/json", 400, "bad_json"),
        (b'{"strength": NaN}', "application/json", 400, "bad_json"),
        (b'{"strength": "\xff"}', "application/json", 400, "bad_json"),
        (b"[" * 1000, "application/json", 400, "bad_json"),
        (b'{"strength": "1"}', "application/json", 400, "bad_parameter"),
        (b'{"strength": true}', "application/json", 400, "bad_parameter"),
        (b'{"strength": [1]}', "application/json", 400, "bad_parameter"),
        (b'{"strength": 1000.1}', "application/json", 400, "bad_parameter"),
        (b'{"strength": -1e308}', "application/json", 400, "bad_parameter"),
        (b'{"strength": 1' + b" " * 1024 + b"}", "application/json", 413, "too_long"),
    ],
)
def test_strengths_that_are_refused(tmp_path: Path, body: bytes, kind: str, status: int, code: str) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            await browser.post("/costeer/strength", json={"strength": 0.25})
            refused = await browser.post("/costeer/strength", content=body, headers={"content-type": kind} if kind else {})
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
            assert (await browser.get("/costeer/state")).json()["strength"] == 0.25

    run(main())


# --- who may look ---


def test_with_a_key_the_page_is_open_and_what_it_shows_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path, key="sesame") as at, page(at) as browser:
            answered(at.books, "x", "edge")
            assert (await browser.get("/")).status_code == 200
            assert (await browser.get("/?key=sesame")).status_code == 200
            for authorization in ({}, {"authorization": "Bearer simsim"}):
                for path in ROUTES:
                    for method in ("GET", "POST"):
                        refused = await browser.request(method, path, headers=authorization, params={"key": "sesame"})
                        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "wrong_key")
            browser.headers["authorization"] = "Bearer sesame"
            for path in ROUTES[:2]:
                assert (await browser.get(path)).status_code == 200
            assert (await browser.post(ROUTES[2], json={"strength": 1})).status_code == 200
            assert "sesame" not in (await browser.get(ROUTES[0])).text

    run(main())


def test_without_a_key_other_sites_and_names_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            answered(at.books, "x", "edge")
            for headers, code in (
                ({"host": "evil.example"}, "wrong_host"),
                ({"origin": "https://evil.example"}, "wrong_origin"),
                ({"origin": "null"}, "wrong_origin"),
                ({"sec-fetch-site": "cross-site"}, "wrong_origin"),
                ({"sec-fetch-site": "same-site"}, "wrong_origin"),
            ):
                for path in ROUTES:
                    for method in ("GET", "POST", "OPTIONS"):
                        refused = await browser.request(method, path, headers=headers, json={"strength": 9})
                        assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)
            assert (await browser.get("/", headers={"sec-fetch-site": "cross-site"})).status_code == 200  # a link leads here
            assert (await browser.get("/", headers={"host": "evil.example"})).status_code == 403
            assert (await browser.get("/", headers={"origin": "https://evil.example"})).status_code == 403
            own = {"origin": str(browser.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
            assert (await browser.post(ROUTES[2], json={"strength": 1}, headers=own)).status_code == 200
            assert (await browser.get(ROUTES[0])).json()["strength"] == 1

    run(main())


def test_nothing_private_is_shown_but_the_tokens_of_answers(tmp_path: Path) -> None:
    """The context, its place, the queries' private texts and the keys are in none of the routes' answers."""
    secrets = {"steering_key": "s-key", "attach_key": "a-key", "server_key": "v-key"}

    async def main() -> None:
        async with device(tmp_path, **secrets) as at, page(at) as browser:
            at.books.ledger = Ledger(tmp_path / "ledger.jsonl", "laptop")
            ref = at.contexts.register("My sister is Petronella.")
            at.books.received(begin("x", Query(prompt="What a question", ref=ref)), 100)
            at.books.sent(Delta("x", 0, 0, b""), 1)
            at.books.traces.moved("x", 1, 0.5, 0.5)
            at.books.received(End("x", "failed", "Petronella", 0, 0), 10)
            answers = [await browser.get(path) for path in ("/", *ROUTES)]
            answers.append(await browser.post("/costeer/strength", content=b"Wilhelmina"))
            shown = b"".join(answer.content + str(answer.headers).encode() for answer in answers)
            shown += (tmp_path / "ledger.jsonl").read_bytes()
            at.contexts.forget(ref)
            for private in ("Wilhelmina", "Petronella", "question", str(tmp_path), "me.md", ref, *secrets.values()):
                assert private.encode() not in shown

    run(main())


# --- traces ---


class Bytes:
    """A tokenizer of bytes."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["naïve", "日本語です", "a😀b", "👩‍👩‍👧‍👦!", "é", "e\u0301", "\n\n", "🎼🎹🎻", "x" * 20 + "ß"])
def test_characters_of_several_tokens_appear_with_the_last_of_them(text: str) -> None:
    traces = Traces()
    traces.decode = Bytes.decode
    traces.received(begin("x"), 1)
    traces.sent(Delta("x", 0, 0, b""), 1)
    for byte in text.encode():
        traces.moved("x", byte, 0.5, 0.5)
    trace = traces.find("x")
    assert trace is not None
    assert "".join(moved.text for moved in trace.tokens) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(moved.text for moved in trace.tokens)
    ends = [i for i, moved in enumerate(trace.tokens) if moved.text]
    assert len(ends) == len(text)


def test_what_is_no_character_is_shown_at_last() -> None:
    traces = Traces()
    traces.decode = Bytes.decode
    traces.received(begin("x"), 1)
    traces.sent(Delta("x", 0, 0, b""), 1)
    for byte in b"a" + b"\xff" * 20 + b"b":
        traces.moved("x", byte, 0.5, 0.5)
    trace = traces.find("x")
    assert trace is not None
    assert "".join(moved.text for moved in trace.tokens) == "a" + "\N{REPLACEMENT CHARACTER}" * 20 + "b"


def test_spaces_that_a_tokenizer_drops_at_the_beginning_are_kept_inside() -> None:
    traces = Traces()
    words = ["", " one", " two", " ", " three"]
    traces.decode = lambda ids: "".join(words[token] for token in ids).removeprefix(" ")
    traces.received(begin("x"), 1)
    traces.sent(Delta("x", 0, 0, b""), 1)
    for token in (1, 2, 3, 4):
        traces.moved("x", token, 0.5, 0.5)
    trace = traces.find("x")
    assert trace is not None
    assert [moved.text for moved in trace.tokens] == ["one", " two", " ", " three"]


def test_text_before_the_tokenizer_is_loaded_is_none() -> None:
    traces = Traces()
    traces.received(begin("x"), 1)
    traces.sent(Delta("x", 0, 0, b""), 1)
    traces.moved("x", 1, 0.5, 0.5)
    found = traces.find("x")
    assert found is not None
    assert [moved.text for moved in found.tokens] == [""]


def test_traces_are_bounded() -> None:
    traces = Traces()
    for i in range(3 * MAX_TRACES):
        traces.received(begin(f"s{i}"), 1)
        traces.sent(Delta(f"s{i}", 0, 0, b""), 1)
        traces.received(End(f"s{i}", "finished"), 1)
        traces.moved(f"s{i}", 1, 0.5, 0.5)  # too late
    assert [trace.stream for trace in traces] == [f"s{i}" for i in reversed(range(2 * MAX_TRACES, 3 * MAX_TRACES))]
    assert traces.num_open == 0
    assert all(not trace.tokens for trace in traces)
    for i in range(2 * MAX_TRACES):  # refused, mostly: they shall not fill the books
        traces.received(begin(f"nothing for {i}"), 1)
        assert traces.sent(End(f"nothing for {i}", "refused"), 1) is None
    assert len(list(traces)) == MAX_TRACES
    traces.received(begin("long"), 1)
    traces.sent(Delta("long", 0, 0, b""), 1)
    for _ in range(MAX_TOKENS + 10):
        traces.moved("long", 1, 0.5, 0.5)
    trace = traces.find("long")
    assert trace is not None
    assert len(trace.tokens) == MAX_TOKENS


def test_a_stream_that_begins_again_is_another_trace() -> None:
    traces = Traces()
    assert traces.received(begin("x"), 1) is None
    traces.sent(Delta("x", 0, 0, b""), 1)
    former = traces.received(begin("x", tokens=[1, 2, 3]), 1)
    assert former is not None
    assert (former.reason, former.num_before) == ("preempted", 0)
    traces.sent(Delta("x", 3, 0, b""), 1)
    again = traces.find("x")
    assert again is not None
    assert again is not former
    assert (again.ended, again.num_before, again.num_tokens) == (None, 3, 3)
    assert [trace.reason for trace in traces.detached()] == ["detached"]
    assert traces.detached() == []
    traces.received(begin("y"), 1)
    traces.sent(Delta("y", 0, 0, b""), 1)
    refused = traces.sent(End("y", "refused"), 1)
    assert refused is not None
    assert refused.reason == "refused"


# --- the ledger ---


def trace(name: str = "x", fusion: Fusion = "edge", bits: float | None = 2.5) -> Trace:
    return Trace(name, name, fusion, 1.5, 1.0, num_tokens=4, bytes_up=120, bytes_down=300, bits=bits, ended=1_800_000_000.0)


def test_the_ledger_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    former = os.umask(0)
    try:
        ledger = Ledger(path, "laptop")
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ledger.add(trace())
    assert json.loads(path.read_text()) == {
        "time": 1.8e9, "worker": "laptop", "request": "x", "fusion": "edge", "strength": 1.5, "tokens": 4, "bytes_up": 120,
        "bytes_down": 300, "bits": 2.5,
    }  # fmt: skip
    assert Ledger(path, "laptop").entries == ledger.entries == read(path)


def test_a_full_ledger_is_begun_anew_and_the_former_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_BYTES", 1000)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, "laptop")
    sizes = []
    for i in range(50):
        ledger.add(trace(str(i)))
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        kept = [int(entry.request) for entry in read(path)]  # also right after a rotation
        assert kept == list(range(kept[0], i + 1))
        assert Ledger(path, "laptop").entries == read(path)
    assert max(sizes) < 2 * 1000 + 400
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.jsonl", "ledger.jsonl.1"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_the_entries_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_SHOWN", 5)
    ledger = Ledger(tmp_path / "ledger.jsonl", "laptop")
    for i in range(12):
        ledger.add(trace(str(i)))
        assert len(ledger.entries) == min(i + 1, 5)
    assert ledger.entries[-1].request == "11"
    assert len(Ledger(tmp_path / "ledger.jsonl", "laptop").entries) == 5
    entry = ledger.entries[0]
    assert len(sums([entry] * 500)["told"]) == MAX_PLOTTED


def test_torn_lines_are_skipped_and_take_nothing_with_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    good = msgspec.json.encode(Entry(1.0, "laptop", "one", "cloud", 1.0, 1, 1, 1))
    path.write_bytes(b'\n{"time": 1}\n\xff\xfe\n{"time": "\xff"}\nnull\n' + good + b"\n" + good[:20])
    ledger = Ledger(path, "laptop")
    assert [entry.request for entry in ledger.entries] == ["one"]
    ledger.add(trace("two"))
    assert [entry.request for entry in read(path)] == ["one", "two"]


def test_a_ledger_that_cannot_be_written_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(InvalidParameter, match="ledger is"):
            Ledger(path, "laptop")
    settings = EdgeSettings(hub="127.0.0.1:1", name="laptop", model="none", context="none", ledger=str(tmp_path))
    assert run_worker(settings) == EXIT_INVALID
    assert "a file that can be written" in caplog.text


def test_later_it_is_told_once_and_steering_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "ledger.jsonl"
    ledger = Ledger(path, "laptop")
    path.unlink()
    path.parent.rmdir()
    for _ in range(3):
        ledger.add(trace())
    assert len(ledger.entries) == 3
    assert caplog.text.count("cannot be written") == 1


# --- costeer edge ledger ---


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "ledger.jsonl", "laptop")
    for i, bits in enumerate((2.5, -0.25, 11.0)):
        ledger.add(trace(f"edge-{i}", bits=bits))
    ledger.add(trace("cloud", "cloud", None))
    return tmp_path / "ledger.jsonl"


def shown(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["edge", "ledger", *arguments], env={"COLUMNS": "160", **environment})


def test_the_ledger_as_a_table(filled: Path) -> None:
    table = shown("--ledger", str(filled)).output
    assert "4 answers in the ledger" in table
    assert "-0.2" in table
    assert "(deltas)" in table
    assert "at most 13.2 bits told in 3 answers" in table
    assert "120 bytes of deltas left this device in 1 answers" in table
    assert "11.0" not in shown("--ledger", str(filled), "--last", "1").output


def test_the_ledger_as_json(filled: Path) -> None:
    lines = shown("--ledger", str(filled), "--json").output.splitlines()
    assert [json.loads(line)["request"] for line in lines] == ["edge-0", "edge-1", "edge-2", "cloud"]
    assert [json.loads(line).get("bits") for line in lines] == [2.5, -0.25, 11.0, None]
    assert len(shown("--ledger", str(filled), "--json", "--last", "2").output.splitlines()) == 2


def test_the_ledger_as_a_plot(filled: Path, tmp_path: Path) -> None:
    assert shown("--ledger", str(filled), "--plot", str(tmp_path / "plot.png")).exit_code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").write_text("")
    assert shown("--ledger", str(tmp_path / "empty"), "--plot", str(tmp_path / "none.png")).exit_code == 0


def test_no_ledger_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(XDG_STATE_HOME=str(tmp_path))
    assert isinstance(found.exception, InvalidParameter)  # which the entry point prints without a traceback
    assert re.fullmatch(r"costeer: ledger is '/.*'?; it must be the ledger of an edge .*No such file.*", str(found.exception))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "costeer" / "ledger.jsonl"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "state" / "costeer" / "ledger.jsonl"


def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at, page(at) as browser:
            at.books.received(begin("x", Query(prompt="Hi")), 1)
            at.books.sent(Delta("x", 0, 0, b""), 1)
            at.books.traces.moved("x", 1, 0.0, math.nan)
            found = (await browser.get("/costeer/answers/x")).json()["tokens"][0]
            assert (found["plain"], found["personal"]) == (0.0, None)

    run(main())
