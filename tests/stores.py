"""Teacher stores to test on."""

import json

import numpy as np
import torch

from fastkd.teachers._store import TeacherStore

FORMATS = ["8bit", "float16"]
VOCABS = [50, 257, 49152, 65537, 151936, 262144]
LENGTHS = [0, 1, 63, 64, 65, 130, 0, 2]


def real_looking(generator, tokens, k, vocab, *, scale=3.0):
    """Top-k of a softmax over the vocabulary: float64 log-probabilities and indices."""
    logits = generator.standard_normal((tokens, min(vocab, 4 * k))) * scale
    logits = np.sort(logits, axis=1)[:, ::-1]
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    indices = [generator.choice(vocab, k, replace=False) for _ in range(tokens)]
    return log_probs[:, :k], np.array(indices, dtype=np.int64).reshape(tokens, k)


def write(path, sequences, vocab, k, **options):
    with TeacherStore.create(path, vocab_size=vocab, k=k, **options) as writer:
        for number, (log_probs, indices) in enumerate(sequences):
            assert writer.append(log_probs.astype(np.float32), indices) == number
    return TeacherStore(path)


def kl(exact, found):
    """KL(exact || found) of float64 and float32 rows, what is outside the k lumped, in nats."""
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    p, q = np.exp(exact), np.exp(found)
    with np.errstate(invalid="ignore"):
        inside = np.where(p > 0, p * (exact - found), 0).sum(1)
    # float32 log-probabilities do not say more about the tail.
    tail, found_tail = (np.maximum(1 - x.sum(1), 1e-7) for x in (p, q))
    return inside + tail * np.log(tail / found_tail)


def aligned(found, indices):
    """The log-probabilities found, in the order of the indices that were written."""
    places = np.argsort(indices, axis=1)
    found_places = np.argsort(found.indices.numpy(), axis=1)
    sides = (indices, places), (found.indices.numpy(), found_places)
    assert np.array_equal(*(np.take_along_axis(*side, axis=1) for side in sides))
    result = np.empty(indices.shape, dtype=np.float32)
    ordered = np.take_along_axis(found.log_probs.numpy(), found_places, axis=1)
    np.put_along_axis(result, places, ordered, axis=1)
    return result


def check_order(found):
    log_probs, indices = found.log_probs, found.indices.to(torch.int64)
    indices = torch.where(indices == -1, 2**31 + torch.arange(indices.shape[1]), indices)
    assert (log_probs[:, 1:] <= log_probs[:, :-1]).all()
    tied = log_probs[:, 1:] == log_probs[:, :-1]
    assert (indices[:, 1:] > indices[:, :-1])[tied].all()


def same(a, b):
    return torch.equal(a.log_probs, b.log_probs) and torch.equal(a.indices, b.indices)


def numbered(number, tokens=50, k=4, vocab=1000):
    exact, indices = real_looking(np.random.default_rng(number), tokens, k, vocab)
    return exact.astype(np.float32), indices


def records_at(shard):
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return start + json.loads(content[8:start])["records"]["data_offsets"][0]


def change(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
