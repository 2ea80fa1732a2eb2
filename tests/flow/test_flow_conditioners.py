"""Every conditioner against what a coupling counts on: one table, the same tests for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_helpers import at_random_parameters
from torch import Tensor, nn
from torch.nn.functional import silu

from eiwtrain.flow.conditioners import Conditioner, make_conditioner
from eiwtrain.flow.config import CONDITIONERS, ConditionerConfig

INPUTS, OUTPUTS, GRID = 3, 5, (4, 6)
TABLE = {
    **{kind: ConditionerConfig(kind, hidden=8, depth=2, heads=2, growth=5) for kind in CONDITIONERS},
    "dense, no attention": ConditionerConfig(hidden=6, depth=1, kind="dense", growth=4, attention="none"),
    "conv, relu": ConditionerConfig(hidden=8, depth=0, activation="relu"),
    "residual, gelu": ConditionerConfig(hidden=6, depth=1, kind="residual", activation="gelu"),
    "transformer, patch 1": ConditionerConfig(hidden=6, depth=1, kind="transformer", heads=3, patch=1),
}

every_conditioner = pytest.mark.parametrize("name", TABLE)
every_kind = pytest.mark.parametrize("kind", CONDITIONERS)
precisions = pytest.mark.parametrize("bfloat16", [False, True])


def make(name: str, dtype: torch.dtype = torch.float64, bfloat16: bool = False, **changes: Any) -> Conditioner:
    torch.manual_seed(0)
    config = replace(TABLE[name], **changes)
    return at_random_parameters(make_conditioner(INPUTS, OUTPUTS, GRID, config, bfloat16).to(dtype))


def batch(size: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, INPUTS, *GRID, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def gradients(conditioner: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients at the input and at every parameter."""
    x = x.clone().requires_grad_()
    y = conditioner(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), [x, *conditioner.parameters()]))


def test_table_holds_every_kind_and_every_class() -> None:
    assert {name: type(make(name)).__name__ for name in CONDITIONERS} == CONDITIONERS
    ours = {cls.__name__ for cls in subclasses(Conditioner) if cls.__module__ == Conditioner.__module__}
    assert ours - {"NoiseConditioner"} == {type(make(name)).__name__ for name in TABLE}


@every_conditioner
@precisions
def test_zero_at_the_start(name: str, bfloat16: bool) -> None:
    y = make_conditioner(INPUTS, OUTPUTS, GRID, TABLE[name], bfloat16)(batch(dtype=torch.float32))
    assert y.shape == (3, OUTPUTS, *GRID)
    assert y.count_nonzero() == 0


@every_conditioner
@precisions
def test_gradients_reach_the_input_and_every_parameter(name: str, bfloat16: bool) -> None:
    conditioner = make(name, torch.float32, bfloat16)
    names = ["input", *(name for name, _ in conditioner.named_parameters())]
    norms = {n: g.norm().item() for n, g in zip(names, gradients(conditioner, batch(dtype=torch.float32)), strict=True)}
    assert min(norms.values()) > 1e-3, norms


@every_conditioner
@pytest.mark.parametrize("training", [True, False])
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(name: str, training: bool) -> None:
    conditioner, x = make(name).train(training), batch(4)
    together = conditioner(x)
    for i in range(4):
        torch.testing.assert_close(conditioner(x[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12)
    others = torch.cat((x[:1], 100 * x[1:]))
    torch.testing.assert_close(conditioner(others)[0], together[0], rtol=1e-12, atol=1e-12)


@every_conditioner
@precisions
def test_ambient_autocast_does_not_change_a_bit(name: str, bfloat16: bool) -> None:
    conditioner, x = make(name, torch.float32, bfloat16), batch(dtype=torch.float32)
    plain = conditioner(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            under = conditioner(x)
        assert plain.dtype == under.dtype == torch.float32
        assert torch.equal(plain, under)


@every_conditioner
def test_bfloat16_is_near_float32_and_not_the_same(name: str) -> None:
    x = batch(dtype=torch.float32)
    high, low = make(name, torch.float32)(x), make(name, torch.float32, bfloat16=True)(x)
    assert 1e-4 < ((low - high).norm() / high.norm()).item() < 3e-2


@every_conditioner
def test_bfloat16_leaves_normalisations_in_float32(name: str) -> None:
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "product": set()}
    conditioner = make(name, torch.float32, bfloat16=True)
    for module in conditioner.modules():
        kind = "norm" if isinstance(module, nn.LayerNorm) else "product"
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda _m, i, out, kind=kind: seen[kind].add(out.dtype))
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _m, i: seen["norm"].add(i[0].dtype))
    conditioner(batch(dtype=torch.float32))
    assert seen["norm"] == (set() if "conv" in name else {torch.float32})
    assert seen["product"] == {torch.bfloat16}


