"""What byte_log_probs moves on CUDA, counted by the emulator: one read, and one for the gradient.

A team reads the vocabulary's table once for all its rows, in accesses of 2 bytes; the emulator
runs two teams. What more rows move beyond what two do is without the table.
"""

from functools import cache

import emulator
import numpy as np
import pytest
import torch
from cases import allowed_error, logits
from raw import byte_arguments
from torch.autograd import grad

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
TEAMS = 2


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


@cache
def vocabulary(size, spaces=0.4):
    """Two bytes an id; many begin with a space, 20 are special."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, size).astype(np.uint8)
    first[generator.random(size) < spaces] = ord(" ")
    tokens = [bytes([x, i % 251]) for i, x in enumerate(first)]
    return fastkd.ByteVocab(tokens, special={"special": range(0, size, -(-size // 20))})


def forward(rows, vocab, dtype, **options):
    """Traffic of one call, and the size of a row."""
    scores = logits((rows, len(vocab)), dtype)
    found = emulator.traffic_of(lambda: fastkd.byte_log_probs(scores, vocab, **options))
    return found, scores.element_size() * len(vocab)


def backward(rows, vocab, dtype, weight=1.0, **options):
    """The same of the gradient."""
    leaf = logits((rows, len(vocab)), dtype).requires_grad_()
    out = fastkd.byte_log_probs(leaf, vocab, **options)
    upstream = torch.where(out.isfinite(), weight, 0.0)
    found = emulator.traffic_of(lambda: grad(out, leaf, upstream))
    return found, leaf.element_size() * len(vocab)


def per_row(run, *arguments, **options):
    """What a row moves without the table, in all and in 16-byte accesses, and the row's size."""
    few, size = run(TEAMS, *arguments, **options)
    more, _ = run(2 * TEAMS, *arguments, **options)
    wide = [x.read_16 + x.written_16 for x in (few, more)]
    return (more.moved - few.moved) / TEAMS, (wide[1] - wide[0]) / TEAMS, size


@pytest.mark.parametrize("dtype", WIDE)
def test_cluster_reads_once(dtype):
    vocab = vocabulary(QWEN)
    moved, wide, row = per_row(forward, vocab, dtype)
    assert moved <= 1.02 * row
    assert row <= wide
    found, _ = forward(1, vocab, dtype)
    assert found.largest_cluster > 1
    assert found.launches == 1
    assert found.moved <= 1.02 * row + 4 * len(vocab)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_team_reads_the_table_once(dtype):
    vocab = vocabulary(QWEN)
    moved, _, _ = per_row(forward, vocab, dtype)
    found, _ = forward(TEAMS, vocab, dtype)
    assert found.moved - TEAMS * moved <= TEAMS * 4 * len(vocab)
    moved, _, _ = per_row(backward, vocab, dtype)
    found, _ = backward(TEAMS, vocab, dtype)
    assert found.moved - TEAMS * moved <= TEAMS * 2 * len(vocab)


@pytest.mark.parametrize("size", [32_000, 50_257, 128_256, QWEN, 262_144])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("capability", [90, 100])
def test_real_vocabularies_stay_on_chip(capability, dtype, size):
    emulator.configure(capability)
    vocab = vocabulary(size)
    found, row = forward(1, vocab, dtype)
    assert found.launches == 1
    assert found.read <= 1.01 * row + 4 * size


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 120])
def test_without_clusters_rows_are_read_once_too(capability, dtype):
    """Sums of slices go through global memory: 8 bytes a column and slice, up to an eighth more."""
    emulator.configure(capability)
    vocab = vocabulary(QWEN)
    found, row = forward(2, vocab, dtype)
    if capability < 90:
        assert found.largest_cluster == 1
        assert found.launches == 2
    assert found.read_16 == 2 * row
    assert found.moved <= 1.13 * 2 * row + TEAMS * 4 * len(vocab)


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("size", [4096, 10_000])
def test_rows_that_fit_into_one_block_take_one_launch(capability, size):
    emulator.configure(capability)
    vocab = vocabulary(size)
    found, row = forward(TEAMS, vocab, torch.bfloat16)
    assert found.launches == 1
    assert found.read <= TEAMS * (row + 4 * size) + 2000


