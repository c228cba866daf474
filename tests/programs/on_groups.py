"""What tensor groups of two of eight devices hold and drop, as JSON: see `main`."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from qrm.models import families, parallel, sharding
from qrm.models.architecture import Architecture
from qrm.models.transformer import Transformer
from tests.helpers import ARCHITECTURE, encoded, single_batch

# Four heads of two features, on two of keys and values; six inner features with gates.
GROUPED = families.architecture(families.random_settings('llama', {
    'vocab_size': 8, 'max_positions': 8, 'hidden_size': 8, 'num_layers': 1, 'num_heads': 4,
    'num_kv_heads': 2, 'head_dim': 2, 'intermediate_size': 6}))


def columns(a: Architecture, name: str, kernel: str, width: int) -> list[list[list[int]]]:
    """Columns of a kernel that each device of the first group has, and those that come back."""
    mesh = sharding.make_mesh(2)
    tree = {'backbone': {'blocks': {name: {kernel: {
        'kernel': jnp.broadcast_to(jnp.arange(width), (1, 8, width))}}}}}
    tree = sharding.split(tree, sharding.shardings(tree, mesh))
    arranged = parallel.arrange(tree, a, mesh)
    leaf, = jax.tree.leaves(arranged)
    own = {shard.device.id: np.asarray(shard.data)[0, 0].tolist()
           for shard in leaf.addressable_shards}
    back, = jax.tree.leaves(parallel.restore(arranged, a, mesh))
    return [own[0], own[1], np.asarray(back)[0, 0].tolist()]


def dropped(rate: float) -> dict:
    """Gradients of a block with two heads that have the same weights.

    Returns:
      'attention': those of the kernel of queries, keys and values, of each head; 'norm': those of
      the norm that both branches follow, of each device of the first group.
    """
    a = dataclasses.replace(ARCHITECTURE, num_layers=1)
    model = Transformer(a, dropout=rate)
    mesh = sharding.make_mesh(2)
    params = {'backbone': model.init(jax.random.key(0))}
    block, half = params['backbone']['blocks'], a.num_heads * a.head_dim // 2
    kernel = block['attention']['qkv']['kernel'].reshape(1, 16, 3, 2, half)
    block['attention']['qkv']['kernel'] = jnp.broadcast_to(
        kernel[:, :, :, :1], kernel.shape).reshape(1, 16, -1)
    output = block['attention']['output']['kernel'].reshape(1, 2, half, 16)
    block['attention']['output']['kernel'] = jnp.broadcast_to(
        output[:, :1], output.shape).reshape(1, -1, 16)
    params = parallel.arrange(sharding.split(params, sharding.shardings(params, mesh)), a, mesh)
    micro_batch = single_batch(encoded('x', 9, (5,)), 16)

    def own(params, batch):
        def total(params):
            embedded = model.embed(params['backbone'], batch.tokens, batch.positions)
            contexts = model.contexts(batch.segments, batch.responses, batch.positions, 'dense')
            hidden, _ = model(params['backbone'], jax.lax.stop_gradient(embedded), contexts,
                              dropout_key=jax.random.key(1))
            return jnp.sum(hidden[..., 0] ** 2)

        found = jax.grad(total)({'backbone': params['backbone']})['backbone']['blocks']
        norm = jax.lax.all_gather(found['mlp_norm']['scale'], sharding.TENSOR)
        return found['attention']['qkv']['kernel'].value, norm

    batch = jax.tree.map(lambda x: np.stack([x] * 4), micro_batch)
    run = sharding.on_shards(own, mesh, (P(None, sharding.AXIS, sharding.TENSOR), P()))
    kernel, norm = jax.jit(run)(params, batch)
    heads = np.asarray(kernel).reshape(1, 16, 2, 3, half).swapaxes(0, 2)
    return {'attention': [head.ravel().tolist() for head in heads],
            'norm': [one.ravel().tolist() for one in np.asarray(norm)]}


def main() -> None:
    json.dump({'qkv': columns(GROUPED, 'attention', 'qkv', 16),
               'up': columns(GROUPED, 'mlp', 'up', 12),
               'plain': columns(ARCHITECTURE, 'mlp', 'up', 32),
               'dropped': dropped(0.5), 'kept': dropped(0.0)}, sys.stdout)


if __name__ == '__main__':
    main()
