"""Bad input is refused with one clear sentence, and the op keeps the rules of torch.library."""

import pytest
import torch

from diffaccel.kernels import BlockSparseCall, Centroids, block_sparse_attention
from diffaccel.kernels.block_sparse.op import attend


def _arguments():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 40, 2, 16, generator=generator)
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(2, 2, 3, 2).contiguous()
    counts = torch.full((2, 2, 3), 2, dtype=torch.int32)
    return {
        "query": query,
        "key": query.clone(),
        "value": query.clone(),
        "indices": indices,
        "counts": counts,
        "block_q": 16,
        "block_k": 16,
    }


LIST = torch.zeros(2, 2, 3, 2, dtype=torch.int32)
BAD = {
    "rank": ({"query": torch.zeros(40, 2, 16)}, ValueError, r"query must be \(B, N, H, D\)"),
    "dtype mix": ({"key": torch.zeros(2, 40, 2, 16).half()}, TypeError, "one dtype"),
    "int": ({n: torch.zeros(2, 40, 2, 16).int() for n in ("query", "key", "value")},
            TypeError, "fp16, bf16, fp32 and fp64"),
    "head dim": ({n: torch.zeros(2, 40, 2, 8) for n in ("key", "value")}, ValueError, "head dim"),
    "value shape": ({"value": torch.zeros(2, 39, 2, 16)}, ValueError, "key and value"),
    "no keys": ({n: torch.zeros(2, 0, 2, 16) for n in ("key", "value")}, ValueError, "empty"),
    "block size": ({"block_k": 0}, ValueError, "at least 1"),
    "scale": ({"scale": 0.0}, ValueError, "scale must be positive"),
    "int64 lists": ({"indices": LIST.long()}, TypeError, "int32"),
    "list shape": ({"indices": LIST[:, :, :2]}, ValueError, "NQ"),
    "counts shape": ({"counts": torch.ones(2, 2, dtype=torch.int32)}, ValueError, "counts"),
    "entry too large": ({"indices": LIST + torch.tensor([0, 3]).int()}, ValueError, "0 to 2"),
    "negative entry": ({"indices": LIST + torch.tensor([-1, 0]).int()}, ValueError, "0 to 2"),
    "unsorted": ({"indices": LIST + torch.tensor([2, 0]).int()}, ValueError, "ascending"),
    "twice": ({"indices": LIST}, ValueError, "ascending"),
    "count too large": ({"counts": torch.full((2, 2, 3), 3).int()}, ValueError, "max_count=2"),
    "float mask": ({"key_padding_mask": torch.ones(2, 40)}, TypeError, "must be bool"),
    "mask shape": ({"key_padding_mask": torch.ones(2, 41) > 0}, ValueError, "one row per sample"),
    "half extra": ({"extra_key": torch.zeros(2, 3, 2, 16)}, ValueError, "go together"),
    "extra shape": ({n: torch.zeros(2, 3, 1, 16) for n in ("extra_key", "extra_value")},
                    ValueError, r"\(B, E, H, D\)"),
    "extra dtype": ({n: torch.zeros(2, 3, 2, 16).half() for n in ("extra_key", "extra_value")},
                    TypeError, "dtype of query"),
    "row_scale dtype": ({"row_scale": torch.ones(2, 2, 3).half()}, TypeError, "fp32"),
    "row_bias shape": ({"row_bias": torch.ones(2, 2, 3, 8)}, ValueError, "per block"),
    "centroid shape": ({"centroids": Centroids(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16),
                        torch.zeros(2, 3))}, ValueError,
                       r"centroids.log_count must be \(2, 2, 3\)"),
    "tail of nothing": ({"return_tail": True}, ValueError, "return_tail needs centroids"),
    "device": ({"counts": torch.ones(2, 2, 3, dtype=torch.int32, device="meta")},
               ValueError, "device of query"),
    "backend": ({"backend": "cuda"}, ValueError, "'cpu' or 'triton'"),
}  # fmt: skip


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(**(_arguments() | change))


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        block_sparse_attention(**_arguments(), backend="triton")


def test_calls_that_are_known_to_fit_give_the_same():
    arguments = _arguments()
    output, lse, tail = attend(BlockSparseCall(**arguments))
    assert torch.equal(output, block_sparse_attention(**arguments))
    assert lse.shape == tail.shape == (0,)


@pytest.mark.parametrize("has_numbers", [False, True])
def test_opcheck(has_numbers):
    query, *rest = list(_arguments().values())[:5]
    rest += [torch.ones(2, 40) > 0, None, None, None, torch.ones(2, 2, 3), None]
    rest += [*torch.randn(2, 2, 2, 3, 16), torch.zeros(2, 1, 3).expand(2, 2, 3), None]
    op = torch.ops.diffaccel.block_sparse_attention.default
    torch.library.opcheck(
        op, (query, rest, [16, 16], 0.25, [has_numbers, has_numbers, False], "cpu")
    )


def test_compiles_without_a_graph_break():
    drawn = torch.randn(2, 2, 2, 3, 16)
    arguments = _arguments() | {"centroids": Centroids(*drawn, torch.zeros(2, 2, 3))}

    def run(query):
        others = {name: tensor for name, tensor in arguments.items() if name != "query"}
        asked = {"return_lse": True, "return_tail": True}
        output, lse, tail = block_sparse_attention(query, **others, **asked)
        return output * 2, lse, tail

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    found, expected = compiled(arguments["query"]), run(arguments["query"])
    assert all(map(torch.equal, found, expected))
