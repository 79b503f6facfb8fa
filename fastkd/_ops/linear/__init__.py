"""Ops over logits that are products of hidden states and a head, a chunk of rows at a time."""
