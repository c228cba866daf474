"""Networks as pure functions of (params, micro-batch): the transformer, and a reward model's head.

Axes as in `packing`: R rows, L tokens, C comparisons, K responses; D features of the transformer,
W features that the head reads.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.packing import MicroBatch
from qrm.models import attention, sharding
from qrm.models.architecture import Architecture
from qrm.models.transformer import Context, Transformer
from qrm.models.tuning import Tuning
from qrm.rewards import heads
from qrm.rewards.heads import HeadConfig

Params = dict[str, Any]
DTYPES = ('float32', 'bfloat16')


class Hidden(NamedTuple):
    """Hidden states of a micro-batch, float32; those of what is not present are meaningless.

    Attributes:
      responses: [C, K, W], what the head reads of each response.
      prompts: [C, K, D] at the end of each one's prompt, for heads that read it; else None.
      tokens: [R, L, D] of all tokens, if they are asked for; else None.
    """

    responses: jax.Array
    prompts: jax.Array | None = None
    tokens: jax.Array | None = None


class Network:
    """What networks on a transformer have in common; parameters are `{'backbone': ..., ...}`.

    Leaves of the parameters may be shards, see `sharding.on_shards`.

    Attributes:
      architecture: of the backbone.
      dtype: compute dtype of the backbone, one of `DTYPES`.
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: recompute blocks in the backward pass.
      dropout: rate in the backbone while training.
      language_model: whether parameters hold the output embedding, if it is not tied.
      tuning: which parameters are trained.
      annotators: names of those whom it knows.
    """

    architecture: Architecture
    dtype: str
    attention: str
    remat: bool
    dropout: float
    language_model: bool
    tuning: Tuning
    annotators: tuple[str, ...] = ()

    def check(self) -> None:
        """Checks what all networks have.

        Raises:
          ValueError: an unknown dtype or implementation, or blocks that there are not.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r}, expected one of {DTYPES}')
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(f'attention={self.attention!r}, expected one of '
                             f'{attention.IMPLEMENTATIONS}')
        if self.tuning.blocks > self.architecture.num_layers:
            raise ValueError(f'the last {self.tuning.blocks} blocks, of '
                             f'{self.architecture.num_layers} that there are')

    def init_backbone(self, key: jax.Array, dtype: str = 'float32') -> Any:
        """Random parameters of the backbone, see `leaf_dtype`."""
        return self.transformer.init(jax.random.split(key)[0], output=self.language_model,
                                     dtype=dtype)

    def cut(self, params: Params) -> Params:
        """Parameters whose blocks need not be cut in every forward pass, see `Transformer.cut`."""
        blocks = params.get('backbone', {}).get('blocks')
        if blocks is None:
            return params
        backbone = params['backbone'] | {'blocks': self.transformer.cut(blocks)}
        return dict(params) | {'backbone': backbone}

    def embed(self, params: Params, batch: MicroBatch) -> jax.Array:
        """Embeddings [R, L, D] float32 of the tokens and their positions."""
        return self.transformer.embed(params['backbone'], batch.tokens, batch.positions)

    def add_embedding_gradient(
        self, total: Params, batch: MicroBatch, gradient: jax.Array
    ) -> Params:
        """Adds the gradient [R, L, D] of `embed`'s output to a sum of parameter gradients."""
        backbone = self.transformer.add_embedding_gradient(
            total['backbone'], gradient, batch.tokens, batch.positions)
        return total | {'backbone': backbone}

    def contexts(self, batch: MicroBatch, *, dropout: bool = False) -> tuple[Context, ...]:
        """What the blocks need to know of a micro-batch, see `Transformer.contexts`."""
        return self.transformer.contexts(batch.segments, batch.responses, batch.positions,
                                         self.attention, dropout=dropout)

    @property
    def transformer(self) -> Transformer:
        """The backbone."""
        return Transformer(self.architecture, jnp.dtype(self.dtype), self.remat, self.dropout,
                           self.tuning.lora)


