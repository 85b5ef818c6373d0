"""Every contact with a private part of vLLM, and nothing else.

    process     symbol wrapped                                     why
    all         EngineArgs.create_engine_config                    the short name "costeer"; checks; start of the hub
    front end   OpenAIServingModels.__init__                       MODEL+costeer is listed and accepted
    front end   OnlineRenderer.preprocess_chat, .preprocess_cmpl   admission (HTTP 400 before a stream starts); cache_salt
    front end   {ChatCompletion,Completion,Responses}Request
                .to_sampling_params                                what was admitted goes into extra_args
    front end   RequestLogger.log_request_body                     a steering key stands in no log
    front end   AsyncLLM.generate                                  a request that must fail ends with our sentence
    engine      Scheduler, AsyncScheduler (scheduler.py)           who is left out of a step, and whose token is dropped
    worker, V1  GPUModelRunner._sample                             which rows are chunks of an unfinished prefill
    worker, V2  GPUModelRunner.sample                              a token that is taken back was not sampled
    worker, V2  RequestState.add_request, .remove_request          who sits in which slot, and when they leave

A symbol that is gone or has lost a parameter we use stops a server that names costeer at start, with a sentence. A server that
does not name it is served as if this package were not there, except that a request with ``costeer`` is refused.
"""

import contextlib
import functools
import importlib
import inspect
import logging
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from costeer_vllm.errors import CoSteerError, InvalidParameter, Unsupported

logger = logging.getLogger("vllm.costeer")  # below vLLM's own logger: its handlers, its level

NAME = "costeer"
PROCESSOR = "costeer_vllm.engine.processor:CoSteerLogitsProcessor"
SCHEDULERS = {
    False: "costeer_vllm.engine.scheduler.HoldingScheduler",
    True: "costeer_vllm.engine.scheduler.HoldingAsyncScheduler",
}  # by whether scheduling is asynchronous
ALIAS_SUFFIX = "+costeer"

_state = {"installed": False, "named": False}
_problems: list[str] = []


def install() -> None:
    """vLLM's general plugin: runs once in every process that vLLM starts. Opens nothing and starts nothing."""
    if not _state["installed"]:
        _state["installed"] = True
        _wrap("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", [], _create_engine_config)


