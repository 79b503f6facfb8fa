"""Recipes across tokenizers against definitions in plain loops, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import logits, relative_error
from chunks import chunks_of

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise

CHUNKS = 6


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 100)


def vocab_of(size):
    """Some tokens begin with a space, some have no bytes."""
    tokens = [
        (b" " if i % 3 == 0 else b"") + bytes([97 + i % 20, 97 + i // 20]) for i in range(size)
    ]
    return fastkd.ByteVocab([None if i % 7 == 6 else token for i, token in enumerate(tokens)])


def sides(batch=3, dtype=torch.float32, student=(11, 40), teacher=(8, 60)):
    """Logits, ids and chunks of both."""
    found = []
    for length, vocab in (student, teacher):
        ids = torch.randint(0, vocab, (batch, length))
        found += [logits((batch, length, vocab), dtype), ids, chunks_of((batch, length), CHUNKS)]
    return found


def check_gradients(function, exact, leaves, tolerance=2e-5):
    """Values and gradients of a function of leaves against those of a definition in float64."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    found, right = function(*leaves), exact(*exact_leaves)
    torch.testing.assert_close(found.double(), right.double(), rtol=tolerance, atol=1e-7)
    weights = torch.rand(found.shape)
    (found * weights).sum().backward()
    (right * weights.double()).sum().backward()
    for mine, true in zip(leaves, exact_leaves, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert relative_error(mine.grad, true.grad) < tolerance
    return found


def of_chunk(chunks, text, chunk):
    return [t for t, c in enumerate(chunks[text].tolist()) if c == chunk]


# ---- alm_latents


def plain_latents(s, t, s_chunks, t_chunks, norm):
    pairs, losses = [], torch.zeros(s.size(0), CHUNKS, dtype=s.dtype)
    for text in range(s.size(0)):
        for chunk in range(CHUNKS):
            ends = [of_chunk(x, text, chunk) for x in (s_chunks, t_chunks)]
            if all(ends):
                pairs.append((text, chunk, s[text, ends[0][-1]], t[text, ends[1][-1]]))
    power = 2 if norm.startswith("l2") else 1
    scale = torch.stack([row.abs() ** power for *_, row in pairs]).mean(0)
    if "channelwise" not in norm:
        scale = scale.mean()
    for text, chunk, mine, its in pairs:
        where = torch.zeros_like(losses)
        where[text, chunk] = 1
        losses = losses + where * ((mine - its).abs() ** power / (scale + 1e-8)).mean()
    return losses


@pytest.mark.parametrize("norm", ["l2_channelwise", "l2", "l1_channelwise", "l1"])
def test_alm_latents(norm):
    s, t = logits((3, 11, 5)), logits((3, 8, 7))
    chunks = [chunks_of((3, length), CHUNKS) for length in (11, 8)]
    weight = torch.randn(7, 5)

    def run(a, b, w, reduction="none"):
        options = {"projection": lambda x: x @ w.T, "norm": norm, "reduction": reduction}
        return recipes.alm_latents(a, b, *chunks, CHUNKS, **options)

    losses = check_gradients(
        run, lambda a, b, w: plain_latents(a @ w.T, b, *chunks, norm), (s, t, weight)
    )
    kept = losses[losses != 0]
    torch.testing.assert_close(run(s, t, weight, "mean"), kept.mean())


def test_alm_latents_reads_only_ends_of_chunks():
    hidden = torch.full((1, 3, 2), math.nan)
    hidden[0, 1] = 1.0
    chunks = torch.tensor([[0, 0, -1]])
    leaf = hidden.clone().requires_grad_()
    for count, ids in ((1, chunks), (2, torch.full_like(chunks, -1)), (0, chunks.clamp(max=-1))):
        leaf.grad = None
        loss = recipes.alm_latents(leaf, hidden, ids, ids, count)
        loss.backward()
        assert loss == 0
        assert not leaf.grad.any()


# ---- uld


def plain_uld(z_s, z_t, tau=1.0, tau_t=1.0):
    width = max(z_s.size(-1), z_t.size(-1))
    q, p = (
        F.pad((z / x).softmax(-1).sort(-1, descending=True).values, (0, width - z.size(-1)))
        for z, x in ((z_s, tau), (z_t, tau_t))
    )
    return (q - p).abs().sum(-1)


@pytest.mark.parametrize("widths", [(40, 60), (60, 40), (50, 50)])
def test_uld_of_paired_rows(widths):
    s, t = (logits((3, 4, width)) for width in widths)
    mask = torch.rand(3, 4) < 0.7
    losses = check_gradients(
        lambda a: recipes.uld(
            a, t, mask=mask, temperature=2.0, teacher_temperature=0.5, reduction="none"
        ),
        lambda a: torch.where(mask, plain_uld(a, t.double(), 2.0, 0.5), 0),
        (s,),
    )
    torch.testing.assert_close(
        recipes.uld(s, t, mask=mask, temperature=2.0, teacher_temperature=0.5), losses[mask].mean()
    )
    assert recipes.uld(s, s) == 0
    torch.testing.assert_close(recipes.uld(s[0, 0], t[0, 0]), plain_uld(s[0, 0], t[0, 0]))


def test_uld_of_chunks():
    s, _, s_chunks, t, _, t_chunks = sides()

    def plain(a):
        losses = torch.zeros(3, CHUNKS, dtype=a.dtype)
        for text in range(3):
            for chunk in range(CHUNKS):
                ends = [of_chunk(x, text, chunk) for x in (s_chunks, t_chunks)]
                if all(ends):
                    where = torch.zeros_like(losses)
                    where[text, chunk] = 1
                    pair = a[text, ends[0][-1]], t[text, ends[1][-1]].double()
                    losses = losses + where * plain_uld(*pair)
        return losses

    chunks = {"student_chunks": s_chunks, "teacher_chunks": t_chunks, "num_chunks": CHUNKS}
    check_gradients(lambda a: recipes.uld(a, t, **chunks, reduction="none"), plain, (s,))


def test_uld_does_not_read_what_is_masked():
    s, t = logits((4, 9)), logits((4, 9))
    s[1] = t[1] = math.nan
    leaf, mask = s.requires_grad_(), torch.tensor([True, False, True, True])
    recipes.uld(leaf, t, mask=mask).backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1].any()
    leaf.grad = None
    loss = recipes.uld(leaf, t, mask=torch.zeros(4).bool())
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


