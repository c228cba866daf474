"""Rollouts: prompts answered by the policy as it is, and what is known of the answers.

What is drawn depends on the seed, the number of the prompt in the stream of prompts and that of the
sample; nothing else that is computed with it has any influence. Answers are draws of the policy
itself, at temperature 1 and with all tokens: that is what ratios, KL and entropy are of.

Axes: C prompts, K responses to each, S tokens of a response.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrm.data.comparisons import Comparison, DataError, DataReport
from qrm.data.encoded import Encoded
from qrm.data.rows import as_chat
from qrm.data.tokens import Tokenizer, encode_prompts
from qrm.models.network import Params
from qrm.models.tuning import Tuning
from qrm.policy import batches, candidates
from qrm.policy.batches import Plan
from qrm.policy.network import PolicyNetwork
from qrm.policy.sampling import Sampling, sample
from qrm.training import inference


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Different prompts to answer.

    Attributes:
      comparisons: C of them, without responses; `group` is the opening question.
      tokens: of each [n] int32.
    """

    comparisons: list[Comparison]
    tokens: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, places: Iterable[int]) -> 'Prompts':
        """Some of them."""
        places = list(places)
        return Prompts([self.comparisons[i] for i in places], [self.tokens[i] for i in places])

    def encoded(self) -> list[Encoded]:
        """In tokens, as comparisons without responses."""
        return [Encoded(one.id, one.group, ids, (), np.zeros((0, 0), np.float32),
                        np.zeros((0, 1), np.float32))
                for one, ids in zip(self.comparisons, self.tokens, strict=True)]


