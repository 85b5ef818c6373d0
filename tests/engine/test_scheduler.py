"""The scheduler's addition on vLLM's own scheduler, sync and async; the board and the sampled tokens are written by hand."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import FinishReason, Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from costeer_vllm.demo.export import export
from costeer_vllm.engine import settings
from costeer_vllm.engine.board import ROWS, Board, State, open_board
from costeer_vllm.engine.pace import MIN_GRACE_S
from costeer_vllm.engine.scheduler import SESSION, UNKNOWN, HoldingAsyncScheduler, HoldingScheduler
from costeer_vllm.errors import Unsupported
from costeer_vllm.protocol.messages import Query
from costeer_vllm.request import SteeringRequest, to_extra_args

BLOCK = 16
STEP_S = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("pair")) / "large"


@dataclass
class Engine:
    """A scheduler, and what the worker would do."""

    scheduler: Any
    board: Board
    is_v2: bool
    ended: dict[str, Any] = field(default_factory=dict)  # request id -> (reason, stop_reason)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, fusion: str | None = "cloud", max_tokens: int = 50, resumable: bool = False) -> Request:
        """A request that is steered, unless ``fusion`` is None."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        if fusion is not None:
            asked = SteeringRequest(name, "laptop", Query(prompt="Hello?"), 1.0, fusion=fusion)
            params.extra_args = {"costeer": to_extra_args(asked)}
        request = Request(name, [1, 2, 3], params, None, resumable=resumable)
        self.scheduler.add_request(request)
        self.tokens[name] = []
        return request

    def ticket(self, request: Request) -> int:
        return int(request.sampling_params.extra_args["costeer"]["ticket"])

    def write(self, request: Request, position: int, state: State, asked_s_ago: float = 0.0, answer_s: float = 0.0) -> None:
        self.board.write(self.ticket(request), position, state, time.monotonic() - asked_s_ago, answer_s)

    def settle(self, *requests: Request) -> None:
        """The answers that these requests need next are there."""
        for request in requests:
            self.write(request, request.num_output_tokens + request.num_output_placeholders, State.SETTLED)

    def schedule(self) -> SchedulerOutput:
        return self.scheduler.schedule()

    def finish(self, step: SchedulerOutput, token: int = 7, without: tuple[str, ...] = (), is_seen: bool = True) -> None:
        """The step's result: ``token`` for every row, none for those in ``without`` (Model Runner V2).

        ``is_seen``: the processor has begun to steer those who are to be steered, as it does before their first token.
        """
        names = list(step.num_scheduled_tokens)
        for steered in self.scheduler._steered.values() if is_seen else ():
            if self.board.rows["ticket"][steered.ticket % ROWS] != steered.ticket:
                self.board.write(steered.ticket, 0, State.UNASKED)
        sampled = [[] if name in without else [token] for name in names]
        output = EMPTY_MODEL_RUNNER_OUTPUT
        if names:
            rows = {name: i for i, name in enumerate(names)}
            output = ModelRunnerOutput(req_ids=names, req_id_to_index=rows, sampled_token_ids=sampled)
        for outputs in self.scheduler.update_from_output(step, output).values():
            for one in outputs.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.ended[one.request_id] = one.finish_reason, one.stop_reason

    def take_back(self, request: Request, position: int) -> tuple[str, ...]:
        """The worker asks for a token back; whose row Model Runner V2 then leaves empty."""
        self.board.take_back(self.ticket(request), position)
        return (request.request_id,) if self.is_v2 else ()

    def step(self, *without: str) -> list[str]:
        step = self.schedule()
        self.finish(step, without=without)
        return list(step.num_scheduled_tokens)


