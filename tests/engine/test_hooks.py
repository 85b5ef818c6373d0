"""The patches of vLLM as far as they run without a server: what they recognise, refuse, hide, and how they fail."""

import asyncio
import os
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import RetryableRequestError
from vllm.sampling_params import SamplingParams

from costeer_vllm.engine import hooks
from costeer_vllm.engine.hooks import PROCESSOR, Granted, _check_supported, _generate, _log_request_body, _resolve
from costeer_vllm.engine.processor import CoSteerLogitsProcessor
from costeer_vllm.errors import Unsupported

KEY = "open-sesame-4711"


@pytest.mark.parametrize(
    ("processors", "resolved", "named"),
    [
        (None, [], False),
        ([], [], False),
        (["other:Processor"], ["other:Processor"], False),
        (["costeer"], [PROCESSOR], True),
        ([PROCESSOR], [PROCESSOR], True),
        ([CoSteerLogitsProcessor], [PROCESSOR], True),
        (["costeer", PROCESSOR, CoSteerLogitsProcessor, "costeer"], [PROCESSOR], True),  # built twice it would steer twice
        (["a:B", "costeer", "c:D"], ["a:B", PROCESSOR, "c:D"], True),
    ],
)
def test_the_short_name_stands_for_one_processor(processors: Any, resolved: list[Any], named: bool) -> None:
    assert _resolve(processors) == (resolved, named)


def vllm_config(**changes: Any) -> Any:
    usual = {"speculative": None, "runner": "generate", "pipeline": 1, "sharded": False, "scheduler": None, "state": False,
             "launcher": "mp"}  # fmt: skip
    values: dict[str, Any] = {**usual, **changes}
    return SimpleNamespace(
        speculative_config=values["speculative"],
        model_config=SimpleNamespace(runner_type=values["runner"], has_inner_state=values["state"]),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=values["pipeline"],
            enable_batch_sharded_sampling=values["sharded"],
            distributed_executor_backend=values["launcher"],
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=values["scheduler"]),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative": object()}, "speculative decoding"),
        ({"runner": "pooling"}, "a pooling model"),
        ({"pipeline": 2}, "pipeline parallelism"),
        ({"state": True}, "a model with a state beside its KV cache"),
        ({"sharded": True}, "batch-sharded sampling"),
        ({"launcher": "ray"}, "Ray"),
        ({"launcher": "external_launcher"}, r"a scheduler in every rank \(external_launcher\)"),
        ({"scheduler": "my.own.Scheduler"}, r"a scheduler of one's own \(--scheduler-cls\)"),
    ],
)
def test_what_cannot_be_steered_is_refused_at_start(changes: dict[str, Any], words: str) -> None:
    _check_supported(vllm_config())
    with pytest.raises(Unsupported, match=f"{words} cannot be steered yet"):
        _check_supported(vllm_config(**changes))


def test_the_rust_front_end_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setitem(os.environ, "VLLM_USE_RUST_FRONTEND", value)
        _check_supported(vllm_config())
    monkeypatch.setitem(os.environ, "VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(Unsupported, match="Rust front end"):
        _check_supported(vllm_config())


def chat(costeer: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [], "model": "m", "costeer": costeer})


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "sentence"),
    [
        ("error", "costeer: edge worker 'laptop', token 3: it is gone", "costeer: edge worker 'laptop', token 3: it is gone"),
        ("abort", None, "costeer: this request was aborted"),
        ("stop", "costeer: a stop string of one's own", None),
        ("error", "another's", None),
        (None, None, None),
    ],
)
def test_what_ends_a_steered_request_early_is_raised(finish_reason: Any, stop_reason: Any, sentence: str | None) -> None:
    """Before any route makes of it what it can: of a tool call that was whole already, a finished answer."""
    output = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="stop", stop_reason=None),
                                      SimpleNamespace(finish_reason=finish_reason, stop_reason=stop_reason)])  # fmt: skip

    async def outputs(*args: Any) -> AsyncGenerator[Any, None]:
        yield output

    async def main(params: SamplingParams) -> list[Any]:
        return [one async for one in _generate(outputs, None, "Hello?", params)]

    steered = SamplingParams(extra_args={"costeer": {}})
    if sentence is None:
        assert asyncio.run(main(steered)) == [output]
    else:
        with pytest.raises(RetryableRequestError, match=sentence):
            asyncio.run(main(steered))
    assert asyncio.run(main(SamplingParams())) == [output]


