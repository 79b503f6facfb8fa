"""Vocabularies split across processes: spawned processes run all cases of tests/shard_cases.py."""

import time

import pytest
import shard_cases
import torch
import torch.multiprocessing as mp

import fastkd

SECONDS = 400  # of a group; a process that waits for another one fails after 60


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes of a group of this size found, by case; each group is spawned once."""
    found = {}

    def of(size: int) -> dict[str, list[str]]:
        if size not in found:
            folder = tmp_path_factory.mktemp(f"group_of_{size}")
            context = mp.start_processes(
                shard_cases.run, (size, str(folder)), nprocs=size, join=False
            )
            end = time.monotonic() + SECONDS
            try:
                while not context.join(timeout=1):
                    assert time.monotonic() < end, "the processes hang"
            except BaseException as error:
                for process in context.processes:
                    process.kill()
                lost = f"a process was lost: {error}"
            else:
                lost = "not run"
            all_ranks = [
                torch.load(folder / str(rank)) if (folder / str(rank)).exists() else {}
                for rank in range(size)
            ]
            found[size] = {
                name: [one.get(name, lost) for one in all_ranks] for name in shard_cases.cases(size)
            }
        return found[size]

    return of


@pytest.mark.parametrize(
    ("size", "case"),
    [(size, case) for size in shard_cases.SIZES for case in shard_cases.cases(size)],
)
def test_case(size, case, results):
    failed = [text for text in results(size)[case] if text]
    assert not failed, "\n".join(failed)


LOGITS = torch.zeros(2, 3)
IDS = torch.zeros(2, dtype=torch.int64)
CALLS = {
    "softmax_divergence": lambda **place: fastkd.softmax_divergence(LOGITS, LOGITS, **place),
    "topk_divergence": lambda **place: fastkd.topk_divergence(
        LOGITS, torch.zeros(2, 1), IDS.unsqueeze(1), **place
    ),
    "clipped_divergence": lambda **place: fastkd.clipped_divergence(LOGITS, LOGITS, 0, 1, **place),
    "cross_entropy": lambda **place: fastkd.cross_entropy(LOGITS, IDS, **place),
    "token_log_probs": lambda **place: fastkd.token_log_probs(LOGITS, IDS, **place),
    "token_stats": lambda **place: fastkd.token_stats(LOGITS, **place),
    "teacher_topk": lambda **place: fastkd.teacher_topk(LOGITS, 1, **place),
    "chunk_log_likelihood": lambda **place: fastkd.chunk_log_likelihood(
        LOGITS, IDS, IDS, 1, **place
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_without_a_group(name):
    with pytest.raises(TypeError, match=f"{name}: group must be a torch.distributed process"):
        CALLS[name](group=object())
    with pytest.raises(ValueError, match=f"{name}: vocab_start needs group"):
        CALLS[name](vocab_start=0)
