"""recipes.alm against a definition in loops, in float64; masks, boundaries, graphs."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from test_cross_tokenizer import CHUNKS, check_gradients, of_chunk, sides, vocab_of

import fastkd
from fastkd import recipes
from fastkd._ops import hints

LETTERS = [bytes([letter]) for letter in b"abcde"]


def plain_alm(
    s, s_ids, s_chunks, t, t_ids, t_chunks, vocabs, starts=((0,), (0,)), merge=None, debias=True
):
    """binary_ce at tau 100, eps 1e-6, chunk by chunk; `starts`: tokens that nothing scores."""
    losses = []
    for text in range(s.size(0)):
        groups, joined = [], False
        for chunk in range(CHUNKS):
            pair = []
            for z, ids, chunks, vocab, first in (
                (s, s_ids, s_chunks, vocabs[0], starts[0]),
                (t, t_ids, t_chunks, vocabs[1], starts[1]),
            ):
                tokens = of_chunk(chunks, text, chunk)
                if not tokens or set(first) & set(tokens):
                    break
                log_q = z[text].log_softmax(-1)
                mark = torch.zeros(z.size(-1)).bool()
                mark[: len(vocab)] = torch.from_numpy(vocab.boundary())
                after = log_q[tokens[-1]][mark].logsumexp(-1)
                pair.append((sum(log_q[u - 1, ids[text, u]] for u in tokens), after))
            if len(pair) < 2:
                continue
            if joined:
                groups[-1] = [(a[0] + b[0], b[1]) for a, b in zip(groups[-1], pair, strict=True)]
            else:
                groups.append(pair)
            joined = merge is not None and pair[1][1].exp() <= merge
        for group in groups:
            b, a = ((x + y * debias) / 100 - 1e-6 for x, y in group)
            losses.append(-(a.exp() * b - torch.expm1(a) * torch.log1p(-b.exp())))
    return torch.stack(losses).mean() if losses else s.sum() * 0


def test_alm():
    vocabs = vocab_of(38), vocab_of(60)  # the student's logits are padded
    for options in ({}, {"merge_threshold": None}, {"merge_threshold": 0.4, "debias": False}):
        s, s_ids, s_chunks, t, t_ids, t_chunks = sides()
        s_ids %= 38
        given = {"merge": options.get("merge_threshold", 0.1), "debias": "debias" not in options}
        check_gradients(
            lambda a, b, o=options, i=(s_ids, s_chunks, t_ids, t_chunks): recipes.alm(
                a, *i[:2], b, *i[2:], CHUNKS, *vocabs, **o
            ),
            lambda a, b, g=given, i=(s_ids, s_chunks, t_ids, t_chunks): plain_alm(
                a, *i[:2], b, *i[2:], vocabs, **g
            ),
            (s, t),
        )


def test_alm_on_aligned_text():
    """The first chunk is lost where the first token belongs to it, else nothing is."""
    student = fastkd.ByteVocab([*LETTERS, b"ab", None])
    teacher = fastkd.ByteVocab([*LETTERS, b"cd", None])
    first = torch.tensor([[5, 2, 3, 4]]), torch.tensor([[0, 1, 5, 4]])  # ab|cd|e
    scores = [logits((1, 5, 7)) for _ in range(2)]
    for begin in (0, 1):  # with a token without bytes before the text, and without
        ids = [F.pad(x, (1, 0), value=6)[:, 1 - begin :] for x in first]
        found = fastkd.align_batch(*ids, student, teacher)
        assert found.num_chunks == 3
        arguments = [
            x
            for z, i, c in zip(scores, ids, found[:2], strict=True)
            for x in (z[:, : i.size(1)], i, c)
        ]
        losses = recipes.alm(
            *arguments, 3, student, teacher, merge_threshold=None, reduction="none"
        )
        assert (losses != 0).tolist() == [[bool(begin), True, True]]


def test_alm_padding_on_the_left():
    """With masks the same as without padding, whatever the rows of padding hold."""
    vocabs = vocab_of(40), vocab_of(60)
    arguments = sides()
    plain = recipes.alm(*arguments, CHUNKS, *vocabs)
    padded, masks = [], {}
    for side, (z, ids, chunks) in (("student", arguments[:3]), ("teacher", arguments[3:])):
        padded += [
            F.pad(z, (0, 0, 2, 0), value=math.nan),
            F.pad(ids, (2, 0)),
            F.pad(chunks, (2, 0), value=-1),
        ]
        masks[f"{side}_mask"] = F.pad(torch.ones_like(ids, dtype=torch.bool), (2, 0))
    torch.testing.assert_close(recipes.alm(*padded, CHUNKS, *vocabs, **masks), plain)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_alm_leaves_out_chunks_with_masked_tokens(side):
    """The token's chunk, and that of the next token, which no row scores."""
    vocabs, given = (vocab_of(40), vocab_of(60)), sides()
    options = {"merge_threshold": None, "reduction": "none"}
    every = recipes.alm(*given, CHUNKS, *vocabs, **options)
    chunks = given[2 if side == "student" else 5]
    mask = torch.ones_like(chunks)
    text, token = (every.gather(1, chunks.clamp(min=0)) * (chunks >= 0))[:, 2:].nonzero()[0]
    token += 2
    mask[text, token] = 0
    found = recipes.alm(*given, CHUNKS, *vocabs, **{f"{side}_mask": mask}, **options)
    right = every.clone()
    for chunk in chunks[text, token : token + 2]:
        right[text, chunk] *= chunk < 0
    assert torch.equal(found, right)
    nothing = {f"{side}_mask": torch.zeros_like(mask)}
    assert recipes.alm(*given, CHUNKS, *vocabs, **nothing) == 0