@pytest.mark.parametrize("dtype", WIDE)
def test_gradient_is_one_read_and_one_write(dtype):
    vocab = vocabulary(QWEN)
    moved, wide, row = per_row(backward, vocab, dtype)
    assert moved <= 1.02 * 2 * row
    assert wide >= 2 * row
    found, _ = backward(1, vocab, dtype)
    assert found.launches == 1


def test_rows_off_16_byte_lines_still_move_in_packs():
    """50,257 bfloat16 columns: each row begins elsewhere in a line."""
    vocab = vocabulary(50_257)
    for run, times in ((forward, 1), (backward, 2)):
        found, row = run(8, vocab, torch.bfloat16)
        assert found.read_16 + found.written_16 >= 0.99 * 8 * times * row
        assert found.moved <= 1.05 * 8 * times * row + TEAMS * 4 * len(vocab)


def test_rows_without_a_gradient_are_not_read():
    vocab = vocabulary(QWEN)
    found, row = backward(3, vocab, torch.float32, weight=0.0)
    assert found.read <= 0.02 * 3 * row
    assert found.written == 3 * row


def test_of_another_prefix_only_its_ids_are_read():
    vocab = vocabulary(QWEN)
    ids = sum(x is not None and x[0] == 7 for x in vocab.tokens)
    found, row = forward(1, vocab, torch.float32, prefix=b"\x07")
    assert found.launches == 1
    assert found.read <= 8 * ids + 4096
    found, _ = backward(1, vocab, torch.float32, prefix=b"\x07")
    assert found.read <= 0.05 * row
    assert found.written <= row + 4 * ids


