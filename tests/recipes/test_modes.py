"""Recipes under checkpoints, torch.compile, fake tensors; options that their sources have."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import logits
from chunks import chunks_of
from test_cross_tokenizer import sides, vocab_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise

CHUNKS = 6
MAPS = [logits((18, 14), torch.float32, 0.3), logits((7, 9), torch.float32, 0.3)]
HEADS = [logits((9, 9)), logits((7, 7))]
VOCAB_MAP = torch.tensor([0, 3, -1, 6, 2, 2, 1, 5])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def problem(batch=2, length=6):
    """A student's logits, and what each recipe needs besides, none of it with a gradient."""
    shape = (batch, length)
    chunks = [chunks_of(shape, CHUNKS) for _ in range(2)]
    chunks[0][0, :4], chunks[1][0, :4] = torch.tensor([-1, 0, 1, 2]), torch.tensor([-1, 0, 1, 1])
    mask = torch.rand(shape) < 0.8
    mask[:, 1] = True
    return (
        logits((*shape, 9)).requires_grad_(),
        logits((*shape, 7)),
        torch.randint(0, 9, shape),
        *chunks,
        mask,
    )


def of_mined(**options):
    def run(s, t, ids, chunks, t_chunks, mask):
        return recipes.mined(s, ids, chunks, t, t_chunks, CHUNKS, VOCAB_MAP, mask=mask, **options)

    return run


def of_uld(s, t, ids, chunks, t_chunks, mask):
    # What the mask leaves out is not looked at.
    poison = torch.where(mask, 0, math.nan).unsqueeze(-1)
    return recipes.uld(s + poison, t + poison, mask=mask, reduction="sequence_mean")


def of_uld_by_chunks(s, t, ids, chunks, t_chunks, mask):
    places = {"student_chunks": chunks, "teacher_chunks": t_chunks, "num_chunks": CHUNKS}
    return recipes.uld(s, t, **places, temperature=2.0)


def of_latents(s, t, ids, chunks, t_chunks, mask):
    return recipes.alm_latents(
        s, t, chunks, t_chunks, CHUNKS, projection=lambda x: x[..., :7], norm="l1"
    )


def of_dskd(query):
    def run(s, t, ids, chunks, t_chunks, mask):
        sides = (recipes.DskdSide(x, x, x, w, mask) for x, w in zip((s, t), HEADS, strict=True))
        maps = [lambda x, w=w: x @ w.to(x.dtype) for w in (MAPS[0], MAPS[1], MAPS[1].T)]
        query_, to_student, to_teacher = maps
        return recipes.dskd(
            *sides,
            ids,
            query=query_ if query else None,
            to_student=to_student,
            to_teacher=to_teacher,
            temperature=2.0,
        )

    return run


RECIPES = {
    "alm_latents": of_latents,
    "uld": of_uld,
    "uld by chunks": of_uld_by_chunks,
    "mined": of_mined(),
    "mined, read": of_mined(match="read", unmatched="drop", divergence="jsd"),
    "dskd": of_dskd(False),
    "dskd with attention": of_dskd(True),
}


def gradient(function, s, *others):
    (found,) = torch.autograd.grad(function(s, *others), s)
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(name, reentrant):
    arguments = problem()
    right = gradient(RECIPES[name], *arguments)
    assert right.any()
    checkpoint(RECIPES[name], *arguments, use_reentrant=reentrant).backward()
    torch.testing.assert_close(arguments[0].grad, right)


@pytest.mark.parametrize("name", RECIPES)
def test_one_graph_for_every_batch(name):
    torch._dynamo.reset()
    backend = "aot_eager" if name in ("uld", "mined, read") else "eager"
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    run = torch.compile(RECIPES[name], fullgraph=True, backend=counter)
    for i in range(3):
        arguments = problem(2 + i, 6 + i)
        found, right = (gradient(f, *arguments) for f in (run, RECIPES[name]))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


def test_fake_tensors():
    vocabs, real = (vocab_of(9), vocab_of(7)), [x.detach() for x in problem()]
    with FakeTensorMode() as mode:
        s, t, ids, *chunks, _ = (mode.from_tensor(x) for x in real)
        places = (chunks[0], t, ids, chunks[1], CHUNKS)
        for loss in (
            of_latents(s, t, ids, *chunks, None),
            recipes.alm(s, ids, *places, *vocabs),
        ):
            assert isinstance(loss, FakeTensor)
            assert loss.shape == ()


