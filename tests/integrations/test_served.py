"""What vLLM and SGLang return, as stored teachers."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

import fastkd
from fastkd.integrations import sglang, vllm


@dataclass
class Logprob:
    """As vLLM's class has it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


VOCAB, LENGTH, K = 11, 6, 3


@pytest.fixture
def teacher():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(LENGTH, VOCAB, generator=random)
    ids = torch.randint(VOCAB, (LENGTH,), generator=random)
    return logits, ids


def vllm_rows(logits, ids, k):
    """Position t + 1 has row t's best k, and the text's own token."""
    rows = [None]
    for row, token in zip(logits.log_softmax(-1)[:-1], ids[1:].tolist(), strict=True):
        order = row.argsort(descending=True).tolist()
        chosen = order[:k] + ([token] if token not in order[:k] else [])
        rows.append({v: Logprob(row[v].item(), order.index(v) + 1, "x") for v in reversed(chosen)})
    return rows


def sglang_rows(logits, k):
    best = fastkd.teacher_topk(logits[:-1], k)
    rows = [
        [[p, v, None] for p, v in zip(*x, strict=True)]
        for x in zip(best.log_probs.tolist(), best.indices.tolist(), strict=True)
    ]
    return {"id": "1", "input_top_logprobs": [None, *rows]}


def check(found, logits, k):
    best = fastkd.teacher_topk(logits[:-1], k)
    assert found.log_probs.dtype == torch.float32
    assert found.indices.dtype == torch.int32
    assert torch.equal(found.indices[:-1], best.indices)
    torch.testing.assert_close(found.log_probs[:-1], best.log_probs)
    assert (found.indices[-1] == -1).all()
    assert (found.log_probs[-1] == -math.inf).all()


def test_vllm_objects_and_json(teacher):
    rows = vllm_rows(*teacher, K)
    assert max(len(row) for row in rows[1:]) == K + 1  # the text's own token is extra somewhere
    check(vllm.teacher_topk(rows, K), teacher[0], K)
    served = [
        row and {str(v): {"logprob": x.logprob, "rank": x.rank} for v, x in row.items()}
        for row in rows
    ]
    check(vllm.teacher_topk(json.loads(json.dumps(served)), K), teacher[0], K)
    plain = [row and {v: x.logprob for v, x in row.items() if x.rank <= K} for row in rows]
    check(vllm.teacher_topk(plain, K), teacher[0], K)


def test_sglang(teacher):
    meta = sglang_rows(teacher[0], K)
    check(sglang.teacher_topk(json.loads(json.dumps(meta)), K), teacher[0], K)
    both = sglang.teacher_topk([meta, {"input_top_logprobs": [None]}], K)
    assert both.indices.shape == (2, LENGTH, K)
    check(fastkd.TopK(both.log_probs[0], both.indices[0]), teacher[0], K)
    assert (both.indices[1] == -1).all()


def test_missing_and_short_rows(teacher):
    rows = vllm_rows(*teacher, K)
    rows[2] = None
    rows[3] = dict(list(rows[3].items())[-2:])  # the two likeliest
    found = vllm.teacher_topk([rows, rows[:2]], K)
    assert found.indices.shape == (2, LENGTH, K)
    assert (found.indices[0, 1] == -1).all()
    assert found.indices[0, 2, 2] == -1
    assert (found.indices[0, 2, :2] >= 0).all()
    assert (found.indices[1, 1:] == -1).all()
    assert torch.equal(found.indices[1, 0], found.indices[0, 0])
    assert vllm.teacher_topk(rows, 1).indices.shape == (LENGTH, 1)


def test_a_loss_takes_them(teacher):
    """With the rows that the server says nothing of masked, as the documentation says."""
    student = torch.randn(LENGTH, VOCAB, requires_grad=True)
    found = vllm.teacher_topk(vllm_rows(*teacher, K), K)
    loss = fastkd.topk_divergence(student, *found, mask=found.indices[..., 0] >= 0)
    best = fastkd.teacher_topk(teacher[0][:-1], K)
    torch.testing.assert_close(loss, fastkd.topk_divergence(student[:-1], *best))
    loss.backward()
    assert student.grad.isfinite().all()
    assert not student.grad[-1].any()


def test_failed_requests(teacher):
    """None among the answers: rows of nothing, as long as the longest."""
    rows, meta = vllm_rows(*teacher, K), sglang_rows(teacher[0], K)
    for found in (
        vllm.teacher_topk([None, rows, None], K),
        sglang.teacher_topk([None, meta, None], K),
    ):
        assert found.indices.shape == (3, LENGTH, K)
        check(fastkd.TopK(found.log_probs[1], found.indices[1]), teacher[0], K)
        for failed in (0, 2):
            assert (found.indices[failed] == -1).all()
            assert (found.log_probs[failed] == -math.inf).all()
    for adapter in (vllm, sglang):
        nothing = adapter.teacher_topk([None, None], K)
        assert nothing.indices.shape == nothing.log_probs.shape == (2, 0, K)
    assert vllm.teacher_topk([[]], K).indices.shape == (1, 0, K)
    assert vllm.teacher_topk([], K).indices.shape == (0, K)
    one_token = vllm.teacher_topk([None], K)
    assert one_token.indices.tolist() == [[-1] * K]


def test_flat_entries(teacher):
    """vLLM's FlatLogprobs has an empty dictionary where a list has None."""
    rows = vllm_rows(*teacher, K)
    check(vllm.teacher_topk([{}, *rows[1:]], K), teacher[0], K)


