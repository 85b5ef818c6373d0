"""The hub as a process, with real uvicorn, WebSockets and ZeroMQ."""

import os
import signal
import socket
import stat
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from ends import (
    VOCABULARY,
    RunningHub,
    admit,
    advance,
    attach,
    begin,
    delta,
    edge,
    engine,
    eventually,
    running_hub,
    steer,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus

from costeer_vllm.errors import InvalidParameter
from costeer_vllm.hub.app import HubSettings
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Admitted, Delta, End, Join, Reattached, Refused, encode

KEY = "a-very-secret-attach-key"


def closed_with(end, code):
    """The reason with which the hub closes the connection, after ``code`` is checked."""
    with pytest.raises(ConnectionClosed) as closed:
        _read_on(end)
    assert closed.value.rcvd.code == code
    return closed.value.rcvd.reason


def _read_on(end):
    while True:
        end.receive_frame()


def _send_on(end, frame):
    while True:
        end.websocket.send(frame)


class TestStreams:
    def test_a_stream_from_begin_to_end_and_its_report(self, hub):
        with edge(hub) as worker, engine(hub) as server:
            worker.attach("alice")
            server.join()
            server.send(admit(7))
            assert server.receive() == Admitted(7, "alice", False)
            steer(worker, server, "req-1.a", request="req-1")
            steer(worker, server, "req-1.b", request="req-1", positions=5)
            report = hub.json("/v1/streams/req-1")
            assert (report["id"], report["tokens_steered"], report["tokens_missed"]) == ("req-1", 8, 2)
            assert [row["stream"] for row in report["streams"]] == ["req-1.a", "req-1.b"]
            assert hub.json("/v1/streams/req-1.b")["streams"] == [report["streams"][1]]
            row = report["streams"][1]
            assert (row["state"], row["reason"], row["positions"], row["answers"]) == ("finished", "finished", 6, 5)
            assert row["bytes_up"] == 5 * len(encode(delta("req-1.b", 1, bytes(100))))

    def test_a_lossless_delta_of_a_large_vocabulary(self, hub):
        with edge(hub) as worker, engine(hub) as server:
            worker.attach("alice")
            server.join()
            server.send(begin("large"))
            worker.receive()
            sent = worker.send(delta("large", 0, os.urandom(608_256)))
            assert server.receive_frame() == sent

    def test_workers_and_streams_are_listed(self, hub):
        with edge(hub) as worker, engine(hub) as server:
            worker.attach("alice", key_digest=keys.key_digest("steering"))
            server.join()
            server.send(begin("listed"))
            worker.receive()
            (row,) = hub.json("/v1/workers")["workers"]
            assert row.pop("attached_s") >= 0
            assert row == {"name": "alice", "model": "tiny", "vocab_size": VOCABULARY.size, "keyed": True, "streams": 1}
            first, *_ = hub.json("/v1/streams?limit=1")["streams"]
            assert (first["stream"], first["state"], first["reason"]) == ("listed", "live", None)
            assert hub.counts() == (1, 1, 1)

    def test_an_edge_worker_that_disappears_detaches_its_streams(self, hub):
        with engine(hub) as server:
            server.join()
            with edge(hub) as worker:
                worker.attach("alice")
                server.send(begin("s"))
                worker.receive()
                worker.websocket.socket.shutdown(socket.SHUT_RDWR)  # no WebSocket close
                assert server.receive() == End("s", "detached", "the edge worker's connection is gone")
            assert hub.counts() == (0, 1, 1)
            server.send(End("s", "finished", tokens_steered=2, tokens_missed=5))
            row = eventually(lambda: [row for row in hub.json("/v1/streams/s")["streams"] if row["tokens_missed"] == 5])[-1]
            assert row["reason"] == "detached"

    def test_an_engine_that_disappears_ends_its_streams_at_once(self, hub):
        with edge(hub) as worker:
            worker.attach("alice")
            with engine(hub) as server:
                server.join()
                server.send(begin("gone"))
                worker.receive()
            assert worker.receive() == End("gone", "engine_gone", "the engine's connection is gone")
            assert hub.json("/v1/streams/gone")["streams"][0]["reason"] == "engine_gone"

    def test_what_an_engine_sends_before_it_leaves_is_heard(self, hub):
        with edge(hub) as worker:
            worker.attach("alice")
            with engine(hub, linger_ms=5000) as server:
                server.join()
                server.send(begin("last-words"))
                worker.receive()
                server.send(End("last-words", "finished", tokens_steered=11))
            assert worker.receive().reason == "finished"
            assert hub.json("/v1/streams/last-words")["tokens_steered"] == 11

    def test_an_engine_that_starts_again_under_its_identity(self, hub):
        with edge(hub) as worker:
            worker.attach("alice")
            with engine(hub, identity=b"same") as old:
                old.join()
                old.send(begin("old"))
                worker.receive()
                with engine(hub, identity=b"same") as new:
                    new.join()
                    assert worker.receive().reason == "engine_gone"
                    steer(worker, new, "new")
                    assert hub.counts()[:2] == (1, 1)

    def test_a_half_open_connection_is_replaced_by_its_own_process(self, hub):
        with edge(hub) as old, edge(hub) as new, engine(hub) as server:
            old.attach("alice", instance="mine")
            server.join()
            server.send(begin("s"))
            old.receive()
            new.attach("alice", instance="mine")
            assert server.receive().reason == "detached"
            assert server.receive() == Reattached("s")
            closed_with(old, 1000)
            steer(new, server, "s")

    def test_an_engine_frame_that_is_no_message_costs_nothing(self, hub):
        with edge(hub) as worker, engine(hub) as server:
            worker.attach("alice")
            server.socket.send(b"\xc1 no message")
            server.socket.send_multipart([b"", encode(Join(1))])
            server.socket.send(b"")
            server.join()
            steer(worker, server)


class TestRefusals:
    def test_the_name_is_taken(self, hub):
        with edge(hub) as first, edge(hub) as second:
            first.attach("alice", instance="1")
            second.send(attach("alice", instance="2"))
            refused = second.receive()
            assert refused.code == "name_taken"
            assert "'alice'" in refused.sentence
            closed_with(second, 1000)

    @pytest.mark.parametrize(
        ("frame", "reason"),
        [
            (b"\xc1secret", "a frame of 7 bytes is no message of an edge worker"),
            ("text", "a text frame: messages are binary"),
            (encode(delta()), "Delta before Attach"),
            (encode(End("s", "finished")), "End before Attach"),
            (encode(Join(1)), f"a frame of {len(encode(Join(1)))} bytes is no message of an edge worker"),
        ],
    )
    def test_a_broken_protocol_closes_the_connection(self, hub, frame, reason):
        with edge(hub) as worker:
            worker.websocket.send(frame)
            assert closed_with(worker, 1008) == reason

    def test_a_second_attach(self, hub):
        with edge(hub) as worker:
            worker.attach()
            worker.send(attach())
            assert closed_with(worker, 1008) == "a second Attach on one connection"

    def test_a_delta_for_the_stream_of_another_worker(self, hub):
        with edge(hub) as alice, edge(hub) as mallory, engine(hub) as server:
            alice.attach("alice")
            mallory.attach("mallory")
            server.join()
            server.send(begin("s", "alice"))
            alice.receive()
            mallory.send(delta("s"))
            assert closed_with(mallory, 1008) == "Delta for a stream of another edge worker"
            alice.send(delta("s"))
            assert isinstance(server.receive(), Delta)

    def test_a_frame_beyond_the_limit(self, hub):
        with edge(hub) as worker:
            worker.attach()
            with pytest.raises(ConnectionClosed):
                _send_on(worker, bytes(4 * 2**20 + 1))

    def test_a_web_page_may_not_attach(self, hub):
        with pytest.raises(InvalidStatus, match="403"), edge(hub, origin="http://evil.example"):
            pass

    def test_an_engine_that_never_joined(self, hub):
        with engine(hub) as server:
            server.send(begin())
            assert server.receive() == Refused("join", "the hub does not know this engine: send Join first")
            assert hub.counts() == (0, 0, 0)

    def test_an_unknown_stream(self, hub):
        status, body = hub.get("/v1/streams/nothing")
        assert status == 404
        assert "no stream or request of this id" in body


class TestLimits:
    def test_no_attach_in_time(self, tmp_path):
        with running_hub(tmp_path, "limits=Limits(attach_timeout_s=2.0)") as hub, edge(hub) as worker, edge(hub) as other:
            other.attach()
            assert closed_with(worker, 1008) == "no Attach within 2 s"
            assert hub.counts() == (1, 0, 0)

    def test_a_worker_that_does_not_read_is_closed_and_its_streams_go_on_without_it(self, tmp_path):
        limits = "limits=Limits(queue_bytes=2**20)"
        with running_hub(tmp_path, limits) as hub, edge(hub, max_queue=1) as slow, edge(hub) as other, engine(hub) as server:
            slow.attach("slow")
            other.attach("other")
            server.join()
            server.send(begin("flood", "slow"))
            long = advance("flood", 1)
            long = type(long)("flood", 1, 1, [2**31 - 1] * 100_000)
            while not server.socket.poll(0):
                server.send(long)
                time.sleep(0.001)
            assert server.receive().reason == "detached"
            steer(other, server, "calm", worker="other")
            assert [row["name"] for row in hub.json("/v1/workers")["workers"]] == ["other"]
            assert 'costeer_hub_edges_closed_total{reason="too_slow"} 1.0' in hub.get("/metrics")[1]

    def test_a_worker_that_answers_no_ping_is_detached(self, tmp_path):
        limits = "limits=Limits(heartbeat_s=1.0)"
        with running_hub(tmp_path, limits) as hub, socket.create_connection(hub.address.split(":")) as raw:
            raw.sendall(_handshake(hub.address))
            assert raw.recv(4096).startswith(b"HTTP/1.1 101 ")
            raw.sendall(_masked(encode(attach())))
            eventually(lambda: "'alice' attached" in hub.log.read_text(), "attaching")
            eventually(lambda: hub.counts() == (0, 0, 0), "detaching")


def _handshake(address):
    return (
        f"GET /v1/attach HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


def _masked(payload):
    """A binary frame with a mask of zeros."""
    return bytes([0x82, 0x80 | 126, *len(payload).to_bytes(2, "big"), 0, 0, 0, 0]) + payload


class TestKeys:
    def test_reachable_without_a_key_is_refused(self):
        for settings in ({"host": "0.0.0.0"}, {"engine_endpoint": "tcp://10.0.0.1:8771"}, {"engine_endpoint": "tcp://*:8771"}):
            with pytest.raises(InvalidParameter, match="COSTEER_ATTACH_KEY"):
                HubSettings(**settings)
            HubSettings(**settings, attach_key="k")

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_needs_none(self, host):
        shown = f"[{host}]" if ":" in host else host
        HubSettings(host=host, engine_endpoint=f"tcp://{shown}:8771")

    @pytest.mark.parametrize(
        "endpoint", ["", "8771", "tcp://127.0.0.1", "tcp://:1", "tcp://127.0.0.1:x", "ipc://", "udp://127.0.0.1:1"]
    )
    def test_a_malformed_endpoint(self, endpoint):
        with pytest.raises(InvalidParameter, match="engine_endpoint"):
            HubSettings(engine_endpoint=endpoint)

    def test_the_key_is_not_shown(self):
        assert KEY not in repr(HubSettings(attach_key=KEY))

    def test_workers_and_engines_need_the_key(self, tmp_path):
        with running_hub(tmp_path, f"attach_key={KEY!r}") as hub:
            for given, state in ((None, "missing"), ("wrong-key", "wrong")):
                with edge(hub) as stranger:
                    stranger.send(attach(attach_key=given))
                    refused = stranger.receive()
                    assert refused.code == "attach_key"
                    assert state in refused.sentence
            assert hub.json("/healthz")["curve"] is True
            with edge(hub) as worker, engine(hub, "wrong-key") as stranger, engine(hub) as plain, engine(hub, KEY) as server:
                worker.attach(attach_key=KEY)
                stranger.send(Join(1))
                plain.send(Join(1))
                server.join()
                steer(worker, server)
                assert not stranger.socket.poll(0)
                assert not plain.socket.poll(0)
                assert hub.counts() == (1, 1, 0)
            assert hub.stop() == 0
            log = hub.log.read_text()
            assert "'alice' attached" in log
            assert KEY not in log
            assert "wrong-key" not in log

    def test_on_a_reachable_host_names_need_the_key(self, tmp_path):
        with running_hub(tmp_path, f"host='0.0.0.0', attach_key={KEY!r}") as hub, edge(hub) as worker:
            worker.attach("alice", attach_key=KEY)
            for path in ("/v1/workers", "/v1/streams", "/v1/streams/x"):
                assert hub.get(path)[0] == hub.get(path, "wrong")[0] == 401
            assert hub.json("/v1/workers", KEY)["workers"][0]["name"] == "alice"
            for path in ("/healthz", "/metrics"):
                status, body = hub.get(path)
                assert status == 200
                assert "alice" not in body

    def test_a_local_socket_belongs_to_its_user(self, tmp_path):
        path = tmp_path / "engines"
        with running_hub(tmp_path, f"engine_endpoint='ipc://{path}', attach_key={KEY!r}") as hub:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
            assert hub.json("/healthz")["curve"] is False
            with edge(hub) as worker, engine(hub) as server:
                worker.attach(attach_key=KEY)
                steer(worker, server.join())


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ends_cleanly_and_says_goodbye(self, tmp_path, number):
        with running_hub(tmp_path) as hub, edge(hub) as worker, engine(hub) as server:
            worker.attach()
            server.join()
            server.send(begin())
            worker.receive()
            hub.process.send_signal(number)
            assert server.receive().reason == "detached"
            closed_with(worker, 1012)
            assert hub.process.wait(10) == 0
            assert "Traceback" not in hub.log.read_text()

    @pytest.mark.parametrize("what", ["port", "tcp", "ipc"])
    def test_an_address_in_use(self, hub, tmp_path, what):
        with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
            taken = f"ipc://{tmp_path}/taken"
            other.bind(taken)
            port = int(hub.address.split(":")[1]) if what == "port" else 0
            endpoint = {"port": "tcp://127.0.0.1:*", "tcp": hub.engine_endpoint, "ipc": taken}[what]
            code = f"from costeer_vllm.hub.app import *; run(HubSettings(port={port}, engine_endpoint={endpoint!r}))"
            second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert (str(port) if what == "port" else endpoint) in second.stderr
        assert what != "port" or "COSTEER_HUB_PORT" in second.stderr

    def test_ends_with_its_parent(self, tmp_path):
        settings = f"HubSettings(port=0, engine_endpoint='ipc://{tmp_path}/e', exit_with_parent=True)"
        hub = f"from costeer_vllm.hub.app import *; run({settings})"
        log = tmp_path / "log"
        parent = (
            "import subprocess, sys; log = open(sys.argv[2], 'w');"
            "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stderr=log); sys.stdin.read()"
        )
        with subprocess.Popen([sys.executable, "-c", parent, hub, str(log)], stdin=subprocess.PIPE) as process:
            eventually(lambda: log.exists() and "hub ready" in log.read_text(), "the ready line")
            process.kill()
        eventually(lambda: "hub stopped" in log.read_text(), "the end of the hub")

    def test_what_is_imported_needs_no_model(self):
        heavy = ["torch", "vllm", "numpy", "transformers"]
        code = f"import sys, costeer_vllm.hub.app; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == "[]"

    def test_metrics_count_without_names(self, tmp_path):
        with running_hub(tmp_path) as hub, edge(hub) as worker, engine(hub) as server:
            worker.attach("alice")
            server.join()
            server.send(admit(worker="nobody"))
            server.receive()
            steer(worker, server, "secret-stream")
            server.socket.send(b"junk")
            server.send(admit(2))
            server.receive()
            text = hub.get("/metrics")[1]
        for line in (
            "costeer_hub_workers 1.0",
            "costeer_hub_engines 1.0",
            "costeer_hub_streams 0.0",
            'costeer_hub_frames_total{direction="from_edge",type="Delta"} 3.0',
            'costeer_hub_malformed_frames_total{link="engine"} 1.0',
            'costeer_hub_admissions_total{outcome="worker"} 1.0',
            'costeer_hub_tokens_total{outcome="steered"} 3.0',
            'costeer_hub_tokens_total{outcome="missed"} 1.0',
        ):
            assert line in text
        assert "alice" not in text
        assert "secret-stream" not in text


def test_both_links_send_at_once(hub: RunningHub) -> None:
    """A small round trip takes far less than Nagle's 40 ms."""
    with edge(hub) as worker, engine(hub) as server:
        worker.attach()
        server.join()
        times = []
        for stream in range(50):
            start = time.perf_counter()
            steer(worker, server, f"quick-{stream}", positions=2)
            times.append(time.perf_counter() - start)
        assert statistics.median(times) < 0.04


def test_the_log_of_all_this_holds_no_content(hub: RunningHub) -> None:
    log = Path(hub.log).read_text()
    assert "hello" not in log
    assert "secret" not in log
    assert "Traceback" not in log
