"""Prints by how many KiB block-sparse attention over 16,384 tokens raises the peak memory."""

from pathlib import Path

from kernel_problems import random_lists, random_tokens

from diffaccel.kernels import block_sparse_attention


def peak():
    """Largest resident size in KiB of this program; `ru_maxrss` begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    tokens = random_tokens(1, 16384, 16384, 1, 16)
    lists = random_lists(1, 1, 128, 128, 2, least=2)
    before = peak()
    block_sparse_attention(*tokens, *lists, block_q=128, block_k=128)
    print(peak() - before)