@every_conditioner
@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_with_and_without_gradients(name: str, bfloat16: bool, dtype: torch.dtype) -> None:
    conditioner, x = make(name, torch.float32, bfloat16), batch(dtype=dtype)
    with torch.no_grad():
        without = conditioner(x)
    assert torch.equal(conditioner(x.requires_grad_()), without)


@every_conditioner
@precisions
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
@pytest.mark.parametrize("trunk", [torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_trunk(
    name: str, bfloat16: bool, parameters: torch.dtype, trunk: torch.dtype
) -> None:
    y = make(name, parameters, bfloat16)(batch(dtype=trunk))
    assert y.dtype == trunk
    exact = make(name)(batch())
    error = ((y.double() - exact).norm() / exact.norm()).item()
    # Autocast leaves float64 alone.
    assert error < (3e-2 if bfloat16 and parameters == torch.float32 else 1e-5)
    assert error < 1e-14 or torch.float32 in (parameters, trunk)


@every_conditioner
def test_strides_of_the_input_do_not_matter(name: str) -> None:
    conditioner, x = make(name, torch.float32), batch(dtype=torch.float32)
    y = conditioner(x)
    assert y.is_contiguous()
    for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert not other.is_contiguous()
        assert torch.equal(conditioner(other), y)


@every_conditioner
@precisions
def test_dropout_is_for_training_only_and_drawn_from_the_seed(name: str, bfloat16: bool) -> None:
    conditioner, x = make(name, torch.float32, bfloat16, dropout=0.5), batch(dtype=torch.float32)
    assert conditioner.dropout == 0.5
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(conditioner(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(conditioner(x), draws[0])
    assert torch.equal(conditioner.eval()(x), make(name, torch.float32, bfloat16)(x))


@every_conditioner
def test_without_dropout_nothing_is_drawn(name: str) -> None:
    conditioner, x = make(name), batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    conditioner(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gated_block_is_what_it_says() -> None:
    block = make("residual").get_submodule("blocks.0")
    get, h = block.get_parameter, torch.randn(2, *GRID, 8, dtype=torch.float64)
    var, mean = torch.var_mean(h, dim=-1, correction=0, keepdim=True)
    branch = silu((h - mean) / (var + 1e-5).sqrt() * get("norm.weight") + get("norm.bias"))
    branch = silu(torch.conv2d(branch.permute(0, 3, 1, 2), get("conv.weight"), get("conv.bias"), padding=1))
    both = torch.einsum("oc,bchw->bhwo", get("gate.weight"), branch) + get("gate.bias")
    torch.testing.assert_close(block(h), h + both[..., :8] * both[..., 8:].sigmoid(), rtol=1e-12, atol=1e-12)


def test_an_attention_block_is_that_of_a_pre_norm_transformer() -> None:
    block = make("transformer").get_submodule("blocks.0")
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
    names = {
        "self_attn.in_proj_weight": "queries_keys_values.weight",
        **{
            f"{a}.{p}": f"{b}.{p}"
            for a, b in {
                "self_attn.out_proj": "attended",
                "linear1": "up",
                "linear2": "down",
                "norm1": "attention_norm",
                "norm2": "mlp_norm",
            }.items()
            for p in ("weight", "bias")
        },
    }
    weights = {a: block.get_parameter(b) for a, b in names.items()}
    theirs.load_state_dict({**weights, "self_attn.in_proj_bias": torch.zeros(24)})
    h = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(block(h), theirs(h), rtol=1e-12, atol=1e-12)


def test_dropout_reaches_both_branches_of_an_attention_block() -> None:
    block = make("transformer", dropout=1 - 1e-9).get_submodule("blocks.0")
    h = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.equal(block(h), h)


def test_each_kind_sees_as_far_as_it_should() -> None:
    grid = (8, 8)
    seen = {}
    for kind in CONDITIONERS:
        config = ConditionerConfig(hidden=8, depth=2, kind=kind)
        conditioner = at_random_parameters(make_conditioner(2, 2, grid, config).double())
        x = torch.randn(1, 2, *grid, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(conditioner(x)[..., 0, 0].sum(), x)
        seen[kind] = grad[0].abs().sum(0) > 1e-12
    for kind, side in {"conv": 3, "residual": 5, "transformer": 8, "dense": 8}.items():
        expected = torch.zeros(grid, dtype=torch.bool)
        expected[:side, :side] = True
        assert torch.equal(seen[kind], expected), kind


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_go_back_to_where_they_came_from(patch: int) -> None:
    # Without blocks a patch of the output sees its own patch of the input and no other.
    grid, config = (4, 8), ConditionerConfig(hidden=8, depth=0, kind="transformer", patch=patch)
    conditioner = at_random_parameters(make_conditioner(2, 3, grid, config).double())
    x = torch.randn(1, 2, *grid, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(conditioner, x)[0, :, :, :, 0]
    sees = jacobian.abs().sum(dim=(0, 3)) > 1e-12  # (H, W, H, W)
    row, column = (torch.arange(side) // patch for side in grid)
    same = (row[:, None] == row)[:, None, :, None] & (column[:, None] == column)[None, :, None, :]
    assert torch.equal(sees, same)


def test_the_transformer_knows_where_a_patch_is() -> None:
    conditioner, x = make("transformer"), batch()
    moved = conditioner(x.roll(2, dims=3)).roll(-2, dims=3)
    assert not torch.allclose(moved, conditioner(x))
    with torch.no_grad():
        conditioner.get_parameter("position").zero_()
    moved = conditioner(x.roll(2, dims=3)).roll(-2, dims=3)
    torch.testing.assert_close(moved, conditioner(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
@every_kind
def test_number_of_parameters(kind: str, depth: int) -> None:
    config = ConditionerConfig(hidden=8, depth=depth, kind=kind, growth=5)
    count = sum(p.numel() for p in make_conditioner(INPUTS, OUTPUTS, GRID, config).parameters())
    h, p2, patches = 8, 4, GRID[0] * GRID[1] // 4
    convs = (9 * INPUTS + 1) * h + (9 * h + 1) * OUTPUTS
    norm = 2 * h
    expected = {
        "conv": convs + depth * (h + 1) * h,
        "residual": convs + norm + depth * (norm + (9 * h + 1) * h + (h + 1) * 2 * h),
        "transformer": (p2 * INPUTS + 1) * h + patches * h + norm + (h + 1) * p2 * OUTPUTS
        # norm, queries with keys and values, output; norm, up, down
        + depth * (norm + 3 * h * h + (h + 1) * h + norm + (h + 1) * 4 * h + (4 * h + 1) * h),
        "dense": (INPUTS + 1) * h + sum((c + 1) * c + (9 * c + 1) * 5 for c in (h + 5 * i for i in range(depth)))
        # gate, attention, normalisation and mixture, last
        + (h + 5 * depth + 1) * 3 * h + (h + 1) * 3 * h // 2 + (h // 2 + 1) * h + 4 * h + 2 * h * h + (h + 1) * OUTPUTS,
    }  # fmt: skip
    assert count == expected[kind]


def test_a_conv_conditioner_has_the_names_that_saved_models_have() -> None:
    names = {f"{layer}.{p}" for layer in ("first", "middle.0", "middle.1", "last") for p in ("weight", "bias")}
    assert set(make("conv").state_dict()) == names


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": "mlp"}, "kind: 'mlp' is not one of conv, residual, transformer, dense"),
    ({"growth": 0}, "growth: 0 is not an integer from 1"),
    ({"attention": "all"}, "attention"),
    ({"dropout": 1.0}, "dropout: 1.0 is not a number from 0 to below 1"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": float("nan")}, "dropout"),
    ({"dropout": True}, "dropout"),
    ({"dropout": "0.1"}, "dropout"),
    ({"heads": 0}, "heads"),
    ({"patch": 0}, "patch"),
    ({"patch": 2.0}, "patch"),
    ({"kind": "transformer", "hidden": 6}, "heads: 4 does not divide hidden = 6"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_config_that_makes_no_sense_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ConditionerConfig(**changes)


def test_heads_matter_to_a_transformer_only() -> None:
    for kind in ("conv", "residual"):
        ConditionerConfig(hidden=6, kind=kind)


def test_a_patch_that_does_not_divide_the_grid_names_those_that_do() -> None:
    config = replace(TABLE["transformer"], patch=4)
    with pytest.raises(ValueError, match=r"^patch: 4 does not divide a level's grid of 4x6; these do: 1, 2$"):
        make_conditioner(INPUTS, OUTPUTS, (4, 6), config)
    with pytest.raises(ValueError, match=r"grid of 6x12; these do: 1, 2, 3, 6$"):
        make_conditioner(INPUTS, OUTPUTS, (6, 12), config)


def test_a_transformer_refuses_another_grid_than_its_own() -> None:
    with pytest.raises(ValueError, match=r"6x4.*\(4, 6\)"):
        make("transformer")(batch().mT)
