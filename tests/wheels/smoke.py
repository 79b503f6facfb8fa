"""Does the installed fastkd work? One call of each family, compared with its definition.

    python tests/wheels/smoke.py

Needs torch, numpy and fastkd, nothing else; run it outside the source folder to try a wheel.
"""

import sys
from pathlib import Path

import torch

import fastkd
from fastkd import reference

# `python tests/wheels/smoke.py` puts only tests/wheels on the path, so fastkd is the installed one.
assert Path(__file__).parents[2] not in Path(fastkd.__file__).parents, fastkd.__file__


def check(name, found, right):
    torch.testing.assert_close(found.double(), right.double(), rtol=1e-5, atol=1e-6, msg=name)


def main():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5000), torch.randn(3, 5000)
    exact = [x.double().requires_grad_() for x in (student, teacher)]
    both = [x.clone().requires_grad_() for x in (student, teacher)]
    for divergence in ("forward_kl", "jsd", "tvd"):
        found = fastkd.softmax_divergence(*both, divergence=divergence)
        right = reference.softmax_divergence(*exact, divergence=divergence)
        check(divergence, found.detach(), right.detach())
        for mine, its in zip(
            torch.autograd.grad(found, both), torch.autograd.grad(right, exact), strict=True
        ):
            check(f"{divergence}'s gradient", mine, its)
    best = fastkd.teacher_topk(teacher, 16)
    check("teacher_topk", best.log_probs, teacher.double().log_softmax(-1).topk(16).values)
    right = reference.topk_divergence(student.double(), best.log_probs.double(), best.indices)
    check("topk_divergence", fastkd.topk_divergence(student, *best), right)
    tokens = [bytes([i % 256, i // 256]) for i in range(5000)]
    vocab = fastkd.ByteVocab(tokens)
    log_probs = fastkd.byte_log_probs(student, vocab)
    check("byte_log_probs", log_probs, reference.byte_log_probs(student.double(), vocab))
    layer = fastkd.nn.ACM(32, 16, num_learners=3, width=16)
    assert layer(torch.randn(4, 32)).isfinite().all()
    print(f"fastkd {fastkd.__version__} on torch {torch.__version__}: works", file=sys.stderr)


if __name__ == "__main__":
    main()
