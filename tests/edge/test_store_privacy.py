"""Planted secrets in a folder and in registered texts: nothing of them is sent, logged, raised, shown or written elsewhere."""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from costeer_vllm.edge import retrieval, store
from costeer_vllm.edge.context import ContextRefused
from costeer_vllm.edge.evaluator import NO_CONTEXT
from costeer_vllm.edge.retrieval import Retriever
from costeer_vllm.edge.worker import EdgeSettings
from costeer_vllm.errors import CoSteerError
from costeer_vllm.protocol.messages import Delta, End, Query, Turn, encode

from .hub import advance, attached, begin, settings_for
from .test_privacy import CONTEXT, SECRETS, Witness, scrutinized
from .test_privacy import witness as witness  # a fixture

CANNOT_CHOOSE = NO_CONTEXT  # alike, so that it does not tell them apart


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """More than fits, with a secret in every kind of file."""
    folder = tmp_path / "notes"
    (folder / "mail").mkdir(parents=True)
    (folder / "me.md").write_text(CONTEXT, encoding="utf-8")
    (folder / "diary.md").write_text(
        "".join(f"# Day {i}\n\nI thought of {SECRETS[i % 4]}.\n\n" for i in range(200)), encoding="utf-8"
    )
    lines = [msgspec.json.encode({"title": f"Mail {i}", "text": CONTEXT, "n": i}) for i in range(20)]
    (folder / "mail" / "sent.jsonl").write_bytes(b"\n".join(lines))
    return folder


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path, folder: Path) -> EdgeSettings:
    return settings_for(model_dir, tmp_path, context=str(folder))


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is left in the folder for temporary files, and only the test itself opens files to write to them."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    written: list[str] = []
    is_watched = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_watched[0] and event == "open" and threading.current_thread().name.startswith("costeer-model"):
            path, mode, _ = args
            if isinstance(mode, str) and set(mode) & set("wax+"):
                written.append(str(path))

    sys.addaudithook(hook)
    yield
    is_watched[0] = False
    assert not written
    assert not list((tmp_path / "tmp").iterdir())


def ask(text: str, ref: str | None = None) -> Query:
    return Query(messages=[Turn("user", text)], ref=ref)


async def fails(link: Any, witness: Witness, query: Query, sentence: str) -> None:
    answer = await link.ask(begin("bad", query))
    assert isinstance(answer, End), answer
    assert (answer.reason, answer.sentence) == ("failed", sentence)
    witness.frames.append(encode(answer))


def test_a_folder_that_is_chosen_from_tells_nothing(settings: EdgeSettings, witness: Witness, folder: Path, capfd: Any) -> None:
    async def main() -> None:
        async with attached(settings, on_frame_sent=witness.frames.append) as (_, link, worker):
            contexts = worker._evaluator._contexts
            registered = contexts.register((folder / "diary.md").read_text(encoding="utf-8"))
            for number, ref in enumerate((None, contexts.alias(), registered)):
                for question in ("Who is Wilhelmina?", "What is my card?", "Xylophone?", SECRETS[3]):
                    name = f"{number} {len(question)}".replace(" ", "-")
                    assert isinstance(await link.ask(begin(name, ask(question, ref))), Delta)
                    assert isinstance(await link.ask(advance(name, [5])), Delta)
                    (folder / "diary.md").write_text(f"# Today\n\n{CONTEXT * 30}", encoding="utf-8")
            evaluator = worker._evaluator
            kept, *_ = evaluator._retriever._learnt.values()
            for shown in (worker, evaluator, contexts, contexts._default, evaluator._retriever, kept, kept.index):
                witness.records.texts += [repr(shown), str(shown), repr(getattr(shown, "__dict__", ""))]
            witness.records.texts += [repr(contexts._registered), repr(contexts._default._files), repr(contexts._default._value)]
            witness.records.texts += [repr(contexts._default._value.entries[:3]), repr(dict(evaluator._retriever._learnt))]

    scrutinized(main)
    assert any("has changed" in text for text in witness.records.texts)
    assert any("entries of the private context were chosen" in text for text in witness.records.texts)
    witness.check(*capfd.readouterr())


