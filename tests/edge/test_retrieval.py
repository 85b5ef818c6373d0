"""The entries that fit the query are chosen, within the budget, always the same, and what is the same is evaluated once."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from costeer_vllm.edge import retrieval
from costeer_vllm.edge.context import ChoosingFailed, PrivateContexts
from costeer_vllm.edge.entries import Entry, Library, text_library
from costeer_vllm.edge.evaluator import Evaluator
from costeer_vllm.edge.reranker import CrossEncoder
from costeer_vllm.edge.retrieval import Retriever, budget
from costeer_vllm.edge.small_model import SmallModel
from costeer_vllm.edge.streams import Answer, Order
from costeer_vllm.errors import InvalidParameter, Unsupported
from costeer_vllm.protocol.messages import Delta, Query, Turn

from .hub import advance, attached, begin, run, settings_for
from .test_worker import Twin

HISTORY = {
    "hike": "Last summer we hiked from Chamonix to Zermatt, eleven days with tents and too much cheese.",
    "violin": "My violin teacher, Mrs. Okafor, wants the Bach partita by December; I practice before breakfast.",
    "allergy": "The doctor says it is the walnuts: no more of them, and an inhaler in every bag.",
    "sister": "Wilhelmina is getting married in Antwerp in May, and I am to give the speech.",
    "code": "At work I maintain the billing service; it is written in Rust, and nobody else dares to touch it.",
    "garden": "The tomatoes froze again. Next year I will not plant them before the Ice Saints.",
    "dog": "Our dog Pickle is afraid of thunder and of the vacuum cleaner, in this order.",
    "chess": "I lost to Tomasz with the Caro-Kann again, and I do not understand why I keep playing it.",
    "taxes": "The accountant needs the receipts for the home office until the end of March.",
    "川": "昨日、京都の鴨川で友達と花火を見ました。とても綺麗でした。",
    "面": "我最喜欢吃兰州拉面, 每个周末都去大学旁边的小店。",
    "चाय": "मुझे सुबह अदरक वाली चाय पसंद है, और शाम को कॉफ़ी।",
    "straße": "Die Wohnung in der ZÄHRINGERSTRASSE hat endlich eine neue Heizung.",
}
QUESTIONS = {
    "Write a toast for the wedding of my sister Wilhelmina": "sister",
    "Which pieces do I practice on the violin?": "violin",
    "Write a packing list for a hike with tents": "hike",
    "a poem about a dog afraid of thunder": "dog",
    "Plan the garden: when do I plant tomatoes?": "garden",
    "explain the Caro-Kann to me": "chess",
    "Are there walnuts in this?": "allergy",
    "How do I thank a colleague who reviewed my Rust code?": "code",
    "去哪里吃拉面?": "面",
    "京都の花火について書いて": "川",
    "Hat die Zähringerstraße eine \uff28\uff25\uff29\uff3a\uff35\uff2e\uff27?": "straße",
    "चाय के बारे में लिखो": "चाय",
    "letter to the accountant about receipts": "taxes",
}


def ask(text: str) -> Query:
    return Query(messages=[Turn("user", text)])


def library_of(texts: Sequence[str], stable: str = "") -> Library:
    return Library(stable, tuple(Entry(f"{text}\n\n") for text in texts))


@pytest.fixture(scope="module")
def history() -> Library:
    rng = random.Random(0)
    topics = ["the weather", "the office", "a film", "lunch", "the train", "my neighbors", "a meeting", "the news"]
    filler = [f"Note {i}: I thought about {rng.choice(topics)} and {rng.choice(topics)}, and then I slept." for i in range(200)]
    texts = [*filler, *HISTORY.values()]
    rng.shuffle(texts)
    return library_of(texts)


# --- the choice ---


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_relevant_entry_is_chosen(tokenizer: Any, history: Library, question: str) -> None:
    wanted = HISTORY[QUESTIONS[question]]
    retriever = Retriever(tokenizer, len(tokenizer(f"{wanted}\n\n")["input_ids"]) + 3)
    assert retriever.before(history, ask(question)) == f"{wanted}\n\n"


def test_many_are_chosen_in_document_order(tokenizer: Any, history: Library) -> None:
    found = Retriever(tokenizer, 250).before(history, ask("walnuts, tomatoes, thunder and the violin"))
    texts = [entry.text for entry in history.entries]
    wanted = [HISTORY[key] for key in ("allergy", "garden", "dog", "violin")]
    assert all(text in found for text in wanted)
    chosen = [text for text in texts if text in found]
    assert found == "".join(chosen)


def test_the_stable_part_comes_first_and_is_not_counted(tokenizer: Any, history: Library) -> None:
    stable = "I am Ann. " * 100
    found = Retriever(tokenizer, 60).before(Library(stable, history.entries), ask("Are there walnuts in this?"))
    assert found.startswith(f"{stable}")
    assert HISTORY["allergy"] in found
    unrelated = Retriever(tokenizer, 60).before(Library(stable, history.entries), ask("Xylophone!"))
    assert unrelated == stable


def test_without_a_word_in_common_the_first_entries_stand_for_all(tokenizer: Any, history: Library) -> None:
    for query in (ask("Xylophone!"), ask("?"), Query(messages=[Turn("assistant", "walnuts")]), Query(messages=[])):
        found = Retriever(tokenizer, 200).before(history, query)
        assert found.startswith(history.entries[0].text)
        assert history.entries[1].text in found


@pytest.mark.parametrize("form", ["messages", "prompt", "prompt_ids"])
def test_the_last_words_of_every_kind_of_query_count(tokenizer: Any, history: Library, form: str) -> None:
    long = "Tell me about the violin. " * 1000 + "." * retrieval._MAX_QUERY + " Are there walnuts in this?"
    turns = [("user", "The violin?"), ("assistant", "Rust?"), ("user", "walnuts"), ("assistant", "A dog")]
    query = {
        "messages": Query(messages=[Turn(*turn) for turn in turns]),
        "prompt": Query(prompt=long),
        "prompt_ids": Query(prompt_ids=tokenizer(long)["input_ids"]),
    }[form]  # fmt: skip
    found = Retriever(tokenizer, 50).before(history, query)
    assert found == f"{HISTORY['allergy']}\n\n"


def test_neighbors_are_shown_as_they_stand_in_their_file(tokenizer: Any) -> None:
    """A section that had to be cut is put together again."""
    walnuts = "".join(f"We like {i} walnuts.  " for i in range(120))
    text = f"# Walnuts\n{walnuts}\n# Trains\n{2 * walnuts.replace('walnuts', 'trains')}"
    found = Retriever(tokenizer, 2600).before(text_library(text), ask("walnuts"))
    assert found == f"# Walnuts\n{walnuts.strip()}\n\n"


def test_equal_entries_are_shown_once(tokenizer: Any) -> None:
    library = library_of([*["The same walnuts."] * 50, *["Other things. " * 9] * 9, "More walnuts of another kind."])
    found = Retriever(tokenizer, 60).before(library, ask("walnuts"))
    assert found == "The same walnuts.\n\nMore walnuts of another kind.\n\n"


def test_file_names_and_headings_are_searched_too(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("ghent", "bruges", "antwerp"):
        (tmp_path / f"{name}.md").write_text("# Sights\n\n" + "The tower, the market, and the canals. " * 10)
    contexts = PrivateContexts.load(str(tmp_path))
    (tmp_path / "bruges.md").write_text("# Sights\n\n" + "The tower, the market and the lakes. " * 10)
    found = contexts.around(None, ask("What is there in Bruges?"), Retriever(tokenizer, 220))
    assert "lakes" in found.before
    assert "canals" not in found.before


# --- the budget ---


@settings(max_examples=60)
@given(
    st.lists(st.text(st.sampled_from("ab walnut漢🙂\n.é"), max_size=150), max_size=12),
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from(["walnut", "a b", "漢", "nothing else", ""]),
)
def test_the_budget_is_never_exceeded(tokenizer: Any, texts: list[str], most: int, is_ranked: bool, question: str) -> None:
    reranker = (lambda query, found: [-len(text) for text in found]) if is_ranked else None
    library = library_of(texts)
    history = Retriever(tokenizer, most, reranker).before(library, ask(question))
    assert len(tokenizer(history, add_special_tokens=False)["input_ids"]) <= most
    whole = "".join(entry.text for entry in library.entries)
    if len(tokenizer(whole, add_special_tokens=False)["input_ids"]) <= most:
        assert history == whole
    assert all(line in whole for line in history.split("\n\n"))


def test_what_is_left_of_the_budget_goes_to_the_next_that_fits(tokenizer: Any) -> None:
    library = library_of(["walnut walnut walnut", "walnut " + "long " * 100, "one walnut in a nutshell", "trains"])
    assert Retriever(tokenizer, 30).before(library, ask("walnut")) == "walnut walnut walnut\n\none walnut in a nutshell\n\n"


def test_of_an_entry_that_is_too_long_a_part_is_shown(tokenizer: Any) -> None:
    long = " ".join(f"walnut{i}" for i in range(10_000))
    history = Retriever(tokenizer, 100).before(library_of([long * 40, "trains"]), ask("walnut7"))
    assert long.startswith(history.strip())
    assert 50 < len(tokenizer(history)["input_ids"]) <= 100


def test_the_default_budget_leaves_room_in_small_models() -> None:
    assert (budget(None, 32768), budget(None, 512), budget(511, 512)) == (1024, 256, 511)
    for asked in (0, -1, 512):
        with pytest.raises(InvalidParameter, match="context_tokens is"):
            budget(asked, 512)


# --- again ---

PROGRAM = """
from costeer_vllm.edge.retrieval import Retriever
from costeer_vllm.edge.entries import Entry, Library
from costeer_vllm.protocol.messages import Query