@dataclasses.dataclass(frozen=True)
class RewardNetwork(Network):
    """Architecture of a reward model; parameters are `{'backbone': ..., 'head': ...}`.

    Leaves of the parameters may be shards, see `sharding.on_shards`.

    Attributes:
      architecture: of the backbone.
      head: which head, and what it reads.
      dtype: compute dtype of the backbone, 'float32' or 'bfloat16'.
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: recompute blocks in the backward pass.
      dropout: rate in the backbone while training.
      language_model: whether parameters hold the output embedding, if it is not tied.
      tuning: which parameters are trained.

    Raises:
      ValueError: an unknown dtype or implementation, or a read that this backbone does not have.
    """

    architecture: Architecture
    head: HeadConfig
    dtype: str = 'float32'
    attention: str = 'auto'
    remat: bool = False
    dropout: float = 0.0
    language_model: bool = False
    tuning: Tuning = dataclasses.field(default_factory=Tuning)

    def __post_init__(self):
        self.check()
        for read in self._reads:
            if read.place == 'first' and self.architecture.causal:
                raise ValueError("reads 'first': the first token of a decoder sees nothing of the "
                                 "dialogue, expected 'last' or 'mean'")
            if read.block is not None and read.block >= self.architecture.num_layers:
                raise ValueError(f'reads after block {read.block}, expected less than the '
                                 f'{self.architecture.num_layers} that there are')
        if self.language_model and not self.architecture.causal:
            raise ValueError('a language-model loss needs a decoder, this is an encoder')
        if self.tuning.kind == 'head' and (self.dropout or self.language_model):
            raise ValueError('dropout or a language-model loss where only the head is trained, '
                             'which they do not reach')

    def init(self, key: jax.Array, dtype: str = 'float32') -> Params:
        """Random parameters, see `leaf_dtype`; the backbone's do not depend on the head."""
        return {'backbone': self.init_backbone(key, dtype), 'head': self.init_head(key)}

    def init_head(self, key: jax.Array) -> Params:
        """The head's parameters of `init`."""
        return heads.init(self.head, jax.random.split(key)[1], self.architecture.hidden_size)

    @property
    def annotators(self) -> tuple[str, ...]:
        """Names of those whom the annotator head knows."""
        return self.head.annotators

    def hidden(
        self,
        params: Params,
        batch: MicroBatch,
        embedded: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        everywhere: bool = False,
        contexts: Sequence[Context] = (),
    ) -> Hidden:
        """Hidden states of a micro-batch; with a key, with dropout.

        Args:
          params, batch: of the network.
          embedded: from `embed`.
          dropout_key: see above.
          everywhere: with those of all tokens.
          contexts: in place of those that follow from the batch.
        """
        contexts = contexts or self.contexts(
            batch, dropout=self.dropout > 0 and dropout_key is not None)
        inner = {read.place for read in self._reads if read.block is not None}
        taps = sorted({read.block for read in self._reads if read.block is not None})
        last = list(dict.fromkeys(read.place for read in self._reads if read.block is None))
        places = {place: self._place(batch, place) for place in last if place in ('last', 'first')}
        if self.head.gated:
            places['prompt'] = batch.prompt_reads
        at = None
        if not everywhere and len(places) == len(last) + self.head.gated:
            # Nothing else of the last block is needed. Where all is read earlier, a token is.
            at = jnp.concatenate([*places.values()] or [batch.reads], axis=1)
        final, seen = self.transformer(
            params['backbone'], embedded, contexts, at, dropout_key, taps=taps,
            look=lambda x: {place: self._look(x, batch, place) for place in inner})
        if at is not None:
            found = dict(zip(places, jnp.split(final, max(len(places), 1), axis=1), strict=False))
        else:
            found = {place: self._look(final, batch, place) for place in last}
            if self.head.gated:
                found['prompt'] = final.reshape(-1, final.shape[-1])[batch.prompt_reads]
        pooled = {place: self.transformer.pool(params['backbone'], found[place]) for place in last}
        parts = [pooled[read.place] if read.block is None
                 else _normal(seen[taps.index(read.block)][read.place]) for read in self._reads]
        return Hidden(jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0],
                      found.get('prompt'), final if everywhere else None)

    @property
    def columns(self) -> tuple[str, ...]:
        """What `features` are of, D of each: reads of responses, then of prompts."""
        return (*self.head.reads, *(('prompt',) if self.head.gated else ()))

    @property
    def width(self) -> int:
        """W of `features`."""
        return self.architecture.hidden_size * len(self.columns)

    def features(self, params: Params, batch: MicroBatch) -> jax.Array:
        """What the head reads [C, K, W] of a micro-batch: of responses, then of their prompts."""
        hidden = self.hidden(params, batch, self.embed(params, batch))
        parts = [hidden.responses, *([] if hidden.prompts is None else [hidden.prompts])]
        return jnp.concatenate(parts, axis=-1)

    def outputs(
        self, params: Params, hidden: Hidden, levels: jax.Array | None = None
    ) -> jax.Array:
        """Raw outputs [C, K, outputs] of the head.

        Args:
          params: parameters.
          hidden: from `hidden`.
          levels: see `heads.apply`.
        """
        return heads.apply(self.head, sharding.whole(params['head']), hidden.responses,
                           prompt=hidden.prompts, levels=levels)

    def __call__(self, params: Params, batch: MicroBatch) -> jax.Array:
        """Outputs [C, K, outputs] of a micro-batch; entries not present are meaningless."""
        return self.outputs(params, self.hidden(params, batch, self.embed(params, batch)))

    def language_model_loss(
        self, params: Params, batch: MicroBatch, tokens: jax.Array
    ) -> jax.Array:
        """Negative log-likelihood (nats) of the preferred responses, summed over comparisons.

        Each comparison counts its weight times the mean over the tokens of its preferred
        response, EOS included.

        Args:
          params, batch: of the network.
          tokens: hidden states [R, L, D] of all tokens.
        """
        log_probs = jax.nn.log_softmax(self.transformer.logits(params['backbone'], tokens))
        picked = jnp.take_along_axis(log_probs, batch.lm_targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.lm_weights)

    @property
    def _reads(self) -> list[heads.Read]:
        return [heads.parse_read(text) for text in self.head.reads]

    @staticmethod
    def _place(batch: MicroBatch, place: str) -> jax.Array:
        """Index into R * L of the last or first token of each dialogue, [C, K]."""
        if place == 'last':
            return batch.reads
        # An encoder's dialogues are laid out whole, one after the other.
        return batch.reads - batch.positions.reshape(-1)[batch.reads]

    def _look(self, x: jax.Array, batch: MicroBatch, place: str) -> jax.Array:
        """Hidden states [C, K, D] float32 at a place, from those of all tokens [R, L, D]."""
        if place in ('last', 'first'):
            return x.reshape(-1, x.shape[-1])[self._place(batch, place)].astype(jnp.float32)
        x = x.reshape(-1, x.shape[-1])
        inside = self._inside(batch, batch.starts * (place == 'mean'))
        total = jnp.einsum('ckt,td->ckd', inside.astype(x.dtype), x,
                           precision=attention.precision(x.dtype),
                           preferred_element_type=jnp.float32)
        return total / jnp.sum(inside, axis=-1, keepdims=True)

    @staticmethod
    def _inside(batch: MicroBatch, starts: jax.Array) -> jax.Array:
        """Which of all R * L tokens are of each dialogue, [C, K, R * L] bool.

        Args:
          batch: see above.
          starts: [C, K] position of the first that is.
        """
        segments, responses, positions = (
            y.reshape(-1) for y in (batch.segments, batch.responses, batch.positions))
        rows = jnp.arange(len(segments)) // batch.tokens.shape[1]
        at = batch.reads[..., None]
        return ((rows == rows[at]) & (segments == segments[at])
                & ((responses == 0) | (responses == responses[at]))
                & (starts[..., None] <= positions) & (positions <= positions[at]))


def _normal(x: jax.Array) -> jax.Array:
    """A residual stream [..., D], which has no norm of its own there, with a mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def parameter_count(params: Params) -> int:
    """Number of scalars in the parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def params_digest(params: Params) -> str:
    """Hexadecimal digest of names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n'.encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