@pytest.mark.parametrize("capability", [80, 90])
def test_impossible_ids_are_not_looked_for(capability):
    """A column that a mask empties is -inf; only one that is tiny is summed by itself."""
    emulator.configure(capability)
    vocab = vocabulary(QWEN)
    first = torch.tensor(vocab.columns)
    scores = logits((1, QWEN))

    def read(change, columns):
        changed = torch.where((first == columns[0]) | (first == columns[1]), change, scores)
        found = emulator.traffic_of(lambda: fastkd.byte_log_probs(changed, vocab))
        out = fastkd.byte_log_probs(changed, vocab)
        exact = fastkd.reference.byte_log_probs(changed.double(), vocab)
        torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=4e-6)
        return found.read

    plain = read(0.0, (-1, -1))
    assert read(-torch.inf, (7, 32)) == plain
    ids = ((first == 7) | (first == 8)).sum().item()
    for tiny in (-150.0, -1e5):
        assert plain < read(tiny, (7, 8)) <= plain + 8 * ids + 2 * 32 * 8


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("size", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(capability, size):
    vocab, scores = vocabulary(size), logits((3, size)).requires_grad_()
    found = []
    for seed in (0, 1, 2):
        emulator.configure(capability, seed)
        out = fastkd.byte_log_probs(scores, vocab, prefix=[b"", b" ", b""])
        kept = torch.where(out.isfinite(), out, 0)
        found.append((out.detach(), *grad((kept * torch.arange(258)).sum(), scores)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def assert_right(scores, vocab, **options):
    """Values and gradients against float64."""
    exact_scores = scores.detach().double().requires_grad_()
    scores = scores.detach().requires_grad_()
    out = fastkd.byte_log_probs(scores, vocab, **options)
    exact = fastkd.reference.byte_log_probs(exact_scores, vocab, **options)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=4e-6, equal_nan=True)
    weights = torch.where(exact.isfinite(), torch.randn_like(exact), 0)
    (mine,) = grad(out, scores, weights.float())
    (right,) = grad(torch.where(exact.isfinite(), exact, 0), exact_scores, weights)
    assert (mine.double() - right).norm() <= allowed_error(right, scores.dtype)


@pytest.mark.parametrize("layout", ["lines", "off lines, masked", "strided"])
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_long_rows(capability, layout):
    """Rows of two prefixes: the empty one, of which one team has two, and another."""
    emulator.configure(capability)
    vocab, prefixes = vocabulary(QWEN), [b"", b" ", b""]
    if layout == "lines":
        assert_right(logits((3, QWEN)), vocab, prefix=prefixes)
    elif layout == "strided":
        assert_right(logits((QWEN, 3)).t(), vocab, prefix=prefixes)
    else:
        valid = torch.rand(3, 1) + torch.rand(QWEN + 3) < 1.5
        assert_right(logits((3, QWEN + 3)).bfloat16(), vocab, prefix=prefixes, valid=valid)


@pytest.mark.parametrize("capability", [75, 86, 90])
@pytest.mark.parametrize("size", [2000, 20_000])
def test_many_classes(capability, size):
    """As many columns as there may be."""
    emulator.configure(capability)
    tokens = [bytes([i % 256, i // 256 % 256]) for i in range(size)]
    classes = {f"class {i}": [2 * i] for i in range(1024 - 257)}
    vocab = fastkd.ByteVocab(tokens, special=classes)
    assert vocab.num_columns == 1024
    assert_right(logits((2, size)), vocab, prefix=[b"", b"\x07"])


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("same", [False, True])
def test_long_columns_are_summed_exactly(capability, same):
    """Nearly all ids in one column, whose logits add up with roundings of one sign."""
    emulator.configure(capability)
    vocab = vocabulary(QWEN, spaces=0.99)
    scores = torch.full((1, QWEN), -0.7) if same else logits((1, QWEN))
    scores[0, 5] = 3.3
    sums = torch.ops.fastkd._byte_log_probs(scores, *byte_arguments(scores, vocab, b"", None))[1]
    column = torch.tensor(vocab.columns).long()
    for c in (ord(" "), 7, 257):
        exact = scores[0, column == c].double().logsumexp(-1)
        assert abs(sums[0, c] + sums[0, -1] - exact) < 1e-6
    assert sums[0, -1] == scores.max()
    assert abs(sums[0, -2] + sums[0, -1] - scores[0].double().logsumexp(-1)) < 1e-6


def test_slices_far_apart():
    """A column that lies in slices whose logits are beyond float32's exponents."""
    vocab = vocabulary(QWEN)
    scores = logits((2, QWEN))
    scores[:, 40_000:] -= 1e4
    scores[1] = scores[1].flip(-1)
    for capability in (80, 90):
        emulator.configure(capability)
        found = fastkd.byte_log_probs(scores, vocab)
        exact = fastkd.reference.byte_log_probs(scores.double(), vocab)
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("prefix", [b"", b" "])
def test_broken_tables_are_not_followed(prefix):
    """Places and columns far outside: nothing is read there."""
    vocab, scores = vocabulary(5000), logits((3, 5000))
    far = 2**31 - 1
    for place, value in ((0, far), (0, -far), (1, 32767), (1, -1), (2, far), (2, -far)):
        arguments = list(byte_arguments(scores, vocab, prefix, None))
        arguments[place] = arguments[place].clone()
        arguments[place].view(-1)[1::3] = value
        out, sums = torch.ops.fastkd._byte_log_probs(scores, *arguments)
        gradient = torch.zeros_like(scores)
        weights = torch.ones_like(out)
        backward = torch.ops.fastkd._byte_log_probs_backward_into
        backward(gradient, sums, weights, scores, *arguments)


def test_prefixes_no_check_could_see_become_nan():
    vocab, scores = vocabulary(300), logits((5, 300)).requires_grad_()
    arguments = list(byte_arguments(scores, vocab, [b"", b" ", b"", b" ", b""], None))
    arguments[3] = torch.where(torch.tensor([0, 1, 0, 1, 1]) > 0, torch.tensor(7), arguments[3])
    arguments[3][1] = -1
    for whole in (arguments[4], -1, 7):
        arguments[4] = whole
        out, _ = torch.ops.fastkd._byte_log_probs(scores, *arguments)
        assert out.isnan().all(-1).tolist() == [False, True, False, True, True]


def test_a_vocabulary_without_ids():
    leaf = logits((2, 3)).requires_grad_()
    out = fastkd.byte_log_probs(leaf, fastkd.ByteVocab([]))
    assert out.isnan().all()
    (gradient,) = grad(out, leaf, torch.zeros_like(out))
    assert not gradient.any()


def test_float64_is_for_the_cpu():
    with pytest.raises(TypeError, match="byte_log_probs: float64 logits are supported on the CPU"):
        fastkd.byte_log_probs(logits((2, 300)).double(), vocabulary(300))