def test_entries_that_are_not_of_a_whole_prompt(teacher):
    """Without the None of the first token all rows would be one too early."""
    rows, meta = vllm_rows(*teacher, K), sglang_rows(teacher[0], K)["input_top_logprobs"]
    message = "the first entry of a text must be None, .* got [34] tokens in text"
    for answer in (rows[1:], [rows, rows[1:]]):
        with pytest.raises(ValueError, match=rf"^vllm\.teacher_topk: {message}"):
            vllm.teacher_topk(answer, K)
    with pytest.raises(ValueError, match=rf"^sglang\.teacher_topk: {message} 0"):
        sglang.teacher_topk({"input_top_logprobs": meta[1:]}, K)
    whole = {"input_top_logprobs": meta, "prompt_tokens": LENGTH}
    check(sglang.teacher_topk(whole, K), teacher[0], K)
    for some in ([None, *meta[3:]], [None], []):  # as with a larger logprob_start_len
        with pytest.raises(
            ValueError, match=rf"each of the {LENGTH} prompt_tokens .* {len(some)};"
        ):
            sglang.teacher_topk({**whole, "input_top_logprobs": some}, K)


def test_missing_rows_through_a_store(teacher, tmp_path):
    """What a server says of some texts, stored, read in a batch, and a loss of what there is."""
    pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')
    logits, ids = teacher
    rows = vllm_rows(logits, ids, K)
    rows[3] = None  # of a token in between
    served = vllm.teacher_topk([rows, None, rows[:4]], K)
    mask = torch.tensor([[1] * LENGTH, [1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)])
    texts = ids.expand(3, LENGTH)
    settings = {"vocab_size": VOCAB, "k": K, "keys": True, "input_ids": True}
    with fastkd.TeacherStore.create(tmp_path, **settings, log_probs="float16") as writer:
        writer.append_batch(*served, mask=mask, keys=["all", "failed", "short"], input_ids=texts)
    store = fastkd.TeacherStore(tmp_path)
    store.verify()
    for key, text in zip(("all", "failed", "short"), range(3), strict=True):
        length = int(mask[text].sum())
        found = store[key]
        assert torch.equal(found.indices, served.indices[text][:length])
        expected = served.log_probs[text][:length]
        torch.testing.assert_close(found.log_probs, expected, atol=2e-3, rtol=2e-3)
        assert not found.log_probs.isnan().any()
    batch = fastkd.teachers.collate([{"key": x} for x in store.keys()], store=store, shift=True)  # noqa: SIM118
    kept = [[t for t in range(LENGTH - 1) if t != 2], [], [0, 1]]
    assert [row.nonzero()[:, 0].tolist() for row in batch["mask"]] == kept
    student = torch.randn(3, LENGTH, VOCAB, requires_grad=True)
    best = batch["teacher_log_probs"], batch["teacher_indices"]
    loss = fastkd.topk_divergence(student, *best, mask=batch["mask"], reduction="sum")
    whole = fastkd.teacher_topk(logits, K)
    right = sum(
        fastkd.topk_divergence(student[b, t], *(x[t] for x in whole), reduction="sum")
        for b, some in enumerate(kept)
        for t in some
    )
    torch.testing.assert_close(loss, right, atol=5e-3, rtol=5e-3)
    loss.backward()
    assert student.grad.isfinite().all()
    assert torch.equal(student.grad.abs().sum(-1) > 0, batch["mask"])


@pytest.mark.parametrize(
    ("served", "k", "error", "message"),
    [
        ("text", 2, TypeError, "prompt_logprobs must be a list, got str"),
        ([None, [1]], 2, TypeError, "an entry must be None or a dictionary .* got int"),
        ([None, {3: "x"}], 2, TypeError, "a token must have a logprob"),
        ([None, {3: math.nan}], 2, ValueError, "a log-probability must be at most 0, got nan"),
        ([None, {3: 1.5}], 2, ValueError, "at most 0, got 1.5"),
        ([None, {-3: -1.0}], 2, ValueError, "a token id must be in"),
        ([None, {"3": -1.0, 3: -2.0}], 2, ValueError, "position 1 has a token twice"),
        ([None, {3: {"logprob": -1.0, "rank": "x"}}], 2, TypeError, "a rank must be an integer"),
        ([None, {2.5: -1.0}], 2, TypeError, "an entry must be a log-probability and a token id"),
        ([None, {"a": -1.0}], 2, TypeError, "an entry must be a log-probability and a token id"),
        ([None], 0, ValueError, "k must be 1 or more, got 0"),
    ],
)
def test_errors_of_vllm(served, k, error, message):
    with pytest.raises(error, match=rf"vllm\.teacher_topk: .*{message}"):
        vllm.teacher_topk(served, k)


@pytest.mark.parametrize(
    ("served", "error", "message"),
    [
        ({"id": 1}, ValueError, "meta_info must have input_top_logprobs"),
        ([3], ValueError, "meta_info must have input_top_logprobs .* got int"),
        ({"input_top_logprobs": [None, [[-1.0]]]}, TypeError, "a token must be"),
        ({"input_top_logprobs": [None, {1: 2}]}, TypeError, "must be a list, got dict"),
    ],
)
def test_errors_of_sglang(served, error, message):
    with pytest.raises(error, match=rf"sglang\.teacher_topk: .*{message}"):
        sglang.teacher_topk(served, 2)