def watch_request_states() -> None:
    """Let ``Slots`` know who arrives and who leaves; called by the worker that builds the processor for Model Runner V2."""
    parameters = ["req_id", "prompt_len", "all_token_ids"]
    _wrap("vllm.v1.worker.gpu.states", "RequestState", "add_request", parameters, _add_request)
    _wrap("vllm.v1.worker.gpu.states", "RequestState", "remove_request", ["req_id"], _remove_request)
    _wrap("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "sample", ["input_batch"], _sample_v2)
    _raise_problems()


def watch_prefill_chunks() -> None:
    """Let the processor know which rows choose no token; called by the worker that builds it for runner V1."""
    _wrap("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_sample", ["logits"], _sample)
    _raise_problems()


def _wrap(module: str, owner: str, name: str, parameters: Sequence[str], wrapper: Callable[..., Any]) -> None:
    """Replace ``module.owner.name`` by ``wrapper(original, *args)``, once; record a problem if it is not as expected."""
    try:
        cls = getattr(importlib.import_module(module), owner)
        original = getattr(cls, name)
    except (ImportError, AttributeError):
        _problems.append(f"{module}.{owner}.{name} is gone")
        return
    if getattr(original, "wrapped_by_costeer", False):
        return
    missing = [parameter for parameter in parameters if parameter not in inspect.signature(original).parameters]
    if missing:
        _problems.append(f"{module}.{owner}.{name} has no parameter {', '.join(missing)}")
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.wrapped_by_costeer = True  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def _raise_problems() -> None:
    if _problems:
        import vllm

        raise Unsupported(
            f"costeer: vLLM {vllm.__version__} differs from the versions that were run ({'; '.join(_problems)}); "
            "docs/compatibility.md lists those: install one of them, or a newer costeer-vllm"
        )


# All processes


def _create_engine_config(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    processors, named = _resolve(args.logits_processors)
    if named:
        args.logits_processors = processors
    config = original(args, *rest, **kwargs)
    _install_front_end()
    if named:
        _raise_problems()
        _check_supported(config)
        _check_scheduler()
        config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
        if kwargs.get("headless") and not os.environ.get("COSTEER_HUB"):
            raise Unsupported("costeer: a headless node needs COSTEER_HUB: the hub runs where the front end is")
        from costeer_vllm.engine import board, settings
        from costeer_vllm.engine.hub_process import ensure_hub

        logger.info("the hub's engine endpoint is %s", ensure_hub())
        os.environ[settings.BOARD] = str(board.new_path())
        _state["named"] = True
    return config


def _resolve(processors: Sequence[Any] | None) -> tuple[list[Any], bool]:
    """The list with ``costeer`` in its full form, once, and whether it was in it."""
    resolved: list[Any] = []
    named = False
    for processor in processors or ():
        is_ours = processor in (NAME, PROCESSOR) or getattr(processor, "__name__", "") == PROCESSOR.partition(":")[2]
        if not (is_ours and named):
            resolved.append(PROCESSOR if is_ours else processor)
        named |= is_ours
    return resolved, named


def _check_supported(config: Any) -> None:
    parallel = config.parallel_config
    executor = getattr(parallel, "distributed_executor_backend", None)
    refusals = {
        "speculative decoding": config.speculative_config is not None,
        "a pooling model": config.model_config.runner_type == "pooling",
        "a diffusion model": getattr(config.model_config, "is_diffusion", False),
        "a model with a state beside its KV cache": getattr(config.model_config, "has_inner_state", False),
        "batch-sharded sampling": getattr(parallel, "enable_batch_sharded_sampling", False),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a scheduler in every rank (external_launcher)": executor == "external_launcher",
        "Ray": "ray" in (executor, getattr(parallel, "data_parallel_backend", None)),
        "a scheduler of one's own (--scheduler-cls)": config.scheduler_config.scheduler_cls not in (None, *SCHEDULERS.values()),
        "the Rust front end (VLLM_USE_RUST_FRONTEND)": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    for what, is_on in refusals.items():
        if is_on:
            raise Unsupported(f"costeer: {what} cannot be steered yet; switch it off, or leave out --logits-processor costeer")


def _check_scheduler() -> None:
    """What scheduler.py reaches into, beyond vLLM's SchedulerInterface."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    used = {"next_decode_eligible_step", "num_output_placeholders", "num_computed_tokens", "num_in_flight_tokens", "resumable",
            "num_stale_output_tokens"}  # fmt: skip
    gone = sorted(used - set(Request.__init__.__code__.co_names))
    gone += [name for name in ("_free_request", "finish_requests", "update_from_output") if not hasattr(Scheduler, name)]
    if "next_decode_eligible_step" not in Scheduler.schedule.__code__.co_names:
        gone.append("a decode that can be put off")
    if gone:
        _problems.append(f"vllm.v1.core.sched.scheduler.Scheduler has no {', '.join(gone)}")
        _raise_problems()


# Front end


def _install_front_end() -> None:
    openai = "vllm.entrypoints.openai"
    renderer = "vllm.renderers.online_renderer"
    _wrap(f"{openai}.models.serving", "OpenAIServingModels", "__init__", ["base_model_paths"], _serving_models)
    _wrap(renderer, "OnlineRenderer", "preprocess_chat", ["request"], _preprocess_chat)
    _wrap(renderer, "OnlineRenderer", "preprocess_cmpl", ["request", "prompts"], _preprocess_cmpl)
    for route, owner in (("chat_completion", "ChatCompletionRequest"), ("completion", "CompletionRequest"),
                         ("responses", "ResponsesRequest")):  # fmt: skip
        _wrap(f"{openai}.{route}.protocol", owner, "to_sampling_params", [], _to_sampling_params)
    _wrap("vllm.entrypoints.serve.utils.request_logger", "RequestLogger", "log_request_body", ["request"], _log_request_body)
    _wrap("vllm.v1.engine.async_llm", "AsyncLLM", "generate", ["sampling_params"], _generate)


class Granted(list[dict[str, Any]]):
    """What admission put in the place of the client's ``costeer`` object: one steering request per prompt, in order."""


def _serving_models(original: Callable[..., None], models: Any, *args: Any, **kwargs: Any) -> None:
    original(models, *args, **kwargs)
    if _state["named"]:
        paths = models.base_model_paths
        for path in list(paths):
            if not path.name.endswith(ALIAS_SUFFIX):
                paths.append(type(path)(name=path.name + ALIAS_SUFFIX, model_path=path.model_path))


def _asks(request: Any) -> bool:
    if not hasattr(request, "to_sampling_params"):  # such as /tokenize, which nobody steers
        return False
    extra = getattr(request, "model_extra", None) or {}
    model = getattr(request, "model", None)
    return extra.get(NAME) is not None or (_state["named"] and isinstance(model, str) and model.endswith(ALIAS_SUFFIX))


async def _preprocess_chat(original: Callable[..., Any], renderer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    if not _asks(request) or isinstance(request.model_extra.get(NAME), Granted):
        return await original(renderer, request, *args, **kwargs)
    from costeer_vllm.engine.admission import chat_query

    with _as_bad_request():
        permission = await _permission(renderer, request)
    conversation, engine_inputs = await original(renderer, request, *args, **kwargs)
    with _as_bad_request():
        query = chat_query(conversation, bool(getattr(request, "continue_final_message", False)))
        request.model_extra[NAME] = Granted([permission.steer(_request_id(request), query)])
    return conversation, engine_inputs


async def _preprocess_cmpl(
    original: Callable[..., Any], renderer: Any, request: Any, prompts: Any, *args: Any, **kwargs: Any
) -> Any:
    if _asks(request) and not isinstance(request.model_extra.get(NAME), Granted):
        from costeer_vllm.engine.admission import prompt_query

        with _as_bad_request():
            permission = await _permission(renderer, request)
            request_id = _request_id(request)
            request.model_extra[NAME] = Granted(permission.steer(request_id, prompt_query(prompt)) for prompt in prompts)
    return await original(renderer, request, prompts, *args, **kwargs)


async def _permission(renderer: Any, request: Any) -> Any:
    from costeer_vllm.engine.admission import ask_permission
    from costeer_vllm.request import parse_options

    if not _state["named"]:
        raise Unsupported("costeer: this server was started without --logits-processor costeer, so it cannot steer")
    if getattr(request, "use_beam_search", False):
        raise InvalidParameter("use_beam_search", True, "false for a steered request")
    if any(getattr(tool, "type", "function") != "function" for tool in getattr(request, "tools", None) or ()):
        raise InvalidParameter("tools", "a built-in tool", "functions only for a steered request")
    options = parse_options(request.model_extra.get(NAME))
    permission = await ask_permission(options, getattr(request, "user", None), _vocabulary(renderer.renderer))
    if getattr(request, "cache_salt", None) is None:
        request.cache_salt = permission.cache_salt()
    return permission


def _vocabulary(renderer: Any) -> Any:
    """The fingerprint of the served model's vocabulary, computed once per renderer."""
    if not hasattr(renderer, "costeer_vocabulary"):
        from costeer_vllm.vocab import fingerprint

        renderer.costeer_vocabulary = fingerprint(renderer.get_tokenizer().get_vocab())
    return renderer.costeer_vocabulary


def _to_sampling_params(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    params = original(request, *args, **kwargs)
    with _as_bad_request():
        if NAME in (params.extra_args or {}):
            raise InvalidParameter("extra_args.costeer", "a client's", "left out: costeer is a field of the request itself")
        if not _asks(request):
            return params
        granted = request.model_extra.get(NAME)
        if not isinstance(granted, Granted) or not granted:
            raise Unsupported("costeer: a request of this kind cannot be steered by this route and model")
        params.extra_args = {**(params.extra_args or {}), NAME: granted.pop(0) if len(granted) > 1 else granted[0]}
    return params


def _request_id(request: Any) -> str:
    """The id that the response will carry, unless the client's X-Request-Id header sets another."""
    prefix = {"ChatCompletionRequest": "chatcmpl-", "CompletionRequest": "cmpl-"}.get(type(request).__name__, "")
    return f"{prefix}{request.request_id}"


def _log_request_body(original: Callable[..., None], request_logger: Any, request: Any) -> None:
    extra = getattr(request, "model_extra", None) or {}
    if extra.get(NAME) is not None:
        request = request.model_copy()
        request.__pydantic_extra__ = {**extra, NAME: _without_key(extra[NAME])}
    original(request_logger, request)


def _without_key(body: object) -> object:
    """What may be logged of a ``costeer`` object, also of one that is wrong: the key may stand in the wrong place."""
    if not isinstance(body, dict):
        return f"of type {type(body).__name__}"
    return {field: "***" if field == "key" or isinstance(value, (dict, list)) else value for field, value in body.items()}


def _generate(original: Callable[..., Any], llm: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
    outputs = original(llm, prompt, sampling_params, *args, **kwargs)
    return _with_failures(outputs) if NAME in (getattr(sampling_params, "extra_args", None) or {}) else outputs


async def _with_failures(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Raise why a request was ended: HTTP 503, or an error event in a stream."""
    async with contextlib.aclosing(outputs):  # so that a client that leaves aborts its request at once
        async for output in outputs:
            for choice in output.outputs:
                if (sentence := _failure(choice)) is not None:
                    from vllm.exceptions import RetryableRequestError

                    raise RetryableRequestError(sentence)
            yield output


def _failure(choice: Any) -> str | None:
    """The scheduler's sentence; or that vLLM gave the request up, which some routes would give out as a finished answer."""
    if choice.finish_reason == "abort":
        return f"{NAME}: this request was aborted: by its id, or since the server is ending or paused"
    reason = str(choice.stop_reason)
    return reason if choice.finish_reason == "error" and reason.startswith(f"{NAME}: ") else None


class _as_bad_request:
    """Our errors inside become vLLM's validation error: HTTP 400 on every route, also for ``stream: true``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CoSteerError):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter=NAME) from None


# Worker, runner V1


def _sample(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        batch = runner.input_batch
        is_unfinished = runner.discard_request_mask.np[: batch.num_reqs]
        ours = [processor for processor in batch.logitsprocs.non_argmax_invariant if getattr(processor, "steered_rows", ())]
        for processor in ours:
            processor.unfinished_rows = frozenset(is_unfinished.nonzero()[0].tolist())
        seeded = {row for processor in ours for row in processor.steered_rows} & batch.generators.keys()
        drawn_by = {row: (batch.generators[row], batch.generators[row].get_state()) for row in seeded}
    except Exception:  # which would end the engine
        logger.exception("runner V1 is not as it was: chunks of prefills are waited for, and seeds may not hold")
        ours, drawn_by = [], {}
    sampled = original(runner, *args, **kwargs)
    for row in frozenset().union(*(processor.taken_back_rows for processor in ours)) & drawn_by.keys():
        generator, state = drawn_by[row]  # the token will be drawn again
        generator.set_state(state)
    return sampled


# Worker, Model Runner V2


def _sample_v2(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    output, num_sampled, num_rejected = original(runner, *args, **kwargs)
    slots = getattr(runner.req_states.all_token_ids, "costeer_slots", None)
    if slots is not None and slots.taken_back:
        rows = slots.take_taken_back(num_sampled.device)
        # As of a rejected draft: nothing was sampled, and the last position is computed again.
        num_sampled, num_rejected = num_sampled.index_fill(0, rows, 0), num_rejected.index_fill(0, rows, 1)
        output.num_sampled, output.num_rejected = num_sampled, num_rejected
    return output, num_sampled, num_rejected


def _add_request(original: Callable[..., None], states: Any, req_id: str, prompt_len: int, all_token_ids: list[int],
                 *args: Any, **kwargs: Any) -> None:  # fmt: skip
    original(states, req_id, prompt_len, all_token_ids, *args, **kwargs)
    slots = getattr(states.all_token_ids, "costeer_slots", None)
    if slots is not None:
        slots.arrive(states.req_id_to_index[req_id], all_token_ids[prompt_len:])


def _remove_request(original: Callable[..., int | None], states: Any, req_id: str) -> int | None:
    slot = original(states, req_id)
    slots = getattr(states.all_token_ids, "costeer_slots", None)
    if slots is not None and slot is not None:
        slots.vacate(slot)
    return slot