def tokenizer(text, add_special_tokens):
    return {"input_ids": text.split()}

library = Library("", tuple(Entry(f"entry {i} shares {i % 7} and {i % 11} and {i % 13}\\n\\n") for i in range(500)))
for i in range(13):
    print(Retriever(tokenizer, 60).before(library, Query(prompt=f"entry shares {i} and {i + 1}")))
"""


def test_equal_questions_get_equal_answers_in_every_process() -> None:
    """Whatever the order of sets, which differs from process to process."""
    outputs = {
        subprocess.run([sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True, timeout=60).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    assert "entry" in outputs.pop()


def test_nothing_is_indexed_or_chosen_again_without_a_change(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"{i}.md").write_text(f"Entry {i} about walnuts, of some length.")
    indexed, ranked = [], []
    build, rank = retrieval._Index.__init__, Retriever._ranked
    monkeypatch.setattr(retrieval._Index, "__init__", lambda *args: (indexed.append(1), build(*args))[1])
    monkeypatch.setattr(Retriever, "_ranked", lambda *args: (ranked.append(1), rank(*args))[1])
    contexts, retriever = PrivateContexts.load(str(tmp_path)), Retriever(tokenizer, 60)
    contexts.prepare(retriever)
    first = [contexts.around(None, ask("walnuts"), retriever).before for _ in range(3)]
    assert (len(set(first)), len(indexed), len(ranked)) == (1, 1, 1)
    contexts.around(None, ask("length"), retriever)
    assert (len(indexed), len(ranked)) == (1, 2)
    (tmp_path / "7.md").write_text("walnuts, walnuts")
    assert "walnuts, walnuts" in contexts.around(None, ask("walnuts"), retriever).before
    assert (len(indexed), len(ranked)) == (2, 3)
    assert len(retriever._learnt) == 1, "what was learnt of the former library is kept"


def test_all_of_it_needs_no_index(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    library = library_of(["one", "two"], "I am Ann.\n\n")
    assert Retriever(tokenizer, 50).before(library, ask("?")) == "I am Ann.\n\none\n\ntwo\n\n"
    with pytest.raises(Unsupported, match=r"pip install 'costeer-vllm\[edge\]'"):
        Retriever(tokenizer, 3).prepare(library)


# --- the small model ---


def test_only_what_differs_is_evaluated_again(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Through the evaluator with a real model: the stable part, and the entries up to the first that another query chooses."""
    (tmp_path / "me.md").write_text("My name is Ann and I write short letters. " * 10)
    entries = [
        f"On day {i} I saw {thing} and was happy about it." for i, thing in enumerate(("walnuts", "trains", "lakes", "towers"))
    ]
    (tmp_path / "log.md").write_text("".join(f"# {i}\n{entry}\n" for i, entry in enumerate(entries)))
    model = SmallModel.load(str(model_dir))
    contexts = PrivateContexts.load(str(tmp_path))
    evaluator = Evaluator(model, tokenizer, None, contexts, "lossless", Retriever(tokenizer, 80))

    def asked(serial: int, text: str) -> tuple[list[int], int]:
        """The ids of the prompt with context, and how many of both prompts' were copied."""
        results = evaluator.turn([Order(serial, 0, (), 0, 0, ask(text))], [])
        pair = evaluator._pairs[serial]
        while not results:
            results = evaluator.turn([], [])
        assert isinstance(results[0], Answer)
        found = list(pair.with_context.ids), pair.num_reused
        assert evaluator.turn([], [serial]) == []
        return found

    stable_ids = len(tokenizer("<|im_start|>user\n" + "My name is Ann and I write short letters. " * 10)["input_ids"])
    first, _ = asked(0, "Where did I see walnuts and trains?")
    second, reused = asked(1, "Where did I see walnuts and towers?")
    assert entries[0] in (text := tokenizer.decode(second)) and entries[3] in text and entries[1] not in text  # noqa: PT018
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared > stable_ids + len(tokenizer(entries[0])["input_ids"])
    assert reused >= shared
    third, reused = asked(2, "Tell me of walnuts and trains!")
    shared = next(i for i, (a, b) in enumerate(zip(first, third, strict=False)) if a != b)
    assert tokenizer.decode(third[:shared]).endswith(f"{entries[1]}\n\n"), "the same entries are the same text"
    assert reused >= shared


