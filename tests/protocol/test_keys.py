"""The two keys: what a digest and a grant bind, and real CURVE handshakes with the right and the wrong attach key."""

import pytest
import zmq
from hypothesis import assume, given
from hypothesis import strategies as st
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from costeer_vllm.engine.link import connect
from costeer_vllm.protocol.keys import curve_keypair, grant, key_digest, same
from costeer_vllm.protocol.messages import Begin, Query, Turn, decode_hub_to_edge, encode

DIGEST = key_digest("open-sesame")
QUERY = Query(messages=[Turn("user", "Hello?")])


def test_a_digest_is_hex_and_does_not_hold_the_key() -> None:
    assert len(DIGEST) == 64
    assert set(DIGEST) <= set("0123456789abcdef")
    assert key_digest("open-sesame") == DIGEST
    assert key_digest("open-sesam") != DIGEST
    assert "sesame" not in DIGEST


def test_the_digest_is_of_the_key_in_its_own_domain() -> None:
    """The same text as an attach key gives away nothing about it as a steering key."""
    assert z85.decode(curve_keypair("open-sesame")[1]).hex() != DIGEST


QUERIES = [
    QUERY,
    Query(messages=[Turn("user", "Hello!")]),
    Query(messages=[Turn("system", "Hello?")]),
    Query(messages=[Turn("user", "Hello?"), Turn("user", "")]),
    Query(messages=[Turn("user", "Hello?")], continue_final_message=True),
    Query(messages=[]),
    Query(prompt="Hello?"),
    Query(prompt=""),
    Query(prompt_ids=[1, 2]),
    Query(prompt_ids=[2, 1]),
    Query(prompt_ids=[]),
    Query(),
]


def test_a_grant_binds_key_worker_and_query() -> None:
    grants = [grant(DIGEST, "laptop", query) for query in QUERIES]
    grants += [grant(DIGEST, "laptop2", QUERY), grant(key_digest("other"), "laptop", QUERY)]
    assert len(set(grants)) == len(grants)
    assert all(len(made) == 64 and DIGEST not in made for made in grants)


@given(st.text(), st.text(), st.text(), st.text())
def test_no_two_pairs_of_worker_and_query_share_a_grant(worker: str, text: str, other_worker: str, other_text: str) -> None:
    assume("\0" not in worker + other_worker)  # no worker has such a name
    one, other = grant(DIGEST, worker, Query(prompt=text)), grant(DIGEST, other_worker, Query(prompt=other_text))
    assert (one == other) == ((worker, text) == (other_worker, other_text))


@pytest.mark.parametrize("query", QUERIES)
def test_a_grant_still_fits_after_the_query_has_travelled(query: Query) -> None:
    begin = Begin("s", "r", "laptop", query, 1.0, [], grant(DIGEST, "laptop", query))
    received = decode_hub_to_edge(encode(begin))
    assert isinstance(received, Begin)
    assert same(received.grant, grant(DIGEST, "laptop", received.query))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("x", "x", True),
        ("x", "y", False),
        ("x", "xx", False),
        ("", "", True),
        ("", None, False),
        (None, "", False),
        (None, "x", False),
        ("x", None, False),
        (None, None, True),
        ("schl\u00fcssel", "schl\u00fcssel", True),
        ("schl\u00fcssel", "schlussel", False),
    ],
)
def test_same(a: str | None, b: str | None, expected: bool) -> None:
    assert same(a, b) is expected


def test_the_keypair_is_valid_deterministic_and_the_attach_keys_own() -> None:
    public, secret = curve_keypair("attach-me")
    assert curve_keypair("attach-me") == (public, secret)
    assert len(public) == len(secret) == 40
    assert zmq.curve_public(secret) == public
    assert curve_keypair("attach-me!")[1] != secret
    assert b"attach" not in secret


ATTACH_KEY = "attach-me"
TIMEOUT_MS = 10_000


class Hub:
    """The hub's socket as it should be: a CURVE server with the derived key."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.curve_server = True
        self.socket.curve_secretkey = curve_keypair(ATTACH_KEY)[1]
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
                                                      | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                                                      | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)  # fmt: skip

    def handshake(self) -> bool:
        """Whether the next handshake succeeds."""
        assert self.monitor.poll(TIMEOUT_MS), "no handshake was tried"
        return recv_monitor_message(self.monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def close(self) -> None:
        self.socket.disable_monitor()
        self._context.destroy(linger=0)


@pytest.fixture
def hub():  # type: ignore[no-untyped-def]
    hub = Hub()
    yield hub
    hub.close()


def test_the_right_attach_key_opens_the_link_in_both_directions(hub: Hub) -> None:
    engine = connect(hub.endpoint, ATTACH_KEY)
    try:
        engine.send(b"from the engine")
        assert hub.handshake()
        assert hub.socket.poll(TIMEOUT_MS)
        identity, frame = hub.socket.recv_multipart()
        assert frame == b"from the engine"
        hub.socket.send_multipart([identity, b"from the hub"])
        assert engine.poll(TIMEOUT_MS)
        assert engine.recv() == b"from the hub"
    finally:
        engine.close(0)


@pytest.mark.parametrize("attach_key", ["attach-you", None])
def test_a_wrong_or_missing_attach_key_opens_nothing(hub: Hub, attach_key: str | None) -> None:
    stranger = connect(hub.endpoint, attach_key)
    friend = connect(hub.endpoint, ATTACH_KEY)
    try:
        stranger.send(b"let me in")
        while hub.handshake():  # the friend's may come first
            pass
        friend.send(b"me too")
        assert hub.socket.poll(TIMEOUT_MS)
        assert hub.socket.recv_multipart()[1] == b"me too"
        assert not hub.socket.poll(0)
    finally:
        stranger.close(0)
        friend.close(0)


def test_an_engine_does_not_speak_to_a_hub_with_another_key() -> None:
    """Both ends are authenticated: a false hub on the right port learns nothing."""
    context = zmq.Context()
    false_hub = context.socket(zmq.ROUTER)
    false_hub.curve_server = True
    false_hub.curve_publickey, false_hub.curve_secretkey = zmq.curve_keypair()
    endpoint = f"tcp://127.0.0.1:{false_hub.bind_to_random_port('tcp://127.0.0.1')}"
    engine = connect(endpoint, ATTACH_KEY)
    monitor = engine.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    try:
        engine.send(b"query")
        assert monitor.poll(TIMEOUT_MS)
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
        assert not false_hub.poll(0)
    finally:
        engine.disable_monitor()
        monitor.close(0)
        engine.close(0)
        context.destroy(linger=0)