def test_choosing_that_fails_tells_nothing(
    settings: EdgeSettings, witness: Witness, monkeypatch: pytest.MonkeyPatch, folder: Path, capfd: Any
) -> None:
    class Talkative(Exception):
        def __init__(self) -> None:
            super().__init__(CONTEXT)

    class Quoting:
        def __call__(self, text: str, **options: Any) -> Any:
            raise ValueError(f"cannot tokenize {text}")

    async def main() -> None:
        async with attached(settings, on_frame_sent=witness.frames.append) as (_, link, worker):
            evaluator = worker._evaluator
            good = evaluator._retriever
            number = 0
            for owner, method in (
                (retrieval._Index, "scores"),
                (retrieval._Index, "__init__"),
                (Retriever, "_count"),
                (Retriever, "_filled"),
                (store.Watched, "_read_changed"),
                (store.Watched, "_file"),
            ):
                for error in (
                    Talkative(),
                    KeyError(CONTEXT),
                    MemoryError(CONTEXT),
                    UnicodeError(CONTEXT),
                    AssertionError(CONTEXT),
                ):
                    number += 1
                    (folder / "new.md").write_text(f"{CONTEXT} {number}", encoding="utf-8")

                    def raising(*args: Any, error: BaseException = error) -> Any:
                        private = args, CONTEXT  # in the frame's locals
                        raise error from ValueError(private)

                    with monkeypatch.context() as patch:
                        patch.setattr(owner, method, raising)
                        sentence = CANNOT_CHOOSE if owner is not store.Watched else "the edge worker cannot open another stream"
                        await fails(link, witness, ask(f"{number} Wilhelmina"), sentence)
                    assert isinstance(await link.ask(begin("ok", ask(f"{number} Wilhelmina"))), Delta)
            for retriever in (
                Retriever(Quoting()),
                Retriever(good._tokenizer, 100, lambda query, texts: 1 / 0),  # type: ignore[arg-type, return-value]
                Retriever(good._tokenizer, 100, lambda query, texts: texts),  # type: ignore[arg-type, return-value]
                Retriever(good._tokenizer, 100, lambda query, texts: [0.0]),
                Retriever(good._tokenizer, 100, lambda query, texts: [float("nan")] * len(texts)),
            ):
                evaluator._retriever = retriever
                await fails(link, witness, ask("Wilhelmina"), CANNOT_CHOOSE)
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, "bm25s", None)
                evaluator._retriever = Retriever(good._tokenizer)
                await fails(link, witness, ask("Wilhelmina"), CANNOT_CHOOSE)
            evaluator._retriever = good
            assert isinstance(await link.ask(begin("ok", ask("Wilhelmina"))), Delta)

    scrutinized(main)
    for sentence in ("nothing can be chosen from the private context (Talkative at", "(ZeroDivisionError at", "pip install"):
        assert any(sentence in text for text in witness.records.texts), sentence
    witness.check(*capfd.readouterr())


def test_bad_files_tell_nothing(settings: EdgeSettings, witness: Witness, folder: Path, capfd: Any) -> None:
    async def main() -> None:
        (folder / "a.md").write_bytes(CONTEXT.encode() + b"\xff")
        (folder / "b.jsonl").write_bytes(msgspec.json.encode({"text": CONTEXT}) + b"\n" + msgspec.json.encode(CONTEXT))
        async with attached(settings, on_frame_sent=witness.frames.append) as (_, link, _):
            (folder / "c.md").write_bytes(CONTEXT.encode() * 40_000)
            (folder / "d.jsonl").write_bytes(b'{"text": "' + CONTEXT.encode())
            (folder / "e.jsonl").write_bytes(msgspec.json.encode([CONTEXT]))
            assert isinstance(await link.ask(begin("s", ask("Wilhelmina"))), Delta)
            for path in [*folder.glob("*.*"), *folder.glob("*/*.*")]:
                path.write_bytes(b"\xff" + CONTEXT.encode())
            await fails(link, witness, ask("Wilhelmina"), NO_CONTEXT)
            for path in [*folder.glob("*.*"), *folder.glob("*/*.*")]:
                path.unlink()
            await fails(link, witness, ask("Wilhelmina"), NO_CONTEXT)
            (folder / "mail").rmdir()
            folder.rmdir()
            await fails(link, witness, ask("Wilhelmina"), NO_CONTEXT)

    scrutinized(main)
    for name, problem in (
        ("a.md", "not UTF-8"),
        ("b.jsonl", "its line 2 is not"),
        ("c.md", "longer than"),
        ("d.jsonl", "its line 1"),
    ):
        assert any(f"{name}': it" in text and problem in text for text in witness.records.texts), name
    witness.check(*capfd.readouterr())


def test_refused_and_forgotten_texts_tell_nothing(settings: EdgeSettings, witness: Witness, capfd: Any) -> None:
    async def main() -> None:
        async with attached(settings, on_frame_sent=witness.frames.append) as (_, link, worker):
            contexts = worker._evaluator._contexts
            for text in (CONTEXT * 40_000, CONTEXT + "\ud800", " "):
                with pytest.raises(ContextRefused) as caught:
                    contexts.register(text)
                witness.records.texts += [repr(caught.value), repr(caught.value.__context__)]
                assert isinstance(caught.value, CoSteerError)
            ref = contexts.register(CONTEXT)
            assert isinstance(await link.ask(begin("s", ask("Hi", ref))), Delta)
            contexts.forget(ref)
            await fails(link, witness, ask("Hi", ref), NO_CONTEXT)
            assert isinstance(await link.ask(advance("s", [5])), Delta)

    scrutinized(main)
    witness.check(*capfd.readouterr())


def test_an_accelerator_without_memory_for_the_reranker_tells_nothing(
    settings: EdgeSettings, witness: Witness, tokenizer: Any, capfd: Any
) -> None:
    def full(query: str, texts: Any) -> Any:
        time.sleep(0)
        raise torch.OutOfMemoryError(str(texts))

    async def main() -> None:
        async with attached(settings, on_frame_sent=witness.frames.append) as (_, link, worker):
            worker._evaluator._retriever = Retriever(tokenizer, 100, full)
            await fails(link, witness, ask("Wilhelmina"), CANNOT_CHOOSE)

    scrutinized(main)
    witness.check(*capfd.readouterr())
