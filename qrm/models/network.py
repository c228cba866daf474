"""The reward network as pure functions of (params, micro-batch): decoder, then head.

Axes as in `packing`: R rows, L tokens, C comparisons, K responses, D features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.packing import MicroBatch
from qrm.models import attention, sharding
from qrm.models import decoder as decoder_lib
from qrm.models.decoder import Decoder, DecoderConfig
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig

Params = dict[str, Any]
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class RewardNetwork:
    """Architecture of a reward model; parameters are `{'decoder': ..., 'head': ...}`.

    Leaves of the parameters may be shards, see `sharding.on_shards`.

    Attributes:
      decoder: architecture of the backbone.
      head: which head.
      dtype: compute dtype of the backbone, 'float32' or 'bfloat16'.
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: recompute blocks in the backward pass.
      dropout: rate in the backbone while training.
    """

    decoder: DecoderConfig
    head: HeadConfig
    dtype: str = 'float32'
    attention: str = 'auto'
    remat: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r}, expected one of {DTYPES}')
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(f'attention={self.attention!r}, expected one of '
                             f'{attention.IMPLEMENTATIONS}')

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters; the decoder's do not depend on the head."""
        decoder_key, head_key = jax.random.split(key)
        return {
            'decoder': self._decoder.init(decoder_key),
            'head': heads.init(self.head, head_key, self.decoder.n_embd),
        }

    def embed(self, params: Params, batch: MicroBatch) -> jax.Array:
        """Embeddings [R, L, D] float32 of the tokens and their positions."""
        return self._decoder.embed(params['decoder'], batch.tokens, batch.positions)

    def add_embedding_gradient(
        self, total: Params, batch: MicroBatch, gradient: jax.Array
    ) -> Params:
        """Adds the gradient [R, L, D] of `embed`'s output to a sum of parameter gradients."""
        decoder = self._decoder.add_embedding_gradient(
            total['decoder'], gradient, batch.tokens, batch.positions)
        return total | {'decoder': decoder}

    def hidden(
        self,
        params: Params,
        batch: MicroBatch,
        embedded: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        everywhere: bool = False,
    ) -> jax.Array:
        """Hidden states, float32; with a key, with dropout.

        Returns:
          [C, K, D] at `reads(batch)`, or [R, L, D] of all tokens if `everywhere`; entries that are
          not present, and those of padding, are meaningless.
        """
        plan = attention.plan(batch.segments, batch.responses, self.attention,
                              dropout=self.dropout > 0 and dropout_key is not None)
        return self._decoder(params['decoder'], embedded, plan,
                             None if everywhere else self.reads(batch), dropout_key)

    def reads(self, batch: MicroBatch) -> jax.Array:
        """Tokens [C, K] at which the head reads hidden states; [C, 2K] if it reads prompts too."""
        if not self.head.gated:
            return batch.reads
        return jnp.concatenate([batch.reads, batch.prompt_reads], axis=1)

    def outputs(
        self, params: Params, hidden: jax.Array, levels: jax.Array | None = None
    ) -> jax.Array:
        """Raw outputs [C, K, outputs] of the head.

        Args:
          params: parameters.
          hidden: hidden states at `reads(batch)`.
          levels: see `heads.apply`.
        """
        prompt = None
        if self.head.gated:
            hidden, prompt = jnp.split(hidden, 2, axis=1)
        return heads.apply(self.head, sharding.whole(params['head']), hidden, prompt=prompt,
                           levels=levels)

    def __call__(self, params: Params, batch: MicroBatch) -> jax.Array:
        """Outputs [C, K, outputs] of a micro-batch; entries not present are meaningless."""
        return self.outputs(params, self.hidden(params, batch, self.embed(params, batch)))

    def language_model_loss(
        self, params: Params, batch: MicroBatch, hidden: jax.Array
    ) -> jax.Array:
        """Negative log-likelihood (nats) of the preferred responses, summed over comparisons.

        Each comparison counts its weight times the mean over the tokens of its preferred
        response, EOS included; the output embedding is the input embedding, as in GPT-2.
        """
        wte = sharding.whole(params['decoder']['wte'], self.dtype).astype(self.dtype)
        logits = jnp.einsum('rld,vd->rlv', hidden.astype(self.dtype), wte,
                            preferred_element_type=jnp.float32)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_probs, batch.lm_targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.lm_weights)

    @property
    def _decoder(self) -> Decoder:
        return Decoder(self.decoder, jnp.dtype(self.dtype), self.remat, self.dropout)


def unstack_blocks(params: Params) -> Params:
    """Parameters with a tuple of blocks in place of their leading axis, see `Decoder`."""
    return params | {'decoder': decoder_lib.unstack_blocks(params['decoder'])}


def stack_blocks(params: Params) -> Params:
    """The inverse of `unstack_blocks`."""
    return params | {'decoder': decoder_lib.stack_blocks(params['decoder'])}


def parameter_count(params: Params) -> int:
    """Number of scalars in the parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
