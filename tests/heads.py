"""Hidden states and heads, for the tests of linear heads."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd._ops.linear import driver


def head(rows, features, vocab, dtype=torch.float64, bias=True):
    """Hidden states, weight and bias that require gradients."""
    rows = (rows,) if isinstance(rows, int) else rows
    hidden = torch.randn(*rows, features, dtype=torch.float64)
    weight = torch.randn(vocab, features, dtype=torch.float64) * 0.7
    parts = [hidden, weight, torch.randn(vocab, dtype=torch.float64)][: 3 if bias else 2]
    return [x.to(dtype).requires_grad_() for x in parts]


def gradients(result, inputs, seed=1, **options):
    """Gradients of a result for random gradients of its own."""
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    results = [x for x in results if x is not None and x.requires_grad]
    random = torch.Generator().manual_seed(seed)
    given = [torch.randn(x.shape, generator=random).to(x.dtype) for x in results]
    return torch.autograd.grad(results, inputs, given, **options)


def compiled(function, backend="aot_eager"):
    """One graph, and the counter of graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, and their sizes."""

    def __init__(self):
        super().__init__()
        self.operations, self.calls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.size(0) * left.size(1) * right.size(1)
            self.calls += 1
        elif name.startswith("_bfloat16_") and name != "_bfloat16_capability":
            left, right = args[1:3]
            self.operations += (
                2 * left.size(0) * left.size(1) * right.size(0 if "logits" in name else 1)
            )
            self.calls += 1
        return function(*args, **(kwargs or {}))


def count_products(monkeypatch):
    """Count the products of all calls from now on."""
    counter, plain = Products(), driver._plain

    class Both:
        def __init__(self, device):
            self.plain = plain(device)

        def __enter__(self):
            self.plain.__enter__()
            counter.__enter__()

        def __exit__(self, *error):
            counter.__exit__(*error)
            self.plain.__exit__(*error)

    monkeypatch.setattr(driver, "_plain", Both)
    return counter