def test_a_worker_steers_by_what_it_has_chosen_and_sees_changes(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Over real sockets: the deltas are those of the text that the query asks for."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "me.md").write_text("I am Ann.")
    (folder / "log.md").write_text("".join(f"# {key}\n{text}\n" for key, text in HISTORY.items()))
    twin, dog = Twin(model_dir, tokenizer), ask("dog, thunder?")

    async def main() -> None:
        async with attached(settings_for(model_dir, tmp_path, context=str(folder), context_tokens=70)) as (_, link, _):
            twin.check(await link.ask(begin("a", dog)), dog, [], f"I am Ann.\n\n# dog\n{HISTORY['dog']}")
            (folder / "dog.md").write_text("A dog in a thunderstorm.\n")
            (folder / "log.md").unlink()
            (folder / "long.md").write_text("# Other\n" + "trains " * 100)
            twin.check(await link.ask(begin("b", dog)), dog, [], "I am Ann.\n\nA dog in a thunderstorm.")
            twin.check(await link.ask(advance("a", [5])), dog, [5], f"I am Ann.\n\n# dog\n{HISTORY['dog']}")

    run(main())


# --- the cross-encoder ---


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-cross-encoder"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_cross_encoder_scores_pairs(cross_encoder: Path, tokenizer: Any, history: Library) -> None:
    encoder = CrossEncoder.load(str(cross_encoder))
    texts = [entry.text.strip() for entry in history.entries[:20]] + ["long " * 2000 + "!"]
    scores = encoder("Are there walnuts?", texts)
    assert len(set(scores)) > 15
    alone = [encoder("Are there walnuts?", [text])[0] for text in texts]
    assert scores == pytest.approx(alone, abs=1e-4)
    assert encoder("long " * 2000, texts[:1])[0] != scores[0]
    found = Retriever(tokenizer, 60, encoder).before(library_of(texts[:20]), ask("Are there walnuts?"))
    assert texts[scores.index(max(scores[:20]))] in found


def test_a_reranker_reads_the_best_of_bm25(tokenizer: Any, history: Library) -> None:
    read: list[str] = []

    def reranker(query: str, texts: Sequence[str]) -> list[float]:
        assert query == "walnuts or the violin"
        read.extend(texts)
        return [float("Rust" in text) + 2 * float("violin" in text) for text in texts]

    library = library_of([*HISTORY.values(), *[f"The {i}" for i in range(100)]])
    found = Retriever(tokenizer, len(tokenizer(HISTORY["violin"])["input_ids"]) + 2, reranker).before(
        library, ask("walnuts or the violin")
    )
    assert found == f"{HISTORY['violin']}\n\n"
    assert len(read) == retrieval.NUM_CANDIDATES
    assert HISTORY["allergy"] in read[:2]


def test_a_worker_with_a_cross_encoder(model_dir: Path, cross_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("".join(f"# {key}\n{text}\n" for key, text in HISTORY.items()))
    settings = settings_for(
        model_dir, tmp_path, context=str(tmp_path / "notes.md"), context_tokens=70, reranker=str(cross_encoder)
    )

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            for name in ("a", "b"):
                assert isinstance(await link.ask(begin(name, ask("dog, thunder?"))), Delta)

    run(main())


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_reranker_without_numbers_is_a_failure(tokenizer: Any, tmp_path: Path, score: float) -> None:
    (tmp_path / "a.md").write_text("secret " * 500)
    contexts = PrivateContexts.load(str(tmp_path))
    with pytest.raises(ChoosingFailed, match=r"^costeer: nothing can be chosen .* \(FloatingPointError at retrieval.py:\d+\)$"):
        contexts.around(None, ask("secret"), Retriever(tokenizer, 50, lambda query, texts: [score] * len(texts)))


def test_what_is_no_cross_encoder(cross_encoder: Path, model_dir: Path, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"reranker is .* one label"):
        CrossEncoder.load(str(tmp_path / "nothing"))
    two = tmp_path / "two"
    BertForSequenceClassification(
        BertConfig(vocab_size=640, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(two)
    tokenizer.save_pretrained(two)
    with pytest.raises(InvalidParameter, match="this one has 2"):
        CrossEncoder.load(str(two))
    with pytest.raises(InvalidParameter, match="this one has 2"):
        CrossEncoder.load(str(model_dir))
