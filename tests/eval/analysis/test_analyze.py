"""The analysis over given texts: its KL is the one written out, it has one minimum, and it resumes."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from costeer_vllm.demo.export import MODELS
from eval.__main__ import app
from eval.analysis.analyze import CHUNK, PAPER_T, STRENGTHS, Analysis, Curve, kl_of_strengths, log_partition
from eval.records import read

DEMO = ["analyze", "--task", "demo", "--threads", "1"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def log_probs(generator: torch.Generator, num: int, vocab: int, scale: float = 2.0) -> torch.Tensor:
    return (scale * torch.randn(num, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_kl_is_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, full, with_context, without_context = (log_probs(generator, 3, 40) for _ in range(4))
    delta, strengths = with_context - without_context, [-1.0, 0.0, 0.476, 1.783]
    found = kl_of_strengths(base, full, delta, strengths)
    for i, c in enumerate(strengths):
        steered = (base + c * delta).log_softmax(-1)
        expected = (full.exp() * (full - steered)).sum(-1)
        torch.testing.assert_close(found[:, i], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_partition(base, delta, [0.0]), torch.zeros(3, 1, dtype=torch.float64))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_kl_is_convex_in_the_strength(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, full, with_context, without_context = (log_probs(generator, 5, 30) for _ in range(4))
    grid = [0.1 * i for i in range(31)]
    kl = kl_of_strengths(base, full, with_context - without_context, grid)
    assert (kl[:, :-2] - 2 * kl[:, 1:-1] + kl[:, 2:] >= -1e-9).all()
    assert (kl >= -1e-9).all()


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyzed")
    result = invoke(*DEMO, "--limit", 4, "--max-tokens", 40, "--out", folder)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def test_the_demo_pair_wants_about_the_strength_of_one_iteration(analyzed: Path) -> None:
    curve = msgspec.json.decode((analyzed / "curve.json").read_bytes(), type=Curve)
    assert curve.num_examples == 4
    assert curve.strengths == STRENGTHS
    assert 0.3 < curve.best_strength < 0.7
    at = {strength: mean for strength, (mean, _, _) in zip(STRENGTHS, curve.kl, strict=True)}
    assert at[PAPER_T[1]] < 0.4 * at[0.0]
    assert at[PAPER_T[1]] < at[PAPER_T[5]] < at[PAPER_T[20]]
    assert all(low <= mean <= high for mean, low, high in [*curve.kl, *curve.nll, *curve.agreement])
    assert (analyzed / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_records_and_per_token_arrays_agree(analyzed: Path) -> None:
    for record in read(analyzed / "analysis.jsonl", Analysis):
        assert record.num_tokens == 40
        assert len(record.kl) == len(record.nll) == len(record.agreement) == len(STRENGTHS)
    arrays = [np.load(path) for path in (analyzed / "tokens").iterdir()]
    assert [array.shape for array in arrays] == [(40, len(STRENGTHS))] * 4
    means = sorted(array[:, 0].mean() for array in arrays)
    assert means == pytest.approx(sorted(record.kl[0] for record in read(analyzed / "analysis.jsonl", Analysis)), rel=1e-5)


def test_the_likelihood_is_that_of_the_text_read_at_once(analyzed: Path) -> None:
    """Unsteered, it is the large model's own: what transformers calls the loss."""
    from transformers import AutoModelForCausalLM

    from costeer_vllm.offline import Policy, end_ids, generate
    from eval.answers.prepare import Pair, Prepared, prepare
    from eval.tasks import task_named

    pair = Pair.load(str(MODELS / "large"), str(MODELS / "small"))
    (prepared,) = prepare(task_named("demo").load(None).examples[:1], pair, 1000)
    assert isinstance(prepared, Prepared)
    large = AutoModelForCausalLM.from_pretrained(MODELS / "large", dtype=torch.float32).eval()
    with_context, without_context = prepared.prompts["large"]
    (text,) = generate(Policy(large, [with_context]), None, end_ids(large), 40)
    ids = torch.tensor([[*without_context, *text.ids]])
    labels = ids.clone()
    labels[:, : len(without_context)] = -100
    with torch.inference_mode():
        expected = large(input_ids=ids, labels=labels).loss.item()
    record = next(record for record in read(analyzed / "analysis.jsonl", Analysis) if record.id == "000")
    assert record.nll[STRENGTHS.index(0.0)] == pytest.approx(expected, rel=1e-4)


def test_it_resumes_and_keeps_to_its_settings(analyzed: Path) -> None:
    before = (analyzed / "analysis.jsonl").read_bytes()
    assert invoke(*DEMO, "--limit", 5, "--max-tokens", 40, "--out", analyzed).exit_code == 0
    after = (analyzed / "analysis.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 5
    assert "other settings" in str(invoke(*DEMO, "--limit", 5, "--max-tokens", 41, "--out", analyzed).exception)


def test_a_text_longer_than_a_chunk_is_read_in_parts(tmp_path: Path) -> None:
    row = {"id": 1, "input": "Write.", "top_5": [], "output": "Dear friends, this is a long text. " * 40}
    data = tmp_path / "rows.jsonl"
    data.write_bytes(msgspec.json.encode(row) + b"\n" + msgspec.json.encode({**row, "id": 2, "output": " . "}) + b"\n")
    models = ["--large", MODELS / "large", "--small", MODELS / "small", "--threads", 1]
    arguments = ["analyze", "--task", "longlamp-abstract", "--data", data, *models]
    results = [invoke(*arguments, "--max-tokens", num, "--out", tmp_path / str(num)) for num in (CHUNK, CHUNK + 40)]
    assert [result.exit_code for result in results] == [0, 0], [result.exception for result in results]
    short, long = (np.load(sorted((tmp_path / str(num) / "tokens").iterdir(), key=lambda path: -path.stat().st_size)[0])
                   for num in (CHUNK, CHUNK + 40))  # fmt: skip
    assert len(long) == CHUNK + 40
    np.testing.assert_allclose(long[:CHUNK], short, rtol=1e-3, atol=1e-4)


def test_without_a_text_there_is_nothing_to_analyze(tmp_path: Path) -> None:
    data = tmp_path / "helpsteer.jsonl"
    data.write_text('{"id": 1, "input": "How?"}\n')
    models = ["--large", MODELS / "large", "--small", MODELS / "small", "--threads", 1]
    result = invoke("analyze", "--task", "helpsteer", "--data", data, *models, "--text", "reference", "--out", tmp_path / "out")
    assert "no example could be analyzed" in str(result.exception)
    assert "it has no text to analyze" in result.output
