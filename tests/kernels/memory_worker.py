"""Prints by how many KiB block-sparse attention over 16,384 tokens raises the peak memory."""

import resource

from kernel_problems import random_lists, random_tokens

from diffaccel.kernels import block_sparse_attention

if __name__ == "__main__":
    tokens = random_tokens(1, 16384, 16384, 1, 16)
    lists = random_lists(1, 1, 128, 128, 2, least=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block_sparse_attention(*tokens, *lists, block_q=128, block_k=128)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
