"""The oracle against cases small enough to be worked out by hand."""

import math

import torch

from diffaccel.kernels import reference


def test_two_keys_by_hand():
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    value = torch.tensor([0.0, 8.0]).view(1, 2, 1, 1)
    output, lse = reference.attention(query, key, value)
    assert math.isclose(output.item(), 6.0, rel_tol=1e-7)
    assert math.isclose(lse.item(), math.log(4.0), rel_tol=1e-7)


def test_masked_row_is_zero():
    ones = torch.ones(1, 2, 1, 4)
    mask = torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    output, lse = reference.attention(ones, ones, ones, mask)
    assert (output[0, 0] == 1).all() and (output[0, 1] == 0).all()
    assert lse[0, 1, 0] == -torch.inf


def test_block_mask_marks_the_listed_tokens():
    indices = torch.tensor(
        [
            [
                [[1, 0]],
            ]
        ],
        dtype=torch.int32,
    )
    counts = torch.tensor([[[1]]], dtype=torch.int32)
    mask = reference.block_mask(indices, counts, block_q=2, block_k=2, queries=2, keys=3)
    assert mask.tolist() == [[[[False, False, True], [False, False, True]]]]
