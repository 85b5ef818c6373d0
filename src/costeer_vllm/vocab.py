"""Whether two models mean the same token by the same id."""

import hashlib
from collections.abc import Mapping

from costeer_vllm.protocol.messages import Vocabulary


def fingerprint(vocab: Mapping[str, int]) -> Vocabulary:
    """The vocabulary of a tokenizer (token -> id, as ``tokenizer.get_vocab()`` gives it).

    Padding of the embedding matrix does not count: Qwen2.5's 151,936 and 152,064 logits share one vocabulary.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(vocab.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}\0{token}\0".encode("utf-8", "surrogatepass"))
    return Vocabulary(digest.hexdigest(), len(vocab))
