"""What an edge worker needs that takes time to load: the models, the tokenizer, the private context."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costeer_vllm.edge.context import PrivateContexts
from costeer_vllm.edge.prompts import check_template
from costeer_vllm.edge.retrieval import Retriever, budget
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.errors import InvalidParameter, Unsupported
from costeer_vllm.protocol.messages import Vocabulary
from costeer_vllm.vocab import fingerprint

if TYPE_CHECKING:
    from costeer_vllm.edge.evaluator import Evaluator


@dataclass(frozen=True)
class Loaded:
    """Ready to be used by one worker."""

    evaluator: "Evaluator"
    contexts: PrivateContexts
    vocabulary: Vocabulary
    num_tokens: int
    max_positions: int
    decode: Callable[[list[int]], str]  # for another thread than the evaluator's


def load(settings: EdgeSettings) -> Loaded:
    """Load everything; what can be wrong with it is found here.

    Raises:
        InvalidParameter, Unsupported: if the context, the template or a model cannot be used.
    """
    contexts = PrivateContexts.load(settings.context, settings.contexts)
    template = _read_template(settings.template)
    AutoTokenizer, SmallModel, CrossEncoder, Evaluator = _import_torch_side()
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidParameter("model", settings.model, f"the name or directory of a model with a tokenizer ({error})") from None
    check_template(tokenizer, template)
    model = SmallModel.load(settings.model, settings.dtype, settings.device, settings.threads)
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= model.num_tokens:
        raise Unsupported(f"costeer: the tokenizer of this small model knows more ids than its {model.num_tokens} embeddings")
    reranker = None if settings.reranker is None else CrossEncoder.load(settings.reranker, model.device)
    retriever = Retriever(tokenizer, budget(settings.context_tokens, model.max_positions), reranker)
    contexts.prepare(retriever)
    evaluator = Evaluator(
        model, tokenizer, template, contexts, settings.delta, retriever, settings.gateway is not None, settings.look_ahead
    )
    return Loaded(evaluator, contexts, fingerprint(vocab), model.num_tokens, model.max_positions, copy.deepcopy(tokenizer).decode)


def _import_torch_side() -> tuple[Any, Any, Any, Any]:
    """What needs torch and takes seconds to import."""
    try:
        from transformers import AutoTokenizer

        from costeer_vllm.edge.evaluator import Evaluator
        from costeer_vllm.edge.reranker import CrossEncoder
        from costeer_vllm.edge.small_model import SmallModel
    except ImportError as error:
        command = "pip install 'costeer-vllm[edge]'"
        raise Unsupported(f"costeer: an edge worker needs torch and transformers ({error}): {command}") from None
    return AutoTokenizer, SmallModel, CrossEncoder, Evaluator


def _read_template(path: str | None) -> str | None:
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter("template", path, f"a file with a chat template ({type(error).__name__})") from None