def test_mined_by_the_token_that_was_read():
    """Row t's target is the teacher's row at the token aligned with token t, as in the sources."""
    s, ids, chunks, t, _, t_chunks = sides()
    vocab_map = torch.randint(-1, 60, (40,))
    losses = recipes.mined(
        s, ids, chunks, t, t_chunks, CHUNKS, vocab_map, match="read", reduction="none"
    )
    assert not losses[:, 0].any()
    for text, row in enumerate(losses):
        for token in range(1, s.size(1)):
            chunk = chunks[text, token - 1]
            own, its = ((x[text] == chunk).nonzero()[:, 0].tolist() for x in (chunks, t_chunks))
            target = torch.full((40,), -math.inf)
            target[ids[text, token]] = 0
            if chunk >= 0 and len(own) == len(its) == 1:
                target = t[text, its[0]][vocab_map].masked_fill(vocab_map < 0, -math.inf)
            right = fastkd.softmax_divergence(s[text, token - 1], target)
            torch.testing.assert_close(row[token], right)


def test_means_by_text():
    s, t, _, chunks, t_chunks, mask = problem(3)
    mask[2] = False
    losses = recipes.uld(s, t, mask=mask, reduction="none")
    right = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / 3
    for options, factor in (({}, 1), ({"normalizer": 6}, 0.5)):
        found = recipes.uld(s, t, mask=mask, reduction="sequence_mean", **options)
        torch.testing.assert_close(found, right * factor)
    arguments = (s[..., :7], t, chunks, t_chunks, CHUNKS)
    losses = recipes.alm_latents(*arguments, reduction="none")
    found = recipes.alm_latents(*arguments, reduction="sequence_mean")
    torch.testing.assert_close(found, (losses.sum(1) / (losses != 0).sum(1)).nan_to_num().mean())
    with pytest.raises(ValueError, match="uld: reduction sequence_mean needs losses of texts"):
        recipes.uld(s[0], t[0], reduction="sequence_mean")


def test_dskd_as_its_source():
    """The teacher's space is forward KL at one temperature, and only_correct goes with a query."""
    s, t, ids, *_, mask = problem()
    student, teacher = (
        recipes.DskdSide(x, x, x, w, mask) for x, w in zip((s, t), HEADS, strict=True)
    )
    to_teacher = MAPS[1].T
    found = recipes.dskd(
        *(student, teacher, ids),
        query=None,
        to_student=None,
        to_teacher=lambda x: x @ to_teacher,
        divergence="reverse_kl",
        temperature=2.0,
        teacher_temperature=5.0,
    )
    back = (s @ to_teacher @ HEADS[1].T)[:, :-1]
    right = fastkd.softmax_divergence(back, t[:, :-1], temperature=2.0, mask=mask[:, 1:])
    torch.testing.assert_close(found, right)
    for query in (False, True):
        options = {
            "query": (lambda x: x @ MAPS[0]) if query else None,
            "to_student": lambda x: x @ MAPS[1],
            "to_teacher": None,
        }
        default, gated, every = (
            recipes.dskd(student, teacher, ids, **options, only_correct=only)
            for only in (None, True, False)
        )
        assert gated != every
        assert default == (gated if query else every)


def alm_arguments():
    s, ids, chunks, t, t_ids, t_chunks = sides()
    return [s, ids, chunks, t, t_ids, t_chunks, CHUNKS, vocab_of(40), vocab_of(60)]


def test_vocabularies_of_other_logits_are_refused():
    arguments = alm_arguments()
    student, teacher = arguments[7:]
    for vocabs, side in (((teacher, student), "student"), ((student, vocab_of(61)), "teacher")):
        message = f"alm: {side}_vocab must be the vocabulary of {side}_logits, .*, got one of 6"
        with pytest.raises(ValueError, match=message):
            recipes.alm(*arguments[:7], *vocabs)
    arguments[2][0, 3] = 2
    arguments[1][0, 3] = 39
    with pytest.raises(IndexError, match=r"alm: student_ids in chunks must lie in \[0, 39\), got"):
        recipes.alm(*arguments[:7], vocab_of(39), teacher)
    arguments[2].fill_(-1)  # ids of no chunk are not looked at
    assert recipes.alm(*arguments[:7], vocab_of(39), teacher) == 0