# ---- mined


def plain_mined(z_s, ids, s_chunks, z_t, t_chunks, vocab_map, mask, drop, divergence):
    losses = torch.zeros(ids.shape, dtype=z_s.dtype)
    for text in range(ids.size(0)):
        for token in range(1, ids.size(1)):
            chunk = int(s_chunks[text, token])
            ends = [of_chunk(x, text, chunk) for x in (s_chunks, t_chunks)]
            matched = chunk >= 0 and [len(x) for x in ends] == [1, 1] and ends[1][0] > 0
            if not mask[text, token] or (drop and not matched):
                continue
            target = torch.full((z_s.size(-1),), -math.inf, dtype=z_s.dtype)
            if matched:
                for v, other in enumerate(vocab_map.tolist()):
                    if other >= 0:
                        target[v] = z_t[text, ends[1][0] - 1, other]
            else:
                target[ids[text, token]] = 0
            where = torch.zeros_like(losses)
            where[text, token] = 1
            losses = losses + where * fastkd.reference.softmax_divergence(
                z_s[text, token - 1],
                target,
                divergence=divergence,
                temperature=2.0,
                reduction="sum",
            )
    return losses


@pytest.mark.parametrize("unmatched", ["label", "drop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_reverse_kl"])
def test_mined(unmatched, divergence):
    torch.manual_seed(3)
    s, ids, s_chunks, t, _, t_chunks = sides(batch=4, student=(14, 40), teacher=(14, 30))
    s_chunks[0], t_chunks[0] = (torch.arange(14).clamp(max=CHUNKS) for _ in range(2))
    s_chunks[0][CHUNKS:] = t_chunks[0][CHUNKS:] = -1  # one to one, the first token's unscored
    vocab_map = torch.randint(-1, 30, (38,))
    mask = torch.rand(ids.shape) < 0.8
    options = {"mask": mask, "unmatched": unmatched, "divergence": divergence, "temperature": 2.0}
    arguments = (ids, s_chunks, t, t_chunks, CHUNKS, vocab_map)
    losses = check_gradients(
        lambda a: recipes.mined(a, *arguments, **options, reduction="none"),
        lambda a: plain_mined(
            *(a, ids, s_chunks, t.double(), t_chunks, vocab_map, mask),
            unmatched == "drop",
            divergence,
        ),
        (s,),
    )
    assert (losses[0, 2:CHUNKS] != 0).equal(mask[0, 2:CHUNKS])
    torch.testing.assert_close(
        recipes.mined(s, *arguments, **options), losses.sum() / max(1, (losses != 0).sum())
    )


