"""The loss in docs/trainers.md against transformers' own: shift, accumulation, processes."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from group_end import leave
from transformers.loss.loss_utils import ForCausalLMLoss

import fastkd

VOCAB, PADDED = 50, 64


def batches(count=4):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (count, 2, 9), generator=generator)
    ids[1, :, :5] = -100  # prompts of unequal length
    ids[3, 0, :7] = -100
    return ids


def items(labels):
    """num_items_in_batch, as the Trainer counts it."""
    return int((labels[..., 1:] != -100).sum())


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 8)
        self.head = torch.nn.Linear(8, PADDED)

    def forward(self, ids):
        return self.head(self.embed(ids.clamp(min=0)))


def fused(logits, labels, count):
    """The label's term alone: the divergence of a student from itself is 0."""
    loss = fastkd.softmax_divergence(
        logits,
        logits.detach().clone(),
        labels=labels,
        vocab_size=VOCAB,
        shift=1,
        normalizer=count,
        inplace=True,
    )
    return loss


def own(logits, labels, count):
    return ForCausalLMLoss(logits[..., :VOCAB], labels, VOCAB, num_items_in_batch=count)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_one_process(accumulate):
    found, right = Student(), Student()
    labels = batches()
    for start in range(0, 4, accumulate):
        micro = labels[start : start + accumulate]
        for model, loss in ((found, fused), (right, own)):
            model.zero_grad()
            total = sum(loss(model(ids), ids, items(micro)) for ids in micro)
            total.backward()
            model.total = total.item()
        assert found.total == pytest.approx(right.total, rel=1e-5)
        for name, gradient in gradients(right).items():
            torch.testing.assert_close(gradients(found)[name], gradient, rtol=1e-4, atol=1e-6)


def _process(rank, port, queue):
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    labels, model = batches(), Student()
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    mine = labels[2 * rank : 2 * rank + 2]  # two micro-batches of one step
    with wrapped.no_sync():
        fused(wrapped(mine[0]), mine[0], items(labels) / 2).backward()
    fused(wrapped(mine[1]), mine[1], items(labels) / 2).backward()
    if rank == 0:
        queue.put({name: x.numpy() for name, x in gradients(wrapped.module).items()})
        queue.close()
        queue.join_thread()
    leave()


def test_two_processes():
    """DDP averages gradients: the normalizer is num_items_in_batch / num_processes."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_process, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=300)
    for worker in workers:
        worker.join()
    model, labels = Student(), batches()
    sum(own(model(ids), ids, items(labels)) for ids in labels).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(torch.from_numpy(found[name]), gradient, rtol=1e-4, atol=1e-6)


def test_inplace_with_shift_needs_no_second_table():
    """The gradient lies in the logits' own memory, and covers all of them."""
    logits = torch.randn(2, 5, PADDED).requires_grad_()
    student = logits * 1
    loss = fused(student, torch.randint(0, VOCAB, (2, 5)), 8)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() == student.data_ptr()
    assert gradient.shape == student.shape
    assert not gradient[:, -1].any()
    assert not gradient[..., VOCAB:].any()
