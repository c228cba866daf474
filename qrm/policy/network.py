"""The policy as pure functions of (params, micro-batch): what a language model says of responses.

A token of a response is predicted from the token before it in its own dialogue, the first one from
the last of the prompt, wherever in the rows that is: so log-probabilities from packed rows, where
responses share a prompt, are those of every dialogue alone.

Axes as in `batches`: R rows, L tokens, C prompts, K responses, T tokens of a response; P = R L.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrm.models import sharding
from qrm.models.architecture import Architecture
from qrm.models.likelihood import likelihood
from qrm.models.network import Network, Params
from qrm.models.tuning import Tuning
from qrm.policy.batches import PolicyBatch


class Tokens(NamedTuple):
    """What a policy says of the tokens of responses, [C, K, T] float32; 0 where there is none.

    Attributes:
      log_probs: nats, of each token at temperature 1, of all tokens.
      entropy: nats, of the distribution that it was drawn from; None unless it was asked for.
      values: what the value head gives where it was drawn; None without such a head.
    """

    log_probs: jax.Array
    entropy: jax.Array | None
    values: jax.Array | None


@dataclasses.dataclass(frozen=True)
class PolicyNetwork(Network):
    """A decoder with its output embedding; parameters are `{'backbone': ...}`, and `'value'`.

    Attributes:
      architecture, dtype, attention, remat, dropout, tuning: see `Network`.
      value: whether there is a value head, linear and float32, which reads the hidden state that
        a token is predicted from.

    Raises:
      ValueError: see `Network.check`; or an encoder, or one of which only a head would be trained.
    """

    architecture: Architecture
    dtype: str = 'float32'
    attention: str = 'auto'
    remat: bool = False
    dropout: float = 0.0
    tuning: Tuning = dataclasses.field(default_factory=Tuning)
    value: bool = False
    language_model = True  # no field: its parameters always hold the output embedding

    def __post_init__(self):
        self.check()
        if not self.architecture.causal:
            raise ValueError('an encoder has no next token, expected a decoder')
        if self.tuning.kind == 'head':
            raise ValueError("tuning 'head' of a language model, expected 'all', 'lora' or 'last'")

    def init(self, key: jax.Array, dtype: str = 'float32') -> Params:
        """Random parameters, see `leaf_dtype`; the value head is 0."""
        params = {'backbone': self.init_backbone(key, dtype)}
        if self.value:
            params['value'] = {'kernel': jnp.zeros((self.architecture.hidden_size, 1)),
                               'bias': jnp.zeros(1)}
        return params

    def embed(self, params: Params, batch: PolicyBatch) -> jax.Array:
        """Embeddings [R, L, D] float32 of the tokens and their positions."""
        return super().embed(params, batch.rows)

    def add_embedding_gradient(
        self, total: Params, batch: PolicyBatch, gradient: jax.Array
    ) -> Params:
        """Adds the gradient [R, L, D] of `embed`'s output to a sum of parameter gradients."""
        return super().add_embedding_gradient(total, batch.rows, gradient)

    def read(
        self,
        params: Params,
        batch: PolicyBatch,
        embedded: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        *,
        entropy: bool = False,
    ) -> Tokens:
        """What the policy says of all tokens of all responses.

        Args:
          params, batch: of the network.
          embedded: from `embed`, where its gradient is taken by itself.
          dropout_key: with a key, with dropout.
          entropy: whether that is asked for.
        """
        embedded = self.embed(params, batch) if embedded is None else embedded
        contexts = self.contexts(
            batch.rows, dropout=self.dropout > 0 and dropout_key is not None)
        hidden, _ = self.transformer(params['backbone'], embedded, contexts, None, dropout_key)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        # Each token of the rows belongs to one response at most: P places hold all that is asked.
        mask = batch.mask.reshape(-1)
        order, = jnp.nonzero(mask, size=len(hidden), fill_value=len(mask))
        places, predictors = (x.reshape(-1).at[order].get(mode='fill', fill_value=0)
                              for x in batch.places())
        states = hidden[predictors]
        found = likelihood(
            self.transformer.read_out, entropy, self.transformer.output_table(params['backbone']),
            states, batch.rows.tokens.reshape(-1)[places], jnp.sum(mask))

        def spread(x: jax.Array) -> jax.Array:
            return jnp.zeros(len(mask)).at[order].set(x, mode='drop').reshape(batch.mask.shape)

        values = None
        if self.value:
            head = sharding.whole(params['value'])
            values = spread((jnp.matmul(states, head['kernel'], precision=jax.lax.Precision.HIGHEST)
                             + head['bias'])[:, 0])
        return Tokens(spread(found.log_probs), spread(found.entropy) if entropy else None, values)

    def log_probs(self, params: Params, batch: PolicyBatch) -> jax.Array:
        """Log-probabilities [C, K, T] (nats) of the tokens of responses."""
        return self.read(params, batch).log_probs


def log_probs(network: PolicyNetwork, params: Params, batch: Any) -> jax.Array:
    """`PolicyNetwork.log_probs`, as `inference.run` takes it."""
    return network.log_probs(params, batch)