@pytest.mark.parametrize("side", [0, 1])
def test_alm_hints_at_vocabularies_without_boundaries(side):
    """No chunk has a gradient: its probability with the boundary after it is 0."""
    vocabs = [vocab_of(7), vocab_of(7)]
    vocabs[side] = fastkd.ByteVocab([b"a", b"b"])
    ids, chunks = torch.tensor([[0, 1, 0]]), torch.tensor([[-1, 0, 1]])
    student, teacher = (logits((1, 3, len(vocab))) for vocab in vocabs)
    given = (student.requires_grad_(), ids, chunks, teacher, ids, chunks, 2, *vocabs)
    hints.forget()
    name = ("student_vocab", "teacher_vocab")[side]
    with pytest.warns(UserWarning, match=f"alm: no token of {name} begins a word") as caught:
        loss = recipes.alm(*given, divergence="k2")
    assert [x.filename for x in caught] == [__file__]
    assert not torch.autograd.grad(loss, student)[0].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hints.forget()
        loss = recipes.alm(*given, debias=False)
        assert torch.autograd.grad(loss, student)[0].any()


def test_alm_last_chunk_is_debiased():
    vocab = fastkd.ByteVocab([b"a", b" b", None])
    z, ids, chunks = logits((1, 2, 3)), torch.tensor([[2, 1]]), torch.tensor([[-1, 0]])
    other = z.clone()
    other[0, 1] = logits((3,))  # only what follows the text differs
    loss = recipes.alm(z, ids, chunks, other, ids, chunks, 1, vocab, vocab, divergence="k2")
    assert loss > 0


def test_alm_without_chunks():
    vocabs = vocab_of(40), vocab_of(60)
    arguments = sides()
    arguments[0].requires_grad_()
    arguments[2].fill_(-1)
    loss = recipes.alm(*arguments, CHUNKS, *vocabs)
    loss.backward()
    assert loss == 0
    assert not arguments[0].grad.any()
    empty = [x[:, :0] for x in arguments]
    assert recipes.alm(*empty, 0, *vocabs) == 0


def test_alm_compiles():
    vocabs, arguments = (vocab_of(40), vocab_of(60)), sides()

    def run(x):
        return recipes.alm(x, *arguments[1:], CHUNKS, *vocabs)

    plain, compiled = (arguments[0].clone().requires_grad_() for _ in range(2))
    run(plain).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-4, atol=1e-7)
