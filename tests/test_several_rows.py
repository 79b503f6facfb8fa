"""Teams that take several rows one after another: they find what teams of one row each find.

Grids that are limited only by 2^31 blocks leave a team one row, so the emulator limits them.
"""

import emulator
import pytest
import torch
from cases import logits, top_k

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

LABELS = torch.tensor(
    [3, -100, 5, 7, -100, 2, 0, 9, -100, -100, 4, 1, 6]
)  # -100: a row is not read
OPS = {
    "softmax_divergence": lambda z, w: fastkd.softmax_divergence(z, w, divergence="jsd"),
    "topk_divergence": lambda z, w: fastkd.topk_divergence(z, *top_k(tuple(z.shape), 20)),
    "clipped_divergence": lambda z, w: fastkd.clipped_divergence(z, w, 1e-6, 0.5),
    "cross_entropy": lambda z, w: fastkd.cross_entropy(z, LABELS[: len(z)]),
    "token_stats": lambda z, w: fastkd.token_stats(z, w).forward_kl.sum(),
    "teacher_topk": lambda z, w: fastkd.teacher_topk(z, 20)[0].sum(),
}


@pytest.fixture(params=[90, 80], ids=["sm_90", "sm_80"])
def limit(request, monkeypatch):
    """Run with at most so many blocks; 0: without a limit."""
    monkeypatch.setattr(torch.ops, "fastkd", emulator.ops())
    emulator.configure(request.param)

    def run(blocks, call):
        emulator.library().simt_limit_grids(blocks or 2**31 - 1)
        return call()

    yield run
    emulator.library().simt_limit_grids(2**31 - 1)
    emulator.configure(90)


# Short rows, which have a warp each; a block; a cluster (on sm_80, rows that do not stay).
@pytest.mark.parametrize(("vocab", "rows", "blocks"), [(301, 13, 1), (3001, 5, 2), (30_001, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_several_rows_a_team(limit, op, dtype, vocab, rows, blocks):
    torch.manual_seed(0)
    student, teacher = logits((rows, vocab), dtype), logits((rows, vocab), dtype)
    seed = torch.random.get_rng_state()

    def call():
        torch.random.set_rng_state(seed)
        z = student.clone().requires_grad_(op not in ("token_stats", "teacher_topk"))
        value = OPS[op](z, teacher)
        if z.requires_grad:
            value.backward()
        return value.detach(), z.grad

    for found, expected in zip(limit(blocks, call), limit(0, call), strict=True):
        assert expected is None or torch.equal(found, expected)
