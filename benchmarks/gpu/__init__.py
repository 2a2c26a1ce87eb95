"""Attention on a GPU: correctness first, then speed against other libraries and against the hardware's own limits."""
