"""Chunks of tokens, for the tests of what sums over them."""

import torch


def chunks_of(shape, num_chunks):
    """Runs of tokens with gaps, ids ascending."""
    out = torch.full(shape, -1, dtype=torch.int32)
    for text in out.view(-1, shape[-1]) if out.numel() else []:
        place, ids = 0, iter(range(num_chunks))
        while place < shape[-1]:
            length = int(torch.randint(1, 4, ()))
            if torch.rand(()) < 0.8:
                chunk = next(ids, -1)
                text[place : place + length] = chunk
                place += int(torch.rand(()) < 0.2)
            place += length
            if torch.rand(()) < 0.2:
                next(ids, -1)  # a chunk without tokens
    return out