@pytest.mark.parametrize(
    "costeer",
    [
        {"worker": "laptop", "key": KEY},
        {"worker": {"key": KEY}},
        {"strength": [KEY]},
        KEY,
        [KEY],
        {"key": [KEY], "T": 3},
        Granted([{"grant": KEY}]),
    ],
)
def test_a_logged_body_shows_no_key(costeer: Any) -> None:
    logged: list[str] = []
    request = chat(costeer)
    _log_request_body(lambda _, shown: logged.append(shown.model_dump_json()), object(), request)
    assert KEY not in logged[0]
    assert request.model_extra == {"costeer": costeer}  # which is still to be read


def test_a_logged_body_shows_all_else() -> None:
    logged: list[Any] = []
    _log_request_body(lambda _, shown: logged.append(shown), object(), chat({"worker": "laptop", "key": KEY, "beta": 0.5}))
    assert logged[0].model_extra == {"costeer": {"worker": "laptop", "key": "***", "beta": 0.5}}
    plain = ChatCompletionRequest.model_validate({"messages": [], "model": "m"})
    _log_request_body(lambda _, shown: logged.append(shown), object(), plain)
    assert logged[1] is plain


class Theirs:
    """A class of vLLM, as far as wrapping goes."""

    def method(self, one: int, two: int = 2) -> int:
        return one + two


def test_a_symbol_is_wrapped_once_and_called_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_problems", [])
    monkeypatch.setattr(Theirs, "method", Theirs.method)
    for _ in range(2):
        hooks._wrap(__name__, "Theirs", "method", ["one", "two"], lambda original, *args, **kwargs: -original(*args, **kwargs))
    assert Theirs().method(1) == -3
    assert Theirs().method(one=1, two=1) == -2
    assert Theirs.method.__name__ == "method"
    assert hooks._problems == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (("no.such.module", "Theirs", "method"), "no.such.module.Theirs.method is gone"),
        ((__name__, "Nobody", "method"), "Nobody.method is gone"),
        ((__name__, "Theirs", "nothing"), "Theirs.nothing is gone"),
        ((__name__, "Theirs", "method", "three"), "Theirs.method has no parameter three"),
    ],
)
def test_a_symbol_that_is_not_as_it_was_is_told(monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...], words: str) -> None:
    monkeypatch.setattr(hooks, "_problems", [])
    before = Theirs.method
    hooks._wrap(*where[:3], [*where[3:], "one"], lambda original: None)
    assert Theirs.method is before
    with pytest.raises(Unsupported, match=words):
        hooks._raise_problems()


def test_every_symbol_that_is_wrapped_is_in_this_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same look at vLLM that a server takes at its start, without leaving the patches behind."""
    found: list[str] = []

    def look(module: str, owner: str, name: str, parameters: list[str], wrapper: Any) -> None:
        found.append(name)
        real(module, owner, name, [*parameters, "no such parameter"], wrapper)

    real = hooks._wrap
    problems: list[str] = []
    monkeypatch.setattr(hooks, "_problems", problems)
    monkeypatch.setattr(hooks, "_wrap", look)
    monkeypatch.setattr(hooks, "_state", {"installed": False, "named": False})
    hooks.install()
    hooks._install_front_end()
    with pytest.raises(Unsupported):
        hooks.watch_request_states()
    assert len(problems) == len(found) == 12
    assert all(problem.endswith("has no parameter no such parameter") for problem in problems), problems
