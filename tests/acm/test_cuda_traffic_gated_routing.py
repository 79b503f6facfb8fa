"""What gated routing moves on CUDA, counted by the emulator: the formulas of its kernels."""

import emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

# k is too short for parts.
ROWS, LEARNERS, D, WIDTH, OUT = 200, 3, 64, 32, 256
PACK, COLUMNS = 16, 128  # bytes of an access; a tile's columns
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _device():
    emulator.configure(90)


def problem(rows, dtype, n=LEARNERS, d=D, b=WIDTH, out=OUT):
    """x, w1, b1, w2 and choices: each learner runs, some rows run none, no count fills a tile."""
    shapes = (rows, d), (n, d, b), (n, b), (n, b, out)
    tensors = [(torch.randn(shape) * shape[-2] ** -0.5).to(dtype) for shape in shapes]
    return tensors, (torch.arange(rows) * (n + 1) // rows).flip(0)[torch.randperm(rows)]


def tiles(size, tile):
    return -(-size // tile)


class Counts:
    """Bytes that the kernels are to move, by the formulas of csrc/cuda/gated_routing.cuh."""

    def __init__(self, tensors, counts, tile_rows):
        x, w1, _, w2 = tensors
        self.size, self.tile_rows = x.element_size(), tile_rows
        self.rows = len(x)
        (self.n, self.d, self.b), self.out = w1.shape, w2.size(2)
        self.run = sum(counts)  # rows, over the learners
        self.row_tiles = sum(tiles(count, tile_rows) for count in counts)
        self.counts = counts

    def learners(self, depth):
        """Rows and weights read."""
        rows = self.run * depth * tiles(self.b, COLUMNS)
        return self.size * (rows + self.row_tiles * depth * self.b)

    def bias(self):
        """b1, by each thread its columns'."""
        threads = 256 if self.tile_rows == 128 else 128
        return self.row_tiles * threads // 16 * self.b * self.size

    def sums(self, columns):
        rows = self.run * self.b * tiles(columns, COLUMNS)
        return self.size * (rows + self.row_tiles * self.b * columns)

    def weights(self, lines, columns):
        return (
            self.size
            * self.run
            * (lines * tiles(columns, COLUMNS) + columns * tiles(lines, COLUMNS))
        )

    def scratch(self):
        return self.size * self.run * self.b


def measure(tensors, choices, keep=True):
    """Traffic of a forward call, its result, the pre-activations and the routes."""
    ops, found = emulator.ops(), []
    order, counts = ops._acm_route(choices, len(tensors[1]))
    run = lambda: found.append(ops._acm_rows(*tensors, None, order, counts, 3, keep))  # noqa: E731
    traffic = emulator.traffic_of(run)
    return traffic, *found[0], order, counts


def measure_backward(tensors, routes, kept, wanted):
    x, _, _, w2 = tensors
    grad = torch.randn(len(x), w2.size(2)).to(x.dtype)
    run = lambda: emulator.ops()._acm_rows_backward(grad, *tensors, *routes, kept, 3, *wanted)  # noqa: E731
    return emulator.traffic_of(run)


def narrow(traffic):
    """Bytes of routes: the accesses of 4 bytes."""
    return traffic.read - traffic.read_16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [False, True])
def test_forward(keep, dtype):
    tensors, choices = problem(ROWS, dtype)
    found, _, _, _, counts = measure(tensors, choices, keep)
    right = Counts(tensors, counts[:-1].tolist(), 128)
    assert 0 < counts[-2] < ROWS
    assert found.launches == 2
    assert found.read_16 == right.learners(D) + right.bias() + right.sums(OUT)
    assert found.written == found.written_16
    assert found.written == right.scratch() * (1 + keep) + ROWS * OUT * right.size
    assert narrow(found) <= 32 * ROWS * (LEARNERS + tiles(OUT, COLUMNS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(4))
def test_backward(number, dtype):
    """Of x, w1, b1 and w2 in turn: what is not wanted is not computed."""
    tensors, choices = problem(ROWS if dtype == torch.bfloat16 else 112, dtype, d=256, out=64)
    _, _, kept, *routes = measure(tensors, choices)
    right = Counts(tensors, routes[1][:-1].tolist(), 128)
    inner = right.learners(right.out) + right.scratch()
    read = (
        inner + right.sums(right.d),
        inner + right.weights(right.d, right.b),
        inner + right.scratch(),
        right.scratch() + right.weights(right.b, right.out),
    )[number]
    found = measure_backward(tensors, routes, kept, [i == number for i in range(4)])
    assert found.launches == 2
    assert found.read_16 == read
    assert found.written == right.scratch() + tensors[number].numel() * right.size
    assert found.written == found.written_16


@pytest.mark.parametrize("dtype", DTYPES)
def test_accesses_are_wide(dtype):
    """But for routes: lanes that load or add up 16 bytes of a row each ask for its number."""
    tensors, choices = problem(ROWS, dtype, d=512, b=256, out=512)
    found, _, kept, *routes = measure(tensors, choices)
    back = measure_backward(tensors, routes, kept, [True] * 4)
    for traffic, routes_share in ((found, 0.03), (back, 0.05)):
        assert traffic.written == traffic.written_16
        assert narrow(traffic) <= routes_share * traffic.moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_one_tile_of_rows_reads_everything_once(rows, dtype):
    tensors, _ = problem(rows, dtype, n=1, out=128)
    found, *_ = measure(tensors, torch.ones(rows, dtype=torch.int64), keep=False)
    right = Counts(tensors, [rows], 16 if rows <= 16 else 128)
    x, w1, _, w2 = (v.numel() * v.element_size() for v in tensors)
    assert found.launches == 2
    assert found.read_16 == x + w1 + w2 + right.bias() + right.scratch()
    assert found.written == right.scratch() + rows * 128 * right.size


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_in_parts_read_the_weights_once(dtype):
    """Decoding: the parts and their sums are little beside the weights."""
    tensors, _ = problem(1, dtype, n=4, d=1024, b=256, out=1024)
    found, *_ = measure(tensors, torch.full((1,), 4), keep=False)
    weights = sum(tensors[i].numel() * tensors[i].element_size() for i in (1, 3))
    assert found.launches == 4
    assert weights <= found.read <= 1.05 * weights
    assert found.written <= 0.05 * weights
    assert found.share_of_16 >= 0.99


def test_learners_that_nobody_runs_are_not_read():
    tensors, _ = problem(16, torch.bfloat16, n=4)
    read = []
    for choice in range(5):
        found, *_ = measure(tensors, torch.full((16,), choice), keep=False)
        right = Counts(tensors, [16] * choice, 16)
        read.append(found.read_16)
        assert found.read_16 == right.learners(D) + right.bias() + right.sums(OUT)
    assert read[0] == 0


@pytest.mark.parametrize("learners", [1, 5, 300])
def test_routing_reads_choices_twice(learners):
    choices = torch.randint(0, learners + 1, (5000,))
    found = emulator.traffic_of(lambda: emulator.ops()._acm_route(choices, learners))
    assert found.launches == 1
    assert found.read == 2 * choices.numel() * 8
    assert found.written == choices.numel() * 4 + (learners + 1) * 4


@pytest.mark.parametrize("capability", [75, 80, 86, 120])
def test_other_devices_move_the_same(capability):
    tensors, choices = problem(ROWS, torch.bfloat16)
    found = [measure(tensors, choices)[0]]
    emulator.configure(capability)
    found.append(measure(tensors, choices)[0])
    assert found[0].read == found[1].read
    assert found[0].written == found[1].written
