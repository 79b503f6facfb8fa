"""What token_stats moves on CUDA, counted by the emulator: one read of each input."""

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def moved(*tensors, **options):
    """Traffic of one call, and the size of its inputs."""
    found = emulator.traffic_of(lambda: fastkd.token_stats(*tensors, **options))
    return found, sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("near", [False, True])
def test_pairs_are_read_once(near, dtype):
    student = logits((2, QWEN), dtype)
    teacher = student if near else logits((2, QWEN), dtype)
    labels, temperature = torch.tensor([3, QWEN - 1]), torch.tensor([1.5, 0.5])
    found, inputs = moved(student, teacher, labels=labels, temperature=temperature)
    assert found.largest_cluster > 1
    assert found.launches == 1
    assert found.moved <= 1.02 * inputs
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("capability", [80, 90])
def test_student_alone_is_read_once(capability, dtype):
    emulator.configure(capability)
    found, inputs = moved(logits((2, QWEN), dtype), labels=torch.tensor([3, QWEN - 1]))
    assert found.launches == 1
    assert found.moved <= 1.02 * inputs
    assert found.share_of_16 >= 0.99
    assert found.largest_shared_memory < 8192 + emulator.UNDER_WAY


@pytest.mark.parametrize("dtype", WIDE)
def test_without_clusters_pairs_are_read_again(dtype):
    emulator.configure(80)
    found, inputs = moved(logits((2, QWEN), dtype), logits((2, QWEN), dtype))
    assert found.largest_cluster == 1
    assert found.moved <= 1.02 * 2 * inputs
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("vocab", [1000, 4096, 10_000])
def test_rows_that_fit_into_one_block_are_read_once_everywhere(capability, vocab):
    emulator.configure(capability)
    shape = 3, vocab
    found, inputs = moved(logits(shape, torch.bfloat16), logits(shape, torch.bfloat16))
    assert found.moved <= 1.05 * inputs  # a row's statistics are 60 bytes


def test_rows_off_16_byte_lines_still_move_in_packs():
    """50,257 bfloat16 columns: each row begins elsewhere in a line."""
    found, inputs = moved(*(logits((8, 50_257), torch.bfloat16) for _ in range(2)))
    assert found.moved <= 1.02 * inputs
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(capability, vocab):
    student, teacher = logits((3, vocab)).round(), logits((3, vocab)).round()  # with ties
    found = []
    for seed in (0, 1, 2):
        emulator.configure(capability, seed)
        found.append([*fastkd.token_stats(student, teacher)[:4], *fastkd.token_stats(student)[:4]])
        found[-1] += fastkd.token_stats(student, teacher)[-3:]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:-1], other[:-1], strict=True))


def test_numbers_no_check_could_see_become_nan():
    """A label outside, a temperature of 0: NaN, without a read out of bounds."""
    student, teacher = logits((4, 100)), logits((4, 100))
    found = fastkd.token_stats(student, teacher, labels=torch.tensor([1, 100, -7, -100]))
    bad = [False, True, True, True]
    assert found.student_label_log_prob.isnan().tolist() == bad
    assert found.teacher_label_log_prob.isnan().tolist() == bad
    assert not found.student_lse.isnan().any()
    temperature = torch.tensor([1.0, 0.0, float("inf"), -1.0])
    both = fastkd.token_stats(student, teacher, temperature=temperature)
    alone = fastkd.token_stats(student, temperature=temperature)
    for numbers in (*both, *alone):
        if numbers is not None and numbers.is_floating_point():
            assert numbers.isnan().tolist() == bad
        elif numbers is not None:
            assert (numbers == -1).tolist() == bad


@pytest.mark.parametrize("vocab", [700, 40_000])
def test_lowest_logits_count_as_masked(vocab):
    """Where both sides have them. Mass against one of them alone has a huge, finite divergence."""
    student, teacher = logits((3, vocab)), logits((3, vocab))
    student[:, : vocab // 2] = teacher[:, : vocab // 2] = torch.finfo(torch.float32).min
    student[2], teacher[2] = student[2].flip(-1), teacher[2].flip(-1)
    found = fastkd.token_stats(student, teacher)
    exact = fastkd.reference.token_stats(student.double(), teacher.double())
    for mine, right in zip(found[:-1], exact[:-1], strict=True):
        if right is not None:
            torch.testing.assert_close(mine.double(), right.double(), rtol=2e-6, atol=2e-6)
    full = logits((3, vocab))
    found = fastkd.token_stats(student, full)
    exact = fastkd.reference.token_stats(student.double(), full.double())
    assert (exact[-4] > 1e37).all()
    for mine, right in zip(found[-4:-1], exact[-4:-1], strict=True):
        torch.testing.assert_close(mine, right.float(), rtol=1e-5, atol=2e-6)
    found = fastkd.token_stats(full, teacher)
    exact = fastkd.reference.token_stats(full.double(), teacher.double())
    assert (exact[-3] > 1e37).all()
    for mine, right in zip(found[-4:-1], exact[-4:-1], strict=True):
        torch.testing.assert_close(mine, right.float(), rtol=1e-5, atol=2e-6)


def test_float64_is_for_the_cpu():
    with pytest.raises(TypeError, match="token_stats: float64 logits are supported on the CPU"):
        fastkd.token_stats(logits((2, 10)), logits((2, 10)).double())
