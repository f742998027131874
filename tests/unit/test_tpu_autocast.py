"""What takes the place of attention under autocast sees the dtypes that attention would."""

import torch

from kernel_pytorch.backends.tpu.autocast import as_autocast


def test_tensors_of_several_dtypes_become_alike_where_autocast_is_on() -> None:
    given = torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)
    assert all(a is b for a, b in zip(as_autocast(*given), given, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = as_autocast(*given)
    assert [t.dtype for t in cast] == [torch.bfloat16, torch.bfloat16, torch.float64]
    assert cast[2] is given[2]


def test_that_is_what_attention_does() -> None:
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, key.bfloat16())
        assert attended.dtype == as_autocast(query)[0].dtype == torch.bfloat16