def test_types_of_arguments():
    arguments = alm_arguments()
    right = recipes.alm(*arguments)
    for number in (np.int64(CHUNKS), torch.tensor(CHUNKS)):
        assert recipes.alm(*arguments[:6], number, *arguments[7:]) == right
    s, t, ids, chunks, t_chunks, mask = problem()
    latents = [s, F.pad(t, (0, 2)), chunks, t_chunks]
    assert recipes.alm_latents(*latents, np.int64(CHUNKS)) == recipes.alm_latents(*latents, CHUNKS)
    mined = [s, ids, chunks, t, t_chunks, CHUNKS, VOCAB_MAP]
    for wrong in (VOCAB_MAP.tolist(), VOCAB_MAP.numpy()):
        with pytest.raises(TypeError, match="mined: vocab_map must be a tensor, got"):
            recipes.mined(*mined[:6], wrong)
    with pytest.raises(TypeError, match="mined: vocab_map must be int64 or int32"):
        recipes.mined(*mined[:6], VOCAB_MAP.float())
    for name, wrong in (("student_chunks", chunks.tolist()), ("teacher_chunks", chunks.numpy())):
        places = {"student_chunks": chunks, "teacher_chunks": t_chunks, name: wrong}
        with pytest.raises(TypeError, match=f"uld: {name} must be a tensor, got"):
            recipes.uld(s, t, num_chunks=CHUNKS, **places)
    with pytest.raises(TypeError, match="uld: mask must be a tensor, got ndarray"):
        recipes.uld(s, t, mask=mask.numpy())


@pytest.mark.parametrize("wrong", [torch.ones(1), torch.ones(2, 6), "6", [6.0]])
def test_a_normalizer_is_one_number(wrong):
    s, t, ids, chunks, t_chunks, mask = problem()
    student, teacher = (
        recipes.DskdSide(x, x, x, w, mask) for x, w in zip((s, t), HEADS, strict=True)
    )
    maps = {"query": None, "to_student": lambda x: x @ MAPS[1], "to_teacher": None}
    vocabs, map_ = (vocab_of(9), vocab_of(7)), VOCAB_MAP
    for name, call in (
        ("uld", lambda n: recipes.uld(s, t, normalizer=n)),
        ("mined", lambda n: recipes.mined(s, ids, chunks, t, t_chunks, 6, map_, normalizer=n)),
        ("alm_latents", lambda n: recipes.alm_latents(s, s, chunks, chunks, 6, normalizer=n)),
        (
            "alm_loss",
            lambda n: recipes.alm(s, ids, chunks, s, ids, chunks, 6, *vocabs[:1] * 2, normalizer=n),
        ),
        ("dskd", lambda n: recipes.dskd(student, teacher, ids, **maps, normalizer=(n, 1.0))),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=f"{name}: normalizer must be a number or"
        ):
            call(wrong)
        assert call(torch.tensor(6.0)).isfinite()


def test_what_takes_no_gradient():
    s, t, *_ = problem()
    number = torch.tensor(2.0, requires_grad=True)
    for name in ("temperature", "teacher_temperature", "normalizer"):
        with pytest.raises(ValueError, match=f"uld: {name} takes no gradient"):
            recipes.uld(s, t, **{name: number})


def test_numbers_on_the_meta_device():
    """Their values cannot be read, and are not compared."""
    s, number = torch.empty(2, 5, 7, device="meta"), torch.empty((), device="meta")
    labels = torch.empty(2, 5, dtype=torch.int64, device="meta")
    for loss in (
        recipes.uld(s, s, temperature=number),
        recipes.akl(s, s, temperature=number),
        recipes.opd(s, s, labels, coefficient=number, clip=number),
        fastkd.acm.gate(s, temperature=number).sum(),
    ):
        assert loss.is_meta
        assert loss.shape == ()
