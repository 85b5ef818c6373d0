"""Texts are cut where a reader would; nothing is lost, nothing is invented, the order is kept."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costeer_vllm.edge.entries import MAX_ENTRY_BYTES, Entry, Library, cut, file_library, one_library, text_library

TEXT = st.text(st.sampled_from("aé漢🙂.。!? \t\r\n#\u2028\0-") | st.characters(exclude_categories=["Cs"]), max_size=400)


def entries(name: str, text: str) -> list[str]:
    found = file_library(name, text)
    assert isinstance(found, Library)
    assert not found.stable
    return [entry.text for entry in found.entries]


def words(count: int, word: str = "word") -> str:
    return " ".join(f"{word}{i}" for i in range(count))


# --- texts ---


@given(TEXT, st.integers(1, 50))
def test_pieces_are_the_text(text: str, max_bytes: int) -> None:
    pieces = cut(text, max_bytes)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= max_bytes or len(piece) == 1 for piece in pieces)
    assert "" not in pieces or not text


@given(TEXT, st.integers(1, 50))
def test_entries_are_the_text(text: str, repeated: int) -> None:
    text *= repeated
    assert "".join(entry.text for entry in text_library(text).entries) == f"{text}\n\n"


def test_a_text_is_cut_at_its_headings() -> None:
    text = "Preface.\n\n# Food\nNo nuts.\n\n## Drinks\n\nTea.\n# Trips\n#hashtag\n####### seven\n"
    assert entries("notes.md", text) == [
        "Preface.\n\n", "# Food\nNo nuts.\n\n", "## Drinks\n\nTea.\n", "# Trips\n#hashtag\n####### seven\n\n\n",
    ]  # fmt: skip


def test_headings_without_a_text_go_with_the_next() -> None:
    assert entries("notes.md", "\n# Diary\n\n## May\n### 1\nSun.\n## June\n### 2\n") == [
        "\n# Diary\n\n## May\n### 1\nSun.\n", "## June\n### 2\n\n\n",
    ]  # fmt: skip


def test_a_long_section_is_cut_at_blank_lines_and_keeps_its_heading_in_mind() -> None:
    paragraphs = [f"{words(60)}\r\n \t\r\n", f"{words(60)}\n\n\n", f"{words(10)}\n\n", f"{words(100)}\n\n"]
    text = f"# Food\n\n{''.join(paragraphs)}# Trips\nGhent.\n"
    found = text_library(text, "2024 plans").entries
    assert [entry.text for entry in found] == [
        f"# Food\n\n{paragraphs[0]}{paragraphs[1]}{paragraphs[2]}", paragraphs[3], "# Trips\nGhent.\n\n\n",
    ]  # fmt: skip
    assert [entry.about for entry in found] == ["2024 plans # Food", "2024 plans # Food", "2024 plans # Trips"]


@pytest.mark.parametrize(("end", "others"), [("\n", " "), (". ", " "), ("! ", " "), ("。", ""), (" ", "")])
def test_long_paragraphs_are_cut_at_lines_then_sentences_then_words(end: str, others: str) -> None:
    part = others.join(["abcde"] * 30) + end
    pieces = cut(part * 30)
    assert len(pieces) > 1
    assert all(piece.endswith(end) for piece in pieces)
    assert all(len(piece.encode()) > MAX_ENTRY_BYTES / 2 for piece in pieces[:-1])


@pytest.mark.parametrize("unit", ["\n", "# \n", "# a\nb\n", ".", " ", "\n ", "ab ", "a", "漢", "。", "a\n\n", "\n" + " " * 5000])
def test_the_longest_texts_take_seconds_at_most(unit: str) -> None:
    text = unit * (2**20 // len(unit.encode()))
    start = time.process_time()  # of what else runs on the machine nothing is counted
    found = text_library(text).entries
    assert time.process_time() - start < 5
    assert "".join(entry.text for entry in found) == f"{text}\n\n"
    assert max(len(entry.text.encode()) for entry in found) <= MAX_ENTRY_BYTES


@pytest.mark.parametrize("name", ["me.md", "Profile.TXT", "me.jsonl", "profile"])
def test_the_stable_part_has_its_names(name: str) -> None:
    text = '{"text": "I am Ann."}\n\n{"a": "x", "b": "y"}' if name.endswith("jsonl") else "# I\nam\n# Ann"
    found = file_library(name, text)
    assert isinstance(found, Library)
    assert not found.entries
    assert found.stable == ("I am Ann.\n\nx\ny\n\n" if name.endswith("jsonl") else f"{text}\n\n")
    for other in ("meme.md", "my profile.md", "a.me"):
        assert entries(other, "I am Ann.") == ["I am Ann.\n\n"]


def test_libraries_are_joined_in_order() -> None:
    parts = [Library("a", (Entry("1"),)), Library("", (Entry("2"), Entry("3"))), Library("b", ())]
    joined = one_library(parts)
    assert (joined.stable, [entry.text for entry in joined.entries]) == ("ab", ["1", "2", "3"])


def test_texts_are_not_shown() -> None:
    found = text_library("secret", "secret")
    assert "secret" not in f"{found!r} {found} {found.entries!r} {found.entries[0]}"


# --- JSONL ---


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": " Hi. "}', "Hi."),
        ('{"id": "7", "text": "Hi.", "title": "A mail"}', "A mail\nHi."),
        ('{"title": "A mail", "content": "Hi.", "from": "Bo"}', "A mail\nHi."),
        ('{"title": "", "content": "Hi."}', "Hi."),
        ('{"text": 3, "content": "Hi.", "title": null}', "Hi."),
        ('{"subject": "A mail", "n": 3, "body": "Hi.", "to": ["Bo"], "empty": " "}', "A mail\nHi."),
        ('{"title": "A mail"}', "A mail"),
        ('{"text": "a\\n\\n# b\\u2028\u2028\u0085c"}', "a\n\n# b\u2028\u2028\u0085c"),
        ('{"text": "' + "long " * 3000 + '"}', ("long " * 3000).strip()),
    ],
)
def test_a_line_is_an_entry(line: str, text: str) -> None:
    assert entries("mail.jsonl", f"\n{line}\r\n \n{line}") == [f"{text}\n\n"] * 2


@given(st.lists(st.text().filter(str.strip)))
def test_lines_are_kept_in_order(texts: list[str]) -> None:
    lines = b"\n".join(msgspec.json.encode({"n": i, "text": text}) for i, text in enumerate(texts))
    assert entries("mail.jsonl", lines.decode()) == [f"{text.strip()}\n\n" for text in texts]


@pytest.mark.parametrize(
    "line",
    [
        "secret", '"secret"', '["secret"]', "{}", '{"n": 1}', '{"text": " "}', '{"text": "secret',
        '{"text": "\\ud800 secret"}', "\0", "[" * 5000, '{"a":' * 5000,
    ],
)  # fmt: skip
def test_a_line_that_is_none_spoils_the_file_and_is_not_quoted(line: str) -> None:
    found = file_library("mail.jsonl", f'{{"text": "Hi."}}\n\n{line}\n{{"text": "Hi."}}')
    assert found == "its line 3 is not a JSON object with a text in it"


def test_what_is_indexed_grows_with_the_text_and_not_with_its_square() -> None:
    sizes = []
    for num_lines in (500, 1000, 2000):
        library = text_library("# todo\n" * num_lines)
        sizes.append(sum(len(entry.text) + len(entry.about) for entry in library.entries))
    assert sizes[2] < 2.5 * sizes[1] < 6.5 * sizes[0]