@pytest.mark.parametrize("length", [0, 8])
def test_mined_is_cross_entropy_without_matches(length):
    s, ids, chunks, t, _, t_chunks = sides()
    t, t_chunks = t[:, :length], t_chunks[:, :length]
    loss = recipes.mined(s, ids, chunks.fill_(-1), t, t_chunks, CHUNKS, torch.arange(40))
    torch.testing.assert_close(loss, F.cross_entropy(s[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


# ---- all of them


def small(dtype=torch.float64):
    """A problem for finite differences, and each recipe as a function of the student's side."""
    torch.manual_seed(1)
    s, ids, chunks, t, t_ids, t_chunks = sides(1, dtype, student=(5, 6), teacher=(4, 7))
    chunks[0], t_chunks[0] = torch.tensor([-1, 0, 0, 1, 2]), torch.tensor([-1, 0, 1, 2])
    places = {"student_chunks": chunks, "teacher_chunks": t_chunks, "num_chunks": CHUNKS}
    vocabs, hidden = (vocab_of(6), vocab_of(7)), logits((1, 4, 6), dtype)
    return s, {
        "alm": lambda x: recipes.alm(
            x, ids, chunks, t, t_ids, t_chunks, CHUNKS, *vocabs, temperature=2.0
        ),
        "alm_latents": lambda x: recipes.alm_latents(x, hidden, chunks, t_chunks, CHUNKS),
        "uld": lambda x: recipes.uld(x, t, **places, temperature=2.0),
        "mined": lambda x: recipes.mined(
            x, ids, chunks, t, t_chunks, CHUNKS, torch.tensor([3, 2, -1, 0, 3, 1]), divergence="jsd"
        ),
    }


RECIPES = ("alm", "alm_latents", "uld", "mined")


@pytest.mark.parametrize("name", RECIPES)
def test_gradcheck(name):
    leaf, functions = small()
    assert torch.autograd.gradcheck(functions[name], leaf.requires_grad_())
    assert torch.autograd.gradgradcheck(functions[name], leaf)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    leaf, functions = small(dtype)
    leaf.requires_grad_()
    loss = functions[name](leaf)
    assert loss.dtype == torch.float32
    (loss * 8).backward()
    exact = small(dtype)[0].double().requires_grad_()
    (functions[name](exact) * 8).backward()
    assert leaf.grad.dtype == dtype
    assert relative_error(leaf.grad, exact.grad) < 2e-2


@pytest.mark.parametrize("name", RECIPES)
def test_strides_repetition_and_no_grad(name):
    leaf, functions = small()
    strided = torch.empty(*leaf.shape[:-1], 2 * leaf.size(-1), dtype=leaf.dtype)[..., ::2]
    strided.copy_(leaf)
    found = []
    for x in (leaf, strided):
        x.requires_grad_()
        loss = functions[name](x)
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * once)
        found.append(once)
        with torch.no_grad():
            assert functions[name](x) == loss
    torch.testing.assert_close(*found)


def test_reductions():
    s, _, s_chunks, t, _, t_chunks = sides()
    arguments = (s, t[..., :40], s_chunks, t_chunks, CHUNKS)
    losses = recipes.alm_latents(*arguments, reduction="none")
    for options, right in (
        ({"reduction": "sum"}, losses.sum()),
        ({"reduction": "batchmean"}, losses.sum() / 3),
        ({"reduction": "elementmean"}, losses.mean()),
        ({"normalizer": 7.0}, losses.sum() / 7),
        ({"normalizer": torch.tensor(0)}, torch.tensor(0.0)),
    ):
        torch.testing.assert_close(recipes.alm_latents(*arguments, **options), right)


def errors():
    """Arguments to change, the recipe, the error, its message."""
    s, ids, chunks, t, t_ids, t_chunks = sides()
    vocabs, vocab_map = (vocab_of(40), vocab_of(60)), torch.arange(40)
    alm = (recipes.alm, [s, ids, chunks, t, t_ids, t_chunks, CHUNKS, *vocabs])
    latents = (recipes.alm_latents, [s, t[..., :40], chunks, t_chunks, CHUNKS])
    uld = (recipes.uld, [s[:, :8], t])
    mined = (recipes.mined, [s, ids, chunks, t, t_chunks, CHUNKS, vocab_map])
    places = {"student_chunks": chunks, "teacher_chunks": t_chunks, "num_chunks": CHUNKS}
    bad, leaf = chunks + 1, t.clone().requires_grad_()
    yield *alm, {0: None}, {}, TypeError, "alm: student_logits must be a tensor, got NoneType"
    yield *alm, {0: s[0]}, {}, ValueError, r"alm: student_logits must be \[11, length, width\], got"
    yield *alm, {3: t[:2]}, {}, ValueError, r"alm: teacher_logits must be \[3, length, width\]"
    yield *alm, {1: ids[:, 1:]}, {}, ValueError, r"alm: student_ids must have shape \[3, 11\], got"
    yield *alm, {5: t_chunks.float()}, {}, TypeError, "alm: teacher_chunks must be int64 or int32"
    yield *alm, {6: 2.0}, {}, TypeError, "alm: num_chunks must be an integer, got float"
    yield *alm, {6: -1}, {}, ValueError, "alm: num_chunks must not be negative, got -1"
    yield (
        *alm,
        {7: [b"a"]},
        {},
        TypeError,
        "alm: student_vocab must be a fastkd.ByteVocab, got list",
    )
    yield *alm, {2: bad.fill_(9)}, {}, IndexError, "alm_loss: student_chunks .*9"
    yield *alm, {}, {"student_mask": ids}, ValueError, "alm: student_mask must be bool"
    yield *alm, {}, {"divergence": "kl"}, ValueError, "alm_loss: divergence must be one of"
    yield *latents, {}, {"norm": "l3"}, ValueError, "alm_latents: norm must be one of l2_channelw"
    yield *latents, {1: t}, {}, ValueError, "alm_latents: student_hidden must have .* 60 channels"
    yield *latents, {2: bad}, {}, IndexError, r"alm_latents: student_chunks must lie in \[-1, 6\)"
    yield *latents, {}, {"reduction": "all"}, ValueError, "alm_latents: reduction must be one of"
    yield *uld, {0: s}, {}, ValueError, r"uld: teacher_logits must have .*\[3, 11\], got \[3, 8\]"
    yield *uld, {1: leaf}, {}, ValueError, "uld: teacher_logits takes no gradient"
    yield *uld, {}, {"temperature": 0.0}, ValueError, "uld: temperature must be positive"
    yield *uld, {}, {"num_chunks": 3}, ValueError, "uld: student_chunks, .* got 1 of them"
    yield *uld, {}, {"mask": ids}, ValueError, "uld: mask must be bool"
    yield *uld, {}, places, ValueError, r"uld: student_chunks must have shape \[3, 8\]"
    yield *mined, {6: torch.arange(41)}, {}, ValueError, r"mined: vocab_map must be .* got .*\[41\]"
    yield *mined, {6: vocab_map + 21}, {}, IndexError, r"mined: vocab_map must lie in \[-1, 60\)"
    yield *mined, {1: ids - 40}, {}, IndexError, r"mined: student_ids must lie in \[0, 40\)"
    yield *mined, {}, {"unmatched": "no"}, ValueError, "mined: unmatched must be label or drop"
    yield *mined, {}, {"divergence": "reverse_kl"}, ValueError, "mined: unmatched must be drop"
    yield *mined, {3: leaf}, {}, ValueError, "mined: teacher_logits takes no gradient"
    yield *mined, {}, {"mask": ids > 0, "beta": 2.0}, ValueError, "softmax_divergence: beta"


def test_errors():
    for function, arguments, changes, options, error, message in errors():
        arguments = [changes.get(place, x) for place, x in enumerate(arguments)]
        with pytest.raises(error, match=message):
            function(*arguments, **options)
