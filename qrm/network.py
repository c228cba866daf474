"""The reward network as pure functions of (params, micro-batch): decoder, then head.

Axes as in `packing`: R rows, L tokens, C comparisons, K responses, N quantiles, D features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrm.backbone import Decoder, DecoderConfig, attention_mask
from qrm.heads import Head, HeadConfig, Reward
from qrm.packing import MicroBatch

Params = dict[str, Any]
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class RewardNetwork:
    """Architecture of a reward model; parameters are `{'decoder': ..., 'head': ...}`.

    Attributes:
      decoder: architecture of the backbone.
      head: which head.
      dtype: compute dtype of the backbone, 'float32' or 'bfloat16'.
      remat: recompute blocks in the backward pass.
      dropout: rate in the backbone while training.
    """

    decoder: DecoderConfig
    head: HeadConfig
    dtype: str = 'float32'
    remat: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r}, expected one of {DTYPES}')

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters; the decoder's do not depend on the head."""
        decoder_key, head_key = jax.random.split(key)
        tokens = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2, 2), bool)
        hidden = jnp.zeros((1, self.decoder.n_embd))
        return {
            'decoder': self._decoder.init(decoder_key, tokens, tokens, mask)['params'],
            'head': Head(self.head).init(head_key, hidden)['params'],
        }

    def hidden(
        self, params: Params, batch: MicroBatch, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states [R, L, D] float32; with a key, with dropout."""
        return self._decoder.apply(
            {'params': params['decoder']},
            batch.tokens,
            batch.positions,
            attention_mask(batch.segments, batch.responses),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {'dropout': dropout_key},
        )

    def rewards(self, params: Params, batch: MicroBatch, hidden: jax.Array) -> Reward:
        """Rewards [C, K, N] at `batch.reads`; entries that are not present are meaningless."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return Head(self.head).apply({'params': params['head']}, flat[batch.reads])

    def __call__(self, params: Params, batch: MicroBatch) -> Reward:
        """Rewards [C, K, N] of a micro-batch."""
        return self.rewards(params, batch, self.hidden(params, batch))

    def language_model_loss(
        self, params: Params, batch: MicroBatch, hidden: jax.Array
    ) -> jax.Array:
        """Negative log-likelihood (nats) of the preferred responses, summed over comparisons.

        Each comparison counts its weight times the mean over the tokens of its preferred
        response, EOS included; the output embedding is the input embedding, as in GPT-2.
        """
        wte = params['decoder']['wte'].astype(self.dtype)
        logits = jnp.einsum('rld,vd->rlv', hidden.astype(self.dtype), wte,
                            preferred_element_type=jnp.float32)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_probs, batch.lm_targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.lm_weights)

    @property
    def _decoder(self) -> Decoder:
        return Decoder(self.decoder, jnp.dtype(self.dtype), self.remat, self.dropout)


def parameter_count(params: Params) -> int:
    """Number of scalars in the parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