def make(model: Path, kind: type, is_async: bool, is_v2: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    monkeypatch.setenv(settings.BOARD, str(tmp_path / "board"))
    limits = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=256, is_encoder_decoder=False, async_scheduling=is_async
    )
    config = VllmConfig(
        model_config=ModelConfig(str(model), dtype="float32", max_model_len=256),
        scheduler_config=limits,
        cache_config=CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.3, enable_prefix_caching=False),
    )
    limits.async_scheduling = is_async  # the CPU platform switches it off
    config.cache_config.num_gpu_blocks = 100
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    board = open_board(config)
    assert board is not None
    scheduler = kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=False,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    scheduler.use_v2_model_runner = is_v2
    board.step_s = STEP_S
    return Engine(scheduler, board, is_v2)


@pytest.fixture(params=["v1", "v2"])
def engine(request: Any, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return make(model, HoldingScheduler, False, request.param == "v2", monkeypatch, tmp_path)


@pytest.fixture(params=["v1", "v2"])
def async_engine(request: Any, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return make(model, HoldingAsyncScheduler, True, request.param == "v2", monkeypatch, tmp_path)


def test_a_ticket_lasts_as_long_as_its_request(engine: Engine) -> None:
    request, plain = engine.add("a", max_tokens=2), engine.add("plain", None)
    ticket = engine.ticket(request)
    assert engine.board.is_live(ticket)
    assert plain.sampling_params.extra_args is None
    engine.step()
    engine.settle(request)
    engine.step()
    assert engine.ended["a"][0] == FinishReason.LENGTH
    assert not engine.board.is_live(ticket)
    aborted = engine.add("b")
    engine.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    assert not engine.board.is_live(engine.ticket(aborted))


def test_children_of_one_request_have_tickets_of_their_own(engine: Engine) -> None:
    first, second = engine.add("0_a"), engine.add("1_a")
    assert engine.ticket(first) != engine.ticket(second)


def test_a_request_whose_answer_is_not_there_is_left_out_and_the_others_go_on(engine: Engine) -> None:
    slow, plain = engine.add("slow"), engine.add("plain", None)
    assert engine.step() == ["slow", "plain"]
    engine.write(slow, 1, State.ASKED, 0.0, 0.5)
    assert engine.step() == ["plain"]
    assert engine.step() == ["plain"]
    engine.write(slow, 1, State.ASKED, 0.46, 0.5)  # it is about to come, and the step takes longer than that
    assert set(engine.step()) == {"slow", "plain"}
    engine.write(slow, 2, State.ASKED, 0.6, 0.5)  # it should have come: who knows when it does
    assert engine.step() == ["plain"]
    engine.settle(slow)
    assert set(engine.step()) == {"slow", "plain"}
    assert len(engine.tokens["slow"]) == 3
    assert len(engine.tokens["plain"]) == 6
    assert plain.num_output_tokens == 6


def test_a_fast_edge_worker_is_not_waited_for_before_the_step(engine: Engine) -> None:
    fast = engine.add("fast")
    engine.add("plain", None)
    engine.step()
    engine.write(fast, 0, State.SETTLED, 0.0, STEP_S / 2)  # not asked yet: that happens in the step
    assert set(engine.step()) == {"fast", "plain"}
    engine.write(fast, 2, State.ASKED, 0.0, STEP_S + MIN_GRACE_S)
    assert set(engine.step()) == {"fast", "plain"}


def test_where_all_are_slow_the_step_starts_for_the_first_of_them(engine: Engine) -> None:
    first, second = engine.add("first"), engine.add("second")
    engine.step()
    engine.write(first, 1, State.ASKED, 0.0, STEP_S + 0.1)
    engine.write(second, 1, State.ASKED, 0.0, STEP_S + 0.5)
    assert engine.step() == ["first"]


def test_all_held_at_once_is_an_empty_step_and_nothing_is_lost(engine: Engine) -> None:
    requests = [engine.add(f"r{i}") for i in range(8)]
    engine.step()
    for request in requests:
        engine.write(request, 1, State.ASKED, 1.0, 0.5)
    for _ in range(5):
        assert engine.step() == []
    assert engine.scheduler.has_requests()
    engine.settle(*requests)
    assert len(engine.step()) == 8


def test_an_edge_fused_request_is_scheduled_to_be_asked(engine: Engine) -> None:
    request = engine.add("edge", "edge")
    engine.add("plain", None)
    engine.step()
    engine.write(request, 1, State.UNASKED, 0.0, 0.5)
    assert set(engine.step(*engine.take_back(request, 1))) == {"edge", "plain"}
    engine.write(request, 1, State.ASKED, 0.0, 0.5)
    assert engine.step() == ["plain"]
    engine.settle(request)
    engine.board.take_back(engine.ticket(request), -1)
    assert set(engine.step()) == {"edge", "plain"}
    assert len(engine.tokens["edge"]) == 2


def test_a_token_that_is_taken_back_is_chosen_again(engine: Engine) -> None:
    request, plain = engine.add("a"), engine.add("plain", None)
    computed = []
    for position, vain in ((0, 1), (1, 2), (2, 0)):
        for _ in range(vain):
            engine.settle(request)
            step = engine.schedule()
            engine.finish(step, token=99, without=engine.take_back(request, position))
            assert request.num_output_tokens == position
            engine.write(request, position, State.ASKED, 1.0, 0.5)
            assert engine.step() == ["plain"]
        engine.settle(request)
        engine.board.take_back(engine.ticket(request), -1)
        engine.finish(engine.schedule(), token=position)
        computed.append(request.num_computed_tokens)
    assert engine.tokens["a"] == [0, 1, 2]
    assert computed == [3, 4, 5]
    assert plain.num_output_tokens > 6


def test_a_request_that_must_fail_ends_with_the_sentence_and_without_a_token(engine: Engine) -> None:
    request = engine.add("a")
    engine.add("plain", None)
    engine.step()
    engine.settle(request)
    step = engine.schedule()
    engine.board.fail(engine.ticket(request), "costeer: edge worker 'laptop', token 1: it is gone")
    engine.finish(step)
    assert engine.ended == {"a": (FinishReason.ERROR, "costeer: edge worker 'laptop', token 1: it is gone")}
    assert engine.tokens["a"] == [7]
    assert engine.step() == ["plain"]


def test_a_request_that_is_held_can_fail(engine: Engine) -> None:
    request = engine.add("a")
    engine.step()
    engine.write(request, 1, State.ASKED, 1.0, 0.5)
    assert engine.step() == []
    engine.board.fail(engine.ticket(request), "costeer: no")
    assert engine.step() == []
    assert engine.ended["a"] == (FinishReason.ERROR, "costeer: no")
    assert not engine.scheduler.has_unfinished_requests()


def test_a_held_request_can_be_aborted(engine: Engine) -> None:
    request = engine.add("a")
    engine.step()
    engine.write(request, 1, State.ASKED, 1.0, 0.5)
    engine.step()
    engine.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert not engine.board.is_live(engine.ticket(request))
    assert engine.step() == []


def test_a_request_that_the_processor_does_not_know_never_answers_plainly(engine: Engine) -> None:
    for fusion in ("cloud", "edge"):
        engine.add(fusion, fusion, max_tokens=1)
    engine.add("plain", None)
    engine.finish(engine.schedule(), is_seen=False)
    assert engine.ended == dict.fromkeys(("cloud", "edge"), (FinishReason.ERROR, UNKNOWN))
    assert engine.tokens == {"cloud": [], "edge": [], "plain": [7]}
    assert engine.step() == ["plain"]


def test_what_stands_on_the_board_of_a_former_request_is_not_believed(engine: Engine) -> None:
    former = engine.add("former")
    engine.board.fail(engine.ticket(former), "costeer: former")
    engine.scheduler.finish_requests("former", RequestStatus.FINISHED_ABORTED)
    request = engine.add("a")
    assert engine.ticket(request) % ROWS == engine.ticket(former) % ROWS
    assert engine.step() == ["a"]
    assert engine.ended == {}
    assert engine.step() == ["a"]


def test_without_a_steered_request_nothing_is_looked_at(engine: Engine) -> None:
    engine.add("plain", None)
    for _ in range(3):
        assert engine.step() == ["plain"]
    assert engine.scheduler._sampling == {}


# Async scheduling: a step is scheduled before the result of the former one is known


@pytest.mark.parametrize("async_engine", ["v2"], indirect=True)  # V1 asks in the course of the step, and takes back
def test_async_a_slow_request_keeps_out_of_the_others_way(async_engine: Engine) -> None:
    engine = async_engine
    slow = engine.add("slow")
    engine.add("plain", None)
    steps = [engine.schedule(), engine.schedule()]
    scheduled = []
    for _ in range(12):
        engine.finish(steps.pop(0))
        is_known = slow.num_output_placeholders == 0
        engine.write(slow, slow.num_output_tokens, State.ASKED if is_known else State.SETTLED, 1.0, 0.5)
        steps.append(engine.schedule())
        scheduled.append("slow" in steps[-1].num_scheduled_tokens)
    assert not any(scheduled[3:])
    engine.settle(slow)
    steps.append(engine.schedule())
    assert "slow" in steps[-1].num_scheduled_tokens
    before = len(engine.tokens["slow"])
    for step in steps:
        engine.finish(step, token=8)
    assert engine.tokens["slow"][before:] == [8]
    assert slow.num_output_placeholders == 0


def test_async_a_token_that_is_taken_back_is_chosen_again(async_engine: Engine) -> None:
    """Runner V1 has fed the dropped token to the step in flight: what comes of that is dropped too. V2 tries once more."""
    engine = async_engine
    request = engine.add("a")
    first, second = engine.schedule(), engine.schedule()
    engine.finish(first, token=0)
    engine.finish(second, token=98, without=engine.take_back(request, 1))
    engine.board.take_back(engine.ticket(request), -1)
    engine.settle(request)
    steps = [engine.schedule(), engine.schedule(), engine.schedule()]
    for token, step in enumerate(steps, 1):
        if step.num_scheduled_tokens:
            engine.finish(step, token=token)
    assert engine.tokens["a"][0] == 0
    assert not {98, 99} & set(engine.tokens["a"])
    assert request.num_computed_tokens == request.num_tokens - 1 + request.num_output_placeholders
    assert request.num_output_placeholders >= 0


@pytest.mark.parametrize("async_engine", ["v2"], indirect=True)
@pytest.mark.parametrize("num_before", [0, 2])  # output tokens when the cache is filled: after a preemption there are some
def test_async_nothing_is_scheduled_behind_the_end_of_a_fill(async_engine: Engine, num_before: int) -> None:
    """If its token is taken back, a step behind it has a wrong input, and leaves wrong keys and values in the prompt's cache."""
    engine = async_engine
    request = engine.add("a")
    for _ in range(num_before):
        engine.step()
        engine.settle(request)
    if num_before:
        engine.scheduler.running.remove(request)
        engine.scheduler._preempt_request(request, 0.0)
    filled = request.num_tokens
    engine.write(request, num_before, State.SETTLED)
    for _ in range(3):
        step = engine.schedule()
        assert "a" in step.num_scheduled_tokens
        assert request.num_computed_tokens == filled
        assert "a" not in engine.schedule().num_scheduled_tokens
        engine.finish(step, without=engine.take_back(request, num_before))
    engine.finish(engine.schedule(), token=5)
    assert engine.tokens["a"][num_before:] == [5]
    engine.settle(request)
    assert engine.schedule().num_scheduled_tokens == engine.schedule().num_scheduled_tokens == {"a": 1}, (
        "the pipeline is full again"
    )


@pytest.mark.parametrize("async_engine", ["v1"], indirect=True)
@pytest.mark.parametrize("answer_s", [STEP_S + 0.1, 10.0])
def test_async_a_token_that_only_its_row_can_read_is_not_waited_for(async_engine: Engine, answer_s: float) -> None:
    """Runner V1 asks by a token once the row is in a step again; left out for its answer it would be left out for ever."""
    engine = async_engine
    request = engine.add("a")
    engine.add("plain", None)
    engine.step()
    engine.write(request, 0, State.SETTLED, 0.0, answer_s)
    assert (request.num_output_tokens, request.num_output_placeholders) == (1, 0)
    assert "a" in engine.step()


@pytest.mark.parametrize("async_engine", ["v1"], indirect=True)
def test_async_a_request_that_was_preempted_is_left_out_for_nothing_that_was_before(async_engine: Engine) -> None:
    engine = async_engine
    request = engine.add("a")
    engine.step()
    step = engine.schedule()
    engine.take_back(request, 1)
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.finish(step, token=99)
    engine.board.take_back(engine.ticket(request), -1)
    engine.settle(request)
    steps = [engine.schedule(), engine.schedule()]
    assert all("a" in step.num_scheduled_tokens for step in steps)


@pytest.mark.parametrize("async_engine", ["v2"], indirect=True)
@pytest.mark.parametrize("fusion", ["cloud", "edge"])
def test_async_a_step_in_flight_that_waits_is_not_followed_by_another(async_engine: Engine, fusion: str) -> None:
    """Else the pipeline never drains, and every step waits for an answer that is far off."""
    engine = async_engine
    request = engine.add("a", fusion)
    engine.add("plain", None)
    engine.finish(engine.schedule())
    engine.settle(request)
    steps = [engine.schedule()]
    engine.write(request, 1, State.ASKED, 0.0, 0.5)
    steps.append(engine.schedule())
    assert [list(step.num_scheduled_tokens) for step in steps] == [["a", "plain"], ["plain"]]


def test_an_answer_that_nobody_asks_for_is_not_waited_for_long(engine: Engine) -> None:
    request = engine.add("a")
    engine.add("plain", None)
    engine.step()
    engine.write(request, 0, State.SETTLED, 0.0, 10.0)
    found = ["a" in engine.step() for _ in range(8)]
    assert found[0] is False
    assert sum(found) == 2
    assert request.num_output_tokens == 3


def test_children_that_share_their_parameters_have_tickets_of_their_own(engine: Engine) -> None:
    """As in an engine within the client's process, for n > 1 without a seed."""
    params = SamplingParams(max_tokens=5)
    params.extra_args = {"costeer": to_extra_args(SteeringRequest("a", "laptop", Query(prompt="Hello?"), 1.0))}
    requests = [Request(name, [1, 2, 3], params, None) for name in ("0_a", "1_a")]
    for request in requests:
        engine.scheduler.add_request(request)
    assert len({engine.ticket(request) for request in requests}) == 2
    assert "ticket" not in params.extra_args["costeer"]


@pytest.mark.parametrize("async_engine", ["v1"], indirect=True)  # V2 repeats the position by itself
def test_async_garbage_of_a_step_in_flight_is_dropped(async_engine: Engine) -> None:
    engine = async_engine
    request = engine.add("a")
    first, second = engine.schedule(), engine.schedule()
    engine.finish(first, token=98, without=engine.take_back(request, 0))
    assert "a" not in engine.schedule().num_scheduled_tokens, "the runner must see it leave the batch"
    engine.finish(second, token=99)
    assert engine.tokens["a"] == []
    assert (request.num_computed_tokens, request.num_output_placeholders) == (2, 0)
    engine.settle(request)
    engine.board.take_back(engine.ticket(request), -1)
    engine.schedule()
    step = engine.schedule()
    assert step.num_scheduled_tokens == {"a": 1}
    engine.finish(step, token=5)
    assert engine.tokens["a"] == [5]


@pytest.mark.parametrize("async_engine", ["v1"], indirect=True)
@pytest.mark.parametrize("position", [0, 1])
def test_async_a_request_that_is_preempted_meanwhile_delivers_nothing_dropped(async_engine: Engine, position: int) -> None:
    """vLLM delivers what is in flight when a request is preempted: not what was taken back, nor what followed from it."""
    engine = async_engine
    request = engine.add("a")
    steps = [engine.schedule(), engine.schedule()]
    if position:
        engine.finish(steps.pop(0), token=0)
    else:
        engine.finish(steps.pop(0), token=98, without=engine.take_back(request, 0))
    engine.take_back(request, position)
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.finish(steps.pop(0), token=99)
    assert engine.tokens["a"] == [0] * position
    assert request.num_computed_tokens == request.num_output_placeholders == 0
    engine.settle(request)
    engine.board.take_back(engine.ticket(request), -1)
    for _ in range(3):  # runner V1 may have to see a step without it
        engine.finish(engine.schedule(), token=5)
    assert engine.tokens["a"][: position + 1] == [0] * position + [5]


def test_prompt_log_probabilities_of_a_dropped_token_do_not_end_the_engine(engine: Engine) -> None:
    request = engine.add("a")
    step = engine.schedule()
    without = engine.take_back(request, 0)
    sampled = [[] if without else [7]]
    output = ModelRunnerOutput(
        req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=sampled, prompt_logprobs_dict={"a": object()}
    )
    assert engine.scheduler.update_from_output(step, output) == {}
    assert request.num_output_tokens == 0


def test_where_there_is_no_ticket_left_a_request_fails_with_a_sentence(engine: Engine) -> None:
    while engine.scheduler._tickets.issue() is not None:
        pass
    engine.add("a")
    engine.step()
    reason, sentence = engine.ended["a"]
    assert (reason, "steered requests" in sentence) == (FinishReason.ERROR, True)
    assert engine.tokens["a"] == []


def test_a_session_whose_prompt_goes_on_fails_with_a_sentence(engine: Engine) -> None:
    engine.add("a", resumable=True)
    engine.step()
    assert engine.ended == {"a": (FinishReason.ERROR, SESSION)}
    assert engine.tokens["a"] == []


def test_without_a_board_there_is_no_engine(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("costeer_vllm.engine.scheduler.open_board", lambda config, reserve: None)
    with pytest.raises(Unsupported, match="COSTEER_BOARD is not set in the engine's process"):
        make(model, HoldingScheduler, False, False, monkeypatch, tmp_path)


def test_what_vllm_puts_back_by_itself_is_not_put_back_twice(engine: Engine) -> None:
    """A part of the cache could not be loaded (kv_load_failure_policy=recompute) in the step that is taken back."""
    request = engine.add("a")
    engine.step()
    engine.settle(request)
    lose_cache_and_take_back(engine, request, engine.schedule())
    assert request.num_computed_tokens == 0


def test_async_what_vllm_puts_back_by_itself_is_not_put_back_twice(async_engine: Engine) -> None:
    engine = async_engine
    request = engine.add("a")
    engine.step()
    steps = []
    for _ in range(2):
        engine.settle(request)
        steps.append(engine.schedule())
    lose_cache_and_take_back(engine, request, steps[0])
    assert request.num_computed_tokens == 0
    engine.finish(steps[1], without=("a",) if engine.is_v2 else ())
    assert request.num_computed_tokens == 0


def lose_cache_and_take_back(engine: Engine, request: Request, step: SchedulerOutput) -> None:
    sampled = [] if engine.take_back(request, request.num_output_tokens) else [7]
    lost = KVConnectorOutput(invalid_block_ids=set(engine.scheduler.kv_cache_manager.get_block_ids("a")[0]))
    output = ModelRunnerOutput(["a"], {"a": 0}, [sampled], kv_connector_output=lost)
    engine.scheduler.update_from_output(step, output)


def test_a_bug_in_what_we_add_leaves_the_engine_alive(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = engine.add("a")
    monkeypatch.setattr(engine.scheduler, "_wait", lambda steered: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "_fail", lambda sampling: 1 / 0)
    assert engine.step() == ["a"]
    assert engine.step() == ["a"]
    assert request.num_output_tokens == 2
