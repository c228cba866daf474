"""Comparisons as tokens: tokenizers, shared prompts, over-length dialogues.

Each whole dialogue is tokenised once, so that its tokens are those a model would see if the
dialogue stood alone; the longest common token prefix of the dialogues is the shared prompt.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import jinja2
import numpy as np
import tokenizers
import transformers

from qrm.data.comparisons import Comparison, DataError, DataReport, Text

Tokenizer = transformers.PreTrainedTokenizerBase
Ids = np.ndarray  # [length] int32

OVERLONG = ('truncate_prompt', 'drop', 'error')
_BATCH = 2048  # dialogues handed to the tokenizer at a time


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One comparison in tokens; dialogue k is `prompt` followed by `responses[k]`.

    Attributes:
      id, group: as in `Comparison`.
      prompt: [P] int32, tokens shared by all dialogues.
      responses: K arrays [R_k] int32 with R_k >= 1; the reward is read at the last token.
      preference: [K, K] float32, see `Comparison.preference_matrix`.
      ratings: [K, A] float32, see `Comparison.rating_matrix`.
      margin, weight: as in `Comparison`.
      annotator: index of who judged, -1 if unknown.
      prompt_ends: K indices into each dialogue: the last token that it shares with the prompt
        alone. Unlike the end of `prompt`, no other response changes it.
    """

    id: str
    group: str
    prompt: Ids
    responses: tuple[Ids, ...]
    preference: np.ndarray
    ratings: np.ndarray
    margin: float = 0.0
    weight: float = 1.0
    annotator: int = -1
    prompt_ends: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the comparison with the prompt stored once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the longest dialogue."""
        return len(self.prompt) + max(map(len, self.responses))


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer from a local folder or the Hugging Face hub; runs no remote code.

    Raises:
      DataError: there is none at `path`.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # The library raises a different type for each way to fail.
        raise DataError(
            f'{path}: no tokenizer could be loaded ({error}); expected tokenizer.json, or '
            'vocab.json and merges.txt, or set config.model.tokenizer to where it is'
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, with an end-of-text and a padding token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|endoftext|>', '<|pad|>'],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token='<|endoftext|>', pad_token='<|pad|>'
    )


def texts_of(comparisons: Iterable[Comparison]) -> Iterable[str]:
    """All texts of the comparisons, to train a tokenizer on."""
    for comparison in comparisons:
        for text in (comparison.prompt, *comparison.responses):
            yield text if isinstance(text, str) else '\n'.join(m['content'] for m in text)


def tokenize(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, *, append_eos: bool = True
) -> list[list[Ids]]:
    """Tokenises every dialogue of every comparison as a whole.

    Chats are rendered by the tokenizer's chat template, which brings its own special tokens;
    plain dialogues get those the tokenizer adds by itself. So a BOS token is never doubled. EOS
    is appended unless the dialogue ends with it already.

    Returns:
      One list of K arrays [length] int32 for each comparison.

    Raises:
      DataError: EOS or a chat template is needed and missing, or a dialogue has no tokens.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError(f'{tokenizer.name_or_path}: the tokenizer has no EOS token, and '
                        'append_eos is set')
    chats: list[str] = []
    plain: list[str] = []
    for comparison in comparisons:
        for response in comparison.responses:
            if isinstance(comparison.prompt, str):
                plain.append(comparison.prompt + response)
            else:
                chats.append(_render(comparison, response, tokenizer))
    chat_ids = _ids(chats, tokenizer, add_special_tokens=False)
    plain_ids = _ids(plain, tokenizer, add_special_tokens=True)
    result = []
    for comparison in comparisons:
        source = plain_ids if isinstance(comparison.prompt, str) else chat_ids
        dialogues = [next(source) for _ in comparison.responses]
        if append_eos:
            dialogues = [_with_eos(ids, tokenizer.eos_token_id) for ids in dialogues]
        if not all(map(len, dialogues)):
            raise DataError(f'{comparison.id}: a dialogue has no tokens, expected text')
        result.append([np.asarray(ids, np.int32) for ids in dialogues])
    return result


