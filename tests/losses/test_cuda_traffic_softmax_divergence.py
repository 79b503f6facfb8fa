"""What the CUDA kernels move, counted by the emulator: the promise of two reads and one write."""

import emulator
import pytest
import torch
from cases import DIVERGENCES, logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
TRIPLES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def moved(student, teacher, **options):
    """Traffic of one call, and the size of one logits tensor."""
    options = {"reduction": "batchmean"} | options
    found = emulator.traffic_of(lambda: fastkd.softmax_divergence(student, teacher, **options))
    return found, student.numel() * student.element_size()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cluster_reads_each_input_once_and_writes_once(divergence, dtype):
    student = logits((2, QWEN), dtype).requires_grad_()
    found, tensor = moved(student, logits((2, QWEN), dtype), divergence=divergence)
    assert found.largest_cluster > 1
    assert found.moved <= 1.02 * 3 * tensor
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("dtype", WIDE)
def test_decoupled_kl_reads_the_label_beside_its_row(dtype):
    labels = torch.tensor([0, QWEN - 3])
    options = {"divergence": "decoupled_kl", "labels": labels, "beta": 8.0}
    for weight in (0.0, 0.3):
        student = logits((2, QWEN), dtype).requires_grad_()
        found, tensor = moved(student, logits((2, QWEN), dtype), label_weight=weight, **options)
        assert found.moved <= 1.02 * 3 * tensor
        assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("dtype", WIDE)
def test_rows_of_a_shared_teacher_are_not_copied(dtype):
    rows = torch.tensor([1, 1, 0])
    student = logits((3, QWEN), dtype).requires_grad_()
    found, tensor = moved(student, logits((2, QWEN), dtype), teacher_rows=rows)
    assert found.moved <= 1.02 * 3 * tensor
    assert found.share_of_16 >= 0.98  # all threads read which row is the teacher's


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_alone_reads_each_input_once(divergence, dtype):
    found, tensor = moved(logits((2, QWEN), dtype), logits((2, QWEN), dtype), divergence=divergence)
    assert found.moved <= 1.02 * 2 * tensor
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    ("divergence", "reads"), [("forward_kl", 4), ("reverse_kl", 4), ("jsd", 6), ("tvd", 6)]
)
def test_without_clusters_rows_are_read_again(divergence, reads, dtype):
    """Two passes; a mixture needs its normalisers before its sums, and takes a third."""
    emulator.configure(80)
    student = logits((2, QWEN), dtype).requires_grad_()
    found, tensor = moved(student, logits((2, QWEN), dtype), divergence=divergence)
    assert found.largest_cluster == 1
    assert found.moved <= 1.02 * (reads + 1) * tensor
    assert found.share_of_16 >= 0.99
    alone, _ = moved(student.detach(), logits((2, QWEN), dtype), divergence=divergence)
    assert alone.moved <= 1.02 * (reads - 2) * tensor


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("vocab", [1000, 4096, 10_000])
def test_rows_that_fit_into_one_block_are_read_once_everywhere(capability, vocab):
    emulator.configure(capability)
    student = logits((3, vocab), torch.bfloat16).requires_grad_()
    found, tensor = moved(student, logits((3, vocab), torch.bfloat16), divergence="jsd")
    assert found.moved <= 1.02 * 3 * tensor


