"""Two processes run a loss through wrapped models; run as a script by test_call_through.py."""

import json
import os
import sys

import torch
import torch.distributed as dist
from group_end import leave
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.integrations import call_through, normalizer
from fastkd.integrations._modules import unwrapped

WORLD, VOCAB, WIDTH, TEXTS, LENGTH = 2, 23, 8, 4, 5


class Model(nn.Module):
    def __init__(self, tied, spare):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if spare:
            self.unused = nn.Linear(2, 2)

    def hidden(self, ids):
        return self.norm(torch.tanh(self.block(self.embedding(ids))))

    def forward(self, ids):
        return self.head(self.hidden(ids))


def ddp(model):
    return DistributedDataParallel(model)


def ddp_unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp_root(model):
    return fully_shard(model)


def fsdp_own_unit(model):
    fully_shard(model.head)
    return fully_shard(model)


def fsdp_norm_and_head(model):
    fully_shard([model.norm, model.head])
    return fully_shard(model)


def fsdp_tied_group(model):
    fully_shard([model.embedding, model.norm, model.head])
    return fully_shard(model)


#: How a model is wrapped, whether its head is the embedding, whether a layer is unused.
CASES = {
    "ddp": (ddp, False, False),
    "ddp, unused parameters": (ddp_unused, False, True),
    "ddp, tied": (ddp, True, False),
    "fsdp2, root": (fsdp_root, False, False),
    "fsdp2, head its own unit": (fsdp_own_unit, False, False),
    "fsdp2, norm and head": (fsdp_norm_and_head, False, False),
    "fsdp2, tied": (fsdp_root, True, False),
    "fsdp2, tied, a group": (fsdp_tied_group, True, False),
}


def texts():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (TEXTS, LENGTH), generator=random)
    labels = torch.randint(VOCAB, (TEXTS, LENGTH), generator=random)
    labels[torch.rand(TEXTS, LENGTH, generator=random) < 0.4] = -100
    return ids, labels


def fresh(tied, spare):
    torch.manual_seed(1)
    return Model(tied, spare).double()


def loss_of(model, ids, labels, count, nested=True):
    inner = unwrapped(model)
    random = torch.Generator().manual_seed(2)
    table, weight = (torch.randn(VOCAB, 3, dtype=torch.float64, generator=random) for _ in range(2))

    def from_hidden(hidden):
        return fastkd.linear_softmax_divergence(
            hidden,
            inner.head.weight,
            table[ids],
            weight,
            labels=labels,
            label_weight=0.5,
            reduction="sum",
            normalizer=count,
        )

    def whole(ids):
        hidden = inner.hidden(ids)
        return call_through(inner.head, from_hidden, hidden) if nested else from_hidden(hidden)

    return call_through(model, whole, ids)


def gradients(model):
    found = {}
    for name, parameter in unwrapped(model).named_parameters():
        gradient = parameter.grad
        if gradient is not None and hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        if gradient is not None:
            found[name] = gradient
    return found


def error(ours, truth):
    if set(ours) != set(truth):
        return f"gradients of {sorted(ours)} instead of {sorted(truth)}"
    return max(((ours[n] - truth[n]).norm() / truth[n].norm()).item() for n in truth)


def run(rank):
    ids, labels = texts()
    share = slice(rank * TEXTS // WORLD, (rank + 1) * TEXTS // WORLD)
    found = {}
    for name, (wrap, tied, spare) in CASES.items():
        plain = fresh(tied, spare)
        kept = (labels != -100).sum()
        whole = loss_of(plain, ids, labels, kept)
        whole.backward()
        model = wrap(fresh(tied, spare))
        count = normalizer(labels[share], shift=False)
        loss = loss_of(model, ids[share], labels[share], count)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found[name] = {
            "gradient": error(gradients(model), gradients(plain)),
            "loss": abs((total / WORLD - whole).item() / whole.item()),
            "forward": list(unwrapped(model)(ids[share]).shape) if "ddp" in name else None,
        }
    model = fsdp_own_unit(fresh(False, False))
    try:
        loss_of(model, ids[share], labels[share], count, nested=False).backward()
        found["outer call alone"] = {"gradient": error(gradients(model), gradients(plain))}
    except Exception as problem:
        found["outer call alone"] = {"gradient": type(problem).__name__}
    return found


def start(rank, folder):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    found = run(rank)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    leave()


if __name__ == "__main__":
    start(int(sys.argv[1]), sys.argv[2])