def prompt_ends(
    comparison: Comparison, dialogues: Sequence[Ids], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Index of the last token of each dialogue that belongs to the prompt as it is alone.

    A function of the prompt and the one response: the tokens that all of them share may reach
    into the responses. It is 0 where there is no prompt.
    """
    if isinstance(comparison.prompt, str):
        alone = next(_ids([comparison.prompt], tokenizer, add_special_tokens=True))
    elif comparison.prompt:
        alone = next(_ids([_render(comparison, (), tokenizer)], tokenizer,
                          add_special_tokens=False))
    else:
        alone = []
    alone = np.asarray(alone, np.int32)
    return tuple(max(_common_length((alone, ids)) - 1, 0) for ids in dialogues)


def split_prompt(dialogues: Sequence[Ids]) -> tuple[Ids, tuple[Ids, ...]]:
    """Splits dialogues into their longest common prefix and the rest, at least one token each."""
    length = _common_length([ids[:-1] for ids in dialogues])
    return dialogues[0][:length], tuple(ids[length:] for ids in dialogues)


def encode(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    report: DataReport,
    *,
    max_length: int,
    overlong: str = 'truncate_prompt',
    append_eos: bool = True,
    preferences: bool = True,
    ratings: bool = False,
    named: bool = False,
    attributes: Sequence[str] = (),
    annotators: Sequence[str] = (),
) -> list[Encoded]:
    """Encodes comparisons to learn from or to evaluate on.

    A comparison with a dialogue longer than `max_length` tokens (EOS included) loses the left
    end of its shared prompt ('truncate_prompt'), is dropped ('drop') or raises ('error');
    responses always stay whole. Comparisons that say nothing are dropped: those without any known
    preference or with identical responses, unless ratings are read and there is one. All is
    counted in `report`.

    Args:
      comparisons: what to encode.
      tokenizer: for texts and chats.
      report: is added to.
      max_length, overlong, append_eos: see above.
      preferences, ratings: what is read; at least one of them.
      named: drop comparisons that do not say who judged.
      attributes: names of the rated attributes; (): responses are rated as a whole.
      annotators: names of the annotators that have an index.

    Raises:
      DataError: see `tokenize`; or a dialogue is too long and `overlong` is 'error'.
    """
    if overlong not in OVERLONG:
        raise ValueError(f'overlong={overlong!r}, expected one of {OVERLONG}')
    special = [token for token in tokenizer.all_special_tokens if token]
    index_of = {name: i for i, name in enumerate(annotators)}
    kept = []
    for comparison, dialogues in zip(
        comparisons, tokenize(comparisons, tokenizer, append_eos=append_eos), strict=True
    ):
        preference = comparison.preference_matrix()
        rating = comparison.rating_matrix(attributes)
        rated = ratings and np.isfinite(rating).any()
        if not rated and all(np.array_equal(ids, dialogues[0]) for ids in dialogues[1:]):
            report.identical += len(dialogues) > 1
            report.dropped['identical responses' if len(dialogues) > 1 else 'one response'] += 1
            continue
        if not (rated or (preferences and preference.any())) or not comparison.weight:
            known = ' or '.join(['preference'] * preferences + ['rating'] * ratings)
            report.dropped[f'no {known} known, or weight 0'] += 1
            continue
        if named and comparison.annotator is None:
            report.dropped['annotator not named'] += 1
            continue
        prompt, responses = split_prompt(dialogues)
        excess = len(prompt) + max(map(len, responses)) - max_length
        if excess > 0:
            if overlong == 'error':
                raise DataError(f"{comparison.id}: a dialogue of {max_length + excess} tokens, "
                                f"expected at most {max_length} (overlong is 'error')")
            if overlong == 'drop' or excess > len(prompt):
                reason = 'a dialogue' if overlong == 'drop' else 'a response alone'
                report.dropped[f'{reason} is longer than {max_length} tokens'] += 1
                continue
            report.truncated += 1
            prompt = prompt[excess:]
        ends = prompt_ends(comparison, dialogues, tokenizer) if len(attributes) > 1 else ()
        encoded = Encoded(comparison.id, comparison.group, prompt, responses, preference, rating,
                          comparison.margin, comparison.weight,
                          index_of.get(comparison.annotator, -1),
                          tuple(max(end - max(excess, 0), 0) for end in ends))
        kept.append(encoded)
        report.tied += bool((preference == 0.5).any())
        report.dialogue_tokens += len(prompt) * len(responses) + sum(map(len, responses))
        report.packed_tokens += encoded.size
        report.prompt_tokens += len(prompt) * len(responses)
        if any(token in text for text in texts_of((comparison,)) for token in special):
            report.notes['special tokens spelt out in the text'] += 1
    report.kept += len(kept)
    return kept


def encode_to_score(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    append_eos: bool,
    attributes: Sequence[str] = (),
) -> tuple[list[Encoded], int]:
    """Encodes comparisons to be scored: none is dropped, each dialogue is cut by itself.

    A dialogue longer than `max_length` keeps its last `max_length` tokens whatever its
    neighbours are, so that a score never depends on them.

    Returns:
      The encoded comparisons, in order, and how many dialogues were cut.
    """
    result, cut = [], 0
    for comparison, dialogues in zip(
        comparisons, tokenize(comparisons, tokenizer, append_eos=append_eos), strict=True
    ):
        cut += sum(len(ids) > max_length for ids in dialogues)
        prompt, responses = split_prompt([ids[-max_length:] for ids in dialogues])
        ends = prompt_ends(comparison, dialogues, tokenizer) if len(attributes) > 1 else ()
        ends = tuple(max(end - max(len(ids) - max_length, 0), 0)
                     for end, ids in zip(ends, dialogues, strict=False))
        result.append(Encoded(comparison.id, comparison.group, prompt, responses,
                              comparison.preference_matrix(),
                              comparison.rating_matrix(attributes), prompt_ends=ends))
    return result, cut


def has_preferred(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any pair with a preferred side."""
    return any((item.preference > 0.5).any() for item in encoded)


def has_rating(encoded: Iterable[Encoded]) -> bool:
    """Whether there is any rated response."""
    return any(np.isfinite(item.ratings).any() for item in encoded)


def fingerprint(encoded: Sequence[Encoded]) -> str:
    """SHA-256 over everything training reads of the comparisons, to recognise other data."""
    digest = hashlib.sha256()
    for item in encoded:
        for array in (item.prompt, *item.responses, item.preference, item.ratings):
            digest.update(f'{array.shape}'.encode())
            digest.update(array.tobytes())
        digest.update(f'{item.margin} {item.weight} {item.annotator} {item.prompt_ends}'.encode())
    return digest.hexdigest()


def _common_length(sequences: Sequence[Ids]) -> int:
    """Length of the longest common prefix."""
    limit = min(map(len, sequences))
    first = sequences[0][:limit]
    same = np.all([ids[:limit] == first for ids in sequences], axis=0)
    return limit if same.all() else int(np.argmin(same))


def _render(comparison: Comparison, response: Text, tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise DataError(f'{comparison.id}: chat messages, but the tokenizer '
                        f'{tokenizer.name_or_path!r} has no chat template')
    messages = [*comparison.prompt, *response]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except jinja2.TemplateError as error:
        raise DataError(f'{comparison.id}: the chat template refuses it ({error})') from error
    # Some templates end in EOS and a line feed: EOS is then the end, not to be appended again.
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token or '\0') else text


def _ids(
    texts: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        yield from tokenizer(
            texts[start:start + _BATCH],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,  # lengths beyond the model's are cut, and counted, later
        )['input_ids']


def _with_eos(ids: list[int], eos: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == eos:  # spelt out in the text, added by the tokenizer, or both
        end -= 1
    return [*ids[:end], eos]
