"""The two keys, and what is shown of them.

The *attach key* lets an edge worker or an engine use a hub. The *steering key* lets a request be steered by one edge worker.
A steering key never leaves the server's front end or the device: the hub sees its digest, and the engine and its logs see a
*grant*, which fits one worker and one query only. The edge worker checks the grant itself before it answers.
"""

import hashlib
import hmac

import msgspec
import zmq
from zmq.utils import z85

from costeer_vllm.protocol.messages import Query

_canonical = msgspec.msgpack.Encoder(order="deterministic").encode


def key_digest(steering_key: str) -> str:
    """SHA-256 of a steering key, hex; domain-separated from other uses of the same text."""
    return hashlib.sha256(b"costeer steering key\0" + steering_key.encode()).hexdigest()


def grant(digest: str, worker: str, query: Query) -> str:
    """HMAC-SHA256, hex: whoever made it knew the digest and asked for this worker and this query."""
    return hmac.new(bytes.fromhex(digest), worker.encode() + b"\0" + _canonical(query), hashlib.sha256).hexdigest()


def same(a: str | None, b: str | None) -> bool:
    """Whether two secrets agree, in time independent of where they differ; None agrees with None only."""
    if a is None or b is None:
        return a is b
    return hmac.compare_digest(a.encode(), b.encode())


def curve_keypair(attach_key: str) -> tuple[bytes, bytes]:
    """The hub's CURVE keypair (public, secret; Z85) for the engine link, derived from the attach key.

    Only holders of the attach key know the public half, without which no handshake succeeds: the link is encrypted and
    both ends are authenticated by the one key.
    """
    secret = hashlib.sha256(b"costeer engine link\0" + attach_key.encode()).digest()
    encoded: bytes = z85.encode(secret)
    return zmq.curve_public(encoded), encoded