@pytest.mark.parametrize("vocab", [32_000, 49_152, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("capability", [90, 100])
def test_real_vocabularies_stay_on_chip(capability, dtype, vocab):
    emulator.configure(capability)
    student = logits((1, vocab), dtype).requires_grad_()
    found, tensor = moved(student, logits((1, vocab), dtype))
    assert found.moved <= 1.02 * 3 * tensor


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("vocab", [QWEN, 50_257])
def test_two_dtypes_move_in_packs(dtypes, vocab):
    """Packs of four elements: 16 bytes of float32, 8 bytes of 16-bit logits."""
    student = logits((4, vocab), dtypes[0]).requires_grad_()
    teacher = logits((4, vocab), dtypes[1])
    found, tensor = moved(student, teacher)
    narrow = student if student.element_size() == 2 else teacher
    sizes = 2 * tensor + teacher.numel() * teacher.element_size()
    assert found.moved <= 1.02 * sizes
    rows_of_8 = 2 * narrow.numel() * (2 if narrow is student else 1)
    assert found.share_of_16 >= 0.99 * (1 - rows_of_8 / sizes)


def test_rows_off_16_byte_lines_still_move_in_packs():
    """50,257 bfloat16 columns: each row begins elsewhere in a line."""
    student = logits((8, 50_257), torch.bfloat16).requires_grad_()
    found, tensor = moved(student, logits((8, 50_257), torch.bfloat16))
    assert found.moved <= 1.02 * 3 * tensor
    assert found.share_of_16 >= 0.99


def test_both_gradients():
    student, teacher = logits((2, QWEN)).requires_grad_(), logits((2, QWEN)).requires_grad_()
    found, tensor = moved(student, teacher, divergence="jsd")
    assert found.moved <= 1.02 * 4 * tensor


def test_masked_rows_are_not_read():
    student = logits((4, QWEN)).requires_grad_()
    mask = torch.tensor([True, False, False, False])
    found, tensor = moved(student, logits((4, QWEN)), mask=mask)
    assert found.read <= 1.02 * 2 * tensor / 4
    assert found.written <= 1.02 * tensor


@pytest.mark.parametrize("dtypes", TRIPLES)
@pytest.mark.parametrize("mix", ["contrast", "share", "logits"])
def test_mixtures_of_two_teachers(mix, dtypes):
    """Reverse KL: each of three rows is read once, the gradient is written once."""
    student, *teachers = (logits((2, QWEN), dtype) for dtype in dtypes)
    options = {"divergence": "reverse_kl", "teacher_mix": mix, "teacher_weights": [0.5, 0.1]}
    found, _ = moved(student.requires_grad_(), teachers, **options)
    each = [x.numel() * x.element_size() for x in (student, *teachers)]
    assert found.read <= 1.02 * sum(each)
    assert found.written <= 1.02 * each[0]
    assert found.largest_cluster > 1


def test_mixtures_by_distance_of_another_divergence():
    """Two reads for the distance; then two passes over three rows, and the gradient."""
    student = logits((2, QWEN)).requires_grad_()
    teachers = [logits((2, QWEN)), logits((2, QWEN))]
    options = {"divergence": "forward_kl", "teacher_mix": "contrast", "teacher_weights": [0.5, 0.1]}
    found, tensor = moved(student, teachers, **options)
    assert found.moved <= 1.02 * (2 + 2 * 3 + 1) * tensor


def test_backward_of_one_moves_nothing():
    student = logits((2, QWEN)).requires_grad_()
    loss = fastkd.softmax_divergence(student, logits((2, QWEN)))
    assert emulator.traffic_of(loss.backward).moved < 20_000
    loss = fastkd.softmax_divergence(student, logits((2, QWEN)))
    scaled = emulator.traffic_of(lambda: (2 * loss).backward())
    assert scaled.moved <= 1.02 * 2 * student.numel() * 4
    assert scaled.share_of_16 >= 0.99


@pytest.mark.parametrize("dtype", WIDE)
def test_kl_div(dtype):
    input = logits((3, QWEN), dtype).log_softmax(-1).requires_grad_()
    target = logits((3, QWEN), dtype).softmax(-1)
    found = emulator.traffic_of(lambda: fastkd.kl_div(input, target, reduction="batchmean"))
    assert found.moved <= 1.02 * 3 * input.numel() * input.element_size()
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(capability, vocab):
    student, teacher = logits((3, vocab)).requires_grad_(), logits((3, vocab))
    found = []
    for seed in (0, 1, 2):
        emulator.configure(capability, seed)
        loss = fastkd.softmax_divergence(student, teacher, divergence="jsd", reduction="none")
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_numbers_no_check_could_see_become_nan():
    """A label outside, a temperature of 0, a beta of -2: NaN, nothing out of bounds."""
    student, teacher = logits((3, 100)).requires_grad_(), logits((3, 100))
    labels = torch.tensor([1, 100, -7])
    loss = fastkd.softmax_divergence(student, teacher, labels=labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    temperature = torch.tensor([1.0, 0.0, float("inf")])
    loss = fastkd.softmax_divergence(student, teacher, temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    rows = torch.tensor([0, 3, 1 << 40])
    loss = fastkd.softmax_divergence(student, teacher, teacher_rows=rows, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    for divergence in DIVERGENCES:
        beta = torch.tensor([1.0, -2.0, float("nan")])
        options = {"divergence": divergence, "reduction": "none"}
        loss = fastkd.softmax_divergence(student, teacher, beta=beta, **options)
        assert loss.isnan().tolist() == [False, True, True]
        (gradient,) = torch.autograd.grad(loss[0], student)
        assert gradient.isfinite().all()