class Answers(NamedTuple):
    """Responses to C prompts.

    Attributes:
      tokens: [C, K, S] int32, the stop included; 0 where there is none.
      sizes: [C, K] int32, tokens of each, at least 1.
      truncated: [C, K] bool, without a stop.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    truncated: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """[C, K, S] bool, where there is a token."""
        return np.arange(self.tokens.shape[-1]) < self.sizes[..., None]


class Read(NamedTuple):
    """What a policy says of the tokens of answers, [C, K, S] float32; 0 where there is none.

    Attributes:
      log_probs: nats.
      entropy: nats.
      values: of the value head; 0 without one.
    """

    log_probs: np.ndarray
    entropy: np.ndarray
    values: np.ndarray


def prompts_of(
    comparisons: Iterable[Comparison], report: DataReport, tokenizer: Tokenizer, longest: int, *,
    as_chats: bool = False,
) -> Prompts:
    """The different prompts of comparisons, in order; their responses are not read.

    Args:
      comparisons: of any form.
      report: counts what becomes of them.
      tokenizer: of the policy.
      longest: tokens; longer prompts are cut from the left, see `encode_prompts`.
      as_chats: texts are read as chats, see `rows.as_chat`.

    Raises:
      DataError: see `tokens.encode_prompts`.
    """
    found: dict[bytes, Comparison] = {}
    for one in comparisons:
        alone = dataclasses.replace(one, responses=(), ranks=None, preferred=None, preference=None,
                                    ratings=None, attributes={}, annotator=None)
        alone = as_chat(alone) if as_chats else alone
        answered = not isinstance(alone.prompt, str) and bool(alone.prompt) and (
            alone.prompt[-1]['role'] == 'assistant')
        if not alone.prompt or answered:
            report.dropped['no prompt to answer'] += 1
        elif found.setdefault(alone.text_digest(), alone) is not alone:
            report.dropped['prompt of an earlier row'] += 1
    kept = list(found.values())
    ids, cut = encode_prompts(kept, tokenizer, longest)
    report.kept, report.truncated = len(kept), cut
    return Prompts(kept, ids)


def answer(
    network: PolicyNetwork, params: Params, prompts: Sequence[np.ndarray], sampling: Sampling, *,
    seed: int, numbers: Sequence[int], rows: int,
) -> Answers:
    """Answers prompts, see `sampling.sample`.

    Adapters stay beside their kernels: what they cost more is less than merging them before each
    rollout does.

    Args:
      network, params: the policy.
      prompts: [n] int32 each.
      sampling: how; temperature 1, with all tokens.
      seed, numbers, rows: see `sampling.sample`.
    """
    transformer = dataclasses.replace(network.transformer, remat=False, dropout=0.0)
    shape = len(prompts), sampling.samples
    tokens = np.zeros((*shape, sampling.max_new_tokens), np.int32)
    sizes, truncated = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for place, own in sample(transformer, params['backbone'], prompts, sampling, seed=seed,
                             numbers=numbers, rows=rows):
        for k, one in enumerate(own):
            sizes[place, k], truncated[place, k] = len(one.tokens), one.truncated
            tokens[place, k, :len(one.tokens)] = one.tokens
    return Answers(tokens, sizes, truncated)


def answered(prompts: Prompts, answers: Answers, tokenizer: Tokenizer) -> list[Comparison]:
    """The prompts with the texts of their answers, as `qrm sample` writes them; after a chat each
    is a message of the assistant."""
    found = []
    for c, one in enumerate(prompts.comparisons):
        texts = [candidates.text_of(
            tokenizer, prompts.tokens[c],
            answers.tokens[c, k, :answers.sizes[c, k] - (not answers.truncated[c, k])])
            for k in range(answers.sizes.shape[1])]
        responses: Any = texts if isinstance(one.prompt, str) else [
            ({'role': 'assistant', 'content': text},) for text in texts]
        found.append(dataclasses.replace(one, responses=tuple(responses)))
    return found


def dialogues(prompts: Prompts, answers: Answers) -> list[Encoded]:
    """The answers as comparisons in tokens, of which nothing is known."""
    k = answers.sizes.shape[1]
    return [Encoded(
        one.id, one.group, ids,
        tuple(answers.tokens[c, i, :answers.sizes[c, i]] for i in range(k)),
        np.zeros((k, k), np.float32), np.full((k, 1), np.nan, np.float32),
        prompt_sizes=(len(ids),) * k)
        for c, (one, ids) in enumerate(zip(prompts.comparisons, prompts.tokens, strict=True))]


def plan(prompts: Sequence[np.ndarray], samples: int, longest: int, *, row_length: int, rows: int,
         of_responses: Sequence[str] = (), of_tokens: Sequence[str] = ()) -> Plan:
    """Shapes that hold any answers to these prompts, so that no rollout needs a new compilation.

    Args:
      prompts: [n] each.
      samples: K.
      longest: S.
      row_length, rows, of_responses, of_tokens: see `batches.plan`.
    """
    token = np.zeros(longest, np.int32)
    return batches.plan([
        Encoded('', '', ids, (token,) * samples, np.zeros((samples, samples), np.float32),
                np.zeros((samples, 1), np.float32), prompt_sizes=(len(ids),) * samples)
        for ids in prompts], row_length=row_length, rows=rows, of_responses=of_responses,
        of_tokens=of_tokens)


def read(
    network: PolicyNetwork, params: Params, encoded: Sequence[Encoded], plan: Plan, tokens: int, *,
    chunk: int,
) -> Read:
    """What a policy says of answers, by the forward pass that a step takes of them.

    Args:
      network, params: the policy.
      encoded: from `dialogues`.
      plan: shapes that hold them.
      tokens: S.
      chunk: comparisons packed together.
    """
    function, longest = _READS[network.value], plan.longest
    found = np.zeros((3, len(encoded), len(encoded[0].responses), tokens), np.float32)
    done = 0

    def make(batch: Any) -> batches.PolicyBatch:
        return batches.policy_batch(batch, longest)

    for values in inference.run(function, (2 + network.value) * longest, network, params, encoded,
                                0, 0, None, chunk, layouts=plan.layouts, make=make):
        for own in values:
            parts = own.reshape(len(own), -1, longest)[..., :tokens]
            found[:parts.shape[1], done] = np.moveaxis(parts, 1, 0)
            done += 1
    return Read(*found)


def reference(network: PolicyNetwork, trained: Params, frozen: Params
              ) -> tuple[PolicyNetwork, Params]:
    """The policy before the first step, without a value head.

    With LoRA these are the frozen weights, with the adapters off; of others what is trained is
    copied.

    Args:
      network: the policy.
      trained, frozen: its parameters before the first step.
    """
    plain = dataclasses.replace(network, tuning=Tuning(), value=False)
    if network.tuning.kind == 'lora':
        return plain, {'backbone': frozen['backbone']}
    copied = jax.tree.map(jnp.copy, {'backbone': trained['backbone']})
    return plain, network.tuning.join(copied, frozen)


def check_room(prompts: Prompts, split: str) -> None:
    """Checks that there is something to answer.

    Raises:
      DataError: there is not.
    """
    if not len(prompts):
        raise DataError(f'no prompt to answer is left in the {split} split')


def layouts_of(plan: Plan) -> str:
    """Shapes of micro-batches, for the terminal."""
    return ', '.join(f'{one.rows} x {one.length}' for one in plan.layouts)


def _read(network: PolicyNetwork, params: Params, batch: batches.PolicyBatch) -> jax.Array:
    found = network.read(params, batch, entropy=True)
    return jnp.concatenate([found.log_probs, found.entropy], axis=-1)


def _read_values(network: PolicyNetwork, params: Params, batch: batches.PolicyBatch) -> jax.Array:
    found = network.read(params, batch, entropy=True)
    return jnp.concatenate([found.log_probs, found.entropy, found.values], axis=-1)


_READS = {False: _read, True: _read_values}
