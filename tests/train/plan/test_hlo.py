from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from falcon_relu.sharding import make_mesh
from train.plan import hlo

P = PartitionSpec


def _text(f, *shapes, shardings=None):
    return jax.jit(f, in_shardings=shardings).lower(*shapes).compile().as_text()


def _f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_in_loops_within_loops_count_as_often_as_they_run():
    def f(x, ws):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, ws)[0], None), x, length=7)[0]

    assert hlo.count(_text(f, _f32(32, 64), _f32(5, 64, 64))).flops == 7 * 5 * 2 * 32 * 64 * 64


def test_batched_products_and_gradients():
    def f(a, b):
        return jnp.sum(jnp.tanh(jnp.einsum("bij,bjk->bik", a, b)))

    work = hlo.count(_text(jax.grad(f, argnums=(0, 1)), _f32(3, 16, 32), _f32(3, 32, 24)))
    assert work.flops == 3 * 2 * 3 * 16 * 32 * 24


def test_convolutions_count_no_taps_on_padding():
    def f(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), [(2, 2)], dimension_numbers=("NWC", "WIO", "NWC"))

    flops = hlo.count(_text(f, _f32(1, 10, 4), _f32(5, 4, 6))).flops
    assert flops == 2 * 4 * 6 * (10 * 5 - 2 * (2 + 1))


def test_collectives_by_kind_with_bytes_that_a_device_receives():
    mesh = make_mesh((2, 4, 1))
    by_columns, by_rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))

    def f(x, w):  # contracted over fsdp: partial sums of [8, 6] on 4 devices
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P()))

    work = hlo.count(_text(f, _f32(8, 64), _f32(64, 6), shardings=(by_columns, by_rows)))
    assert work.bytes_by_kind() == {"all-reduce": 2 * 8 * 6 * 4 * 3 / 4}
    assert [len(c.group) for c in work.collectives] == [4]

    def g(x):
        return jax.lax.with_sharding_constraint(jnp.tanh(x), NamedSharding(mesh, P()))

    work = hlo.count(_text(g, _f32(8, 64), shardings=(by_columns,)))
    assert work.bytes_by_kind() == {"all-gather": 8 * 64 * 4 * 3 / 4}


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=1,'b'=8,'c'=5], device_ids=([5,8]T(1,0)) {'c'}", (0, 8, 16, 24, 32)),
    ],
)
def test_groups_of_devices_in_every_notation(attributes, group):
    assert hlo._group(attributes) == group


def test_a_loop_without_a_trip_count_is_an_error():
    text = _text(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 3.0, lambda x: x @ x, x), _f32(4, 4))
    with pytest.raises(ValueError, match="trip count"):
        hlo.count(text)
