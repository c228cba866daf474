"""Formats of preference data: how the data sets of the field say what people prefer.

A format is a table: where texts stand in a row, and where and by which values it says what is
preferred. `translate` makes of its rows what `rows.parse_row` reads. Places are keys, those of
objects within objects joined by dots: 'info.post'.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qrm.data.comparisons import in_a_line
from qrm.data.rows import ASSISTANT, HUMAN
from qrm.data.verdicts import (
    NOTHING,
    TIE,
    Chance,
    Ensemble,
    Fixed,
    Flags,
    Panel,
    Place,
    Sign,
    Values,
    Verdict,
    shown,
    whole_number,
)


class Parts(NamedTuple):
    """A prompt of several parts; those that a row does not have are left out.

    Attributes:
      places: title and place of each; '': a title alone.
      joint: between them.
    """

    places: tuple[tuple[str, str], ...]
    joint: str


class Items(NamedTuple):
    """Responses in a list of objects, or in lists of texts.

    Attributes:
      lists: keys of the lists.
      text: key of a text in an object; '': the items are texts.
      rating: key of a number in an object, higher is better; '': none.
      rank: key of a place, 1 best; '': none.
      attributes: name of an attribute -> key of a number in an object.
      ranked: whether each of the first list is preferred to all of the second; nothing is said
        of those of one list, so each of the first is in a comparison of its own.
    """

    lists: tuple[str, ...]
    text: str = ''
    rating: str = ''
    rank: str = ''
    attributes: Mapping[str, str] = {}
    ranked: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows say what `rows.parse_row` reads.

    Attributes:
      home: where such rows are published.
      responses: places of responses, or a list of them.
      prompt: place of the prompt, or its parts; '': it is what the responses, which are whole
        chats, have in common.
      verdict: which of two responses is preferred; None: ratings or ranks say it.
      panel: what each of several judges says, in place of the verdict.
      marks: places that a row must have beside, to be taken for one of this format.
      ratings: places of a rating of each response, a number or whether it is good.
      attributes: names of attributes -> places, of a single response.
      annotator, group, id: places of names.
      strength: place of a strength of what is preferred, negative where it is doubted; '': as
        the verdict says.
      unless: keys that a row of this format does not have.
      turns: whether a prompt and a response are what two say to each other; else the response
        completes the prompt.
      said_by: what the user's and the assistant's turns begin with in a prompt of several.
      each: what turns a row into rows before it is read, as of texts that are JSON.
      ask: why it must be named; '': rows that look like it are taken for it.
    """

    home: str
    responses: tuple[str, ...] | Items
    prompt: str | Parts = 'prompt'
    verdict: Verdict | None = None
    panel: Panel | None = None
    marks: tuple[str, ...] = ()
    ratings: tuple[str, ...] = ()
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotator: str = ''
    group: str = ''
    id: str = ''
    strength: str = ''
    unless: tuple[str, ...] = ()
    turns: bool = True
    said_by: tuple[str, str] | None = None
    each: Callable[[Place, str], Iterable[Mapping[str, Any]]] | None = None
    ask: str = ''

    def fits(self, row: Any) -> bool:
        """Whether a row has what this format needs; null is no value, but a key."""
        if not isinstance(row, Mapping) or any(key in row for key in self.unless):
            return False
        if not all(_has(row, key) for key in self.marks):
            return False
        own = {key.split('.')[0] for key in self.marks}
        if any(all(row.get(key) is not None for key in keys) and not own.issuperset(keys)
               for keys in _COMPLETE):
            return False
        place = Place('', row)
        if isinstance(self.responses, Items) and (self.responses.ranked or not self.each):
            kind = Mapping if self.responses.text else str
            return all(items is None or (isinstance(items, list) and all(
                isinstance(item, kind) for item in items))
                for items in map(place.get, self.responses.lists))
        if not self.prompt and not self.each:
            return all(chat is None or (isinstance(chat, list) and len(chat) > 1)
                       for chat in map(place.get, self.responses))
        return True


# Keys by which a row is one of this project: another format must read them itself.
_COMPLETE = (('chosen', 'rejected'), ('responses',), ('response',))


def _has(row: Mapping[str, Any], place: str) -> bool:
    """Whether a row has a key, be it null; of a place within an object, a value."""
    first, _, rest = place.partition('.')
    if not rest:
        return first in row
    return Place('', row).get(place) is not None


_AB = {'model_a': 0, 'model_b': 1}
_TIES = {'tie': TIE, 'tie (bothbad)': TIE, 'both_bad': TIE}
_UNSURE = {'tie': TIE, 'tie (inconsistent)': NOTHING}
_LEANS = {'A-is-clearly-better': 0, 'A-is-slightly-better': 0, 'Tie': TIE,
          'B-is-slightly-better': 1, 'B-is-clearly-better': 1}
_NUMBERS = 'the numbers of this format mean something else in others'
_HELPFULNESS = ('helpfulness', 'correctness', 'coherence', 'complexity', 'verbosity')
_REDDIT = Parts((('SUBREDDIT: r/', 'info.subreddit'), ('TITLE: ', 'info.title'),
                 ('POST: ', 'info.post'), ('ARTICLE: ', 'info.article'), ('TL;DR:', '')), '\n\n')
_TASK = Parts((('', 'instruction'), ('', 'input')), '\n')
_EXTRA_ID = ('<extra_id_1>User\n', '<extra_id_1>Assistant\n')
_ASPECTS = {name: f'annotations.{name}.Rating' for name in (
    'helpfulness', 'honesty', 'instruction_following', 'truthfulness')}


# What turns a row into others before it is read.


def _annotators(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Attributes that are lists, a number of each annotator: their mean, or a row of each."""
    if not any(isinstance(place.row.get(name), list) for name in _HELPFULNESS):
        yield place.row
        return
    each = {}
    for name in _HELPFULNESS:
        values = place.need(name, 'a list of numbers')
        if not isinstance(values, list) or not values or len(values) != len(
                next(iter(each.values()), values)):
            place.fail(name, f'{shown(values)}, expected as many numbers as '
                             f'{_HELPFULNESS[0]!r} has')
        each[name] = [place.as_number(name, value) for value in values]
    if votes == 'share':
        each = {name: [sum(values) / len(values)] for name, values in each.items()}
    for numbers in zip(*each.values(), strict=True):
        yield {**place.row, **dict(zip(each, numbers, strict=True))}


def _alternating(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Turns in a list, the first of them the human's, as the dialogues of Anthropic's HH."""
    marks, dialogues = (HUMAN, ASSISTANT), {}
    for key in ('chosen', 'rejected'):
        turns = place.need(key, 'a list of turns')
        if (not isinstance(turns, list) or len(turns) % 2
                or not all(isinstance(turn, str) for turn in turns)):
            place.fail(key, f'{shown(turns)}, expected turns of text that end with a response')
        dialogues[key] = ''.join(f'{marks[i % 2]} {turn}' for i, turn in enumerate(turns))
    yield {**place.row, **dialogues}


def _one_chosen(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """A list of good responses, each with all of the others."""
    for chosen in list_at(place, 'chosen'):
        yield {**place.row, 'chosen': [chosen]}


def _last(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Messages, of which the last is the response."""
    messages = place.need('messages', 'a list of messages')
    if not isinstance(messages, list) or len(messages) < 2:
        place.fail('messages', f'{shown(messages)}, expected a prompt and a response')
    yield {**place.row, 'prompt': messages[:-1], 'messages': messages[-1:]}


def _parsed_lists(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Turns whose texts are JSON lists in a text, an exchange each, as chats."""
    turns = {}
    for key in ('prompt', 'response_a', 'response_b'):
        text = place.need(key, 'a list as JSON')
        try:
            turns[key] = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            place.fail(key, f'no JSON ({in_a_line(error)}), expected a list of texts')
        if not isinstance(turns[key], list):
            place.fail(key, f'{shown(turns[key])}, expected a list of texts')
        if None in turns[key]:
            place.fail(key, 'null in place of a turn, expected texts')
    if len({len(each) for each in turns.values()}) != 1:
        place.fail('prompt', f'{len(turns["prompt"])} turns, expected as many as responses')
    chats = {key: [message for asked, said in zip(turns['prompt'], turns[key], strict=True)
                   for message in ({'role': 'user', 'content': asked},
                                   {'role': 'assistant', 'content': said})]
             for key in ('response_a', 'response_b')}
    yield {**place.row, **chats, 'prompt': None}


def _conversations(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Chats that may be JSON in a text, and whose messages have more than is said in them."""
    chats = {}
    for key in ('conversation_a', 'conversation_b'):
        chat = place.need(key, 'a list of messages')
        if isinstance(chat, str):
            try:
                chat = json.loads(chat)
            except (ValueError, RecursionError):
                place.fail(key, f'{shown(chat)}, expected a list of messages')
        if not isinstance(chat, list) or not all(isinstance(m, Mapping) for m in chat):
            place.fail(key, f'{shown(chat)}, expected a list of messages')
        chats[key] = [{name: message.get(name) for name in ('role', 'content')}
                      for message in chat]
    yield {**place.row, **chats}


def _turns(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Judgements of the first exchange of a conversation leave out the second."""
    place.read.add('turn')
    turn = whole_number(place.row.get('turn'))
    if turn not in (1, 2) or isinstance(turn, bool):
        place.fail('turn', f'{shown(turn)}, expected 1 or 2')
    for row in _conversations(place, votes):
        yield {**row, **{key: row[key][:2 * turn] for key in ('conversation_a', 'conversation_b')}}


def _siblings(place: Place, votes: str) -> Iterator[Mapping[str, Any]]:
    """Every set of ranked answers in a tree of messages, after the messages before it."""

    def walk(node: Any, before: tuple[Any, ...]) -> Iterator[Mapping[str, Any]]:
        if not isinstance(node, Mapping) or not isinstance(node.get('text'), str):
            place.fail('prompt', f"{shown(node)}, expected messages with 'text'")
        roles = {'prompter': 'user', 'assistant': 'assistant'}
        if node.get('role') not in list(roles):
            place.fail('prompt', f"role {node.get('role')!r}, expected prompter or assistant")
        role = roles[node['role']]
        chat = (*before, {'role': role, 'content': node['text']})
        replies = node.get('replies') or []
        if not isinstance(replies, list):
            place.fail('prompt', f'{shown(replies)}, expected a list of replies')
        ranked = [reply for reply in replies if isinstance(reply, Mapping)
                  and reply.get('rank') is not None and not reply.get('deleted')]
        if role == 'user' and len(ranked) > 1:
            yield {'id': node.get('message_id'), 'prompt': list(chat), 'answers': ranked,
                   'group': place.row.get('message_tree_id')}
        for reply in replies:
            # What was taken out may have no text, and nothing that follows it a whole prompt.
            if not (isinstance(reply, Mapping) and reply.get('deleted')
                    and reply.get('text') is None):
                yield from walk(reply, chat)

    place.read |= {'prompt', 'message_tree_id'}
    yield from walk(place.need('prompt', 'the first message of a tree'), ())


FORMATS: dict[str, Format] = {
    'alpaca-eval': Format(
        'tatsu-lab/alpaca_eval, annotations', ('output_1', 'output_2'), _TASK,
        Chance('preference', 1.0, 2.0, 0.0), annotator='annotator',
        marks=('instruction', 'output_1', 'output_2', 'preference'), ask=_NUMBERS),
    'arena-55k': Format(
        'lmsys/lmsys-arena-human-preference-55k', ('response_a', 'response_b'), '',
        Flags(('winner_model_a', 'winner_model_b', 'winner_tie')), id='id', each=_parsed_lists,
        marks=('response_a', 'response_b', 'winner_model_a', 'winner_model_b', 'winner_tie')),
    'arena': Format(
        'lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-100k and -140k',
        ('conversation_a', 'conversation_b'), '', Values('winner', _AB | _TIES), annotator='judge',
        each=_conversations, marks=('conversation_a', 'conversation_b', 'winner', 'language')),
    'helpsteer': Format(
        'nvidia/HelpSteer, nvidia/HelpSteer2 and its disagreements/', ('response',),
        attributes={name: name for name in _HELPFULNESS}, each=_annotators, said_by=_EXTRA_ID,
        marks=('prompt', 'response', *_HELPFULNESS), unless=('rating',)),
    'helpsteer2-preference': Format(
        'nvidia/HelpSteer2, preference/, the three judgements that agree most',
        ('response_1', 'response_2'), said_by=_EXTRA_ID,
        panel=Panel(('three_most_similar_preferences',), Sign('strength', 0, 3.0)),
        marks=('prompt', 'response_1', 'response_2', 'three_most_similar_preferences')),
    'helpsteer2-preference:all': Format(
        'nvidia/HelpSteer2, preference/, all judgements', ('response_1', 'response_2'),
        panel=Panel(('all_preferences_unprocessed',), Sign('strength', 0, 3.0, (-100.0,))),
        marks=('prompt', 'response_1', 'response_2', 'all_preferences_unprocessed'),
        said_by=_EXTRA_ID),
    'helpsteer2-preference:overall': Format(
        'nvidia/HelpSteer2, preference/', ('response_1', 'response_2'), said_by=_EXTRA_ID,
        verdict=Sign('preference_strength', 0, 3.0),
        marks=('prompt', 'response_1', 'response_2', 'preference_strength')),
    'helpsteer3': Format(
        'nvidia/HelpSteer3', ('response1', 'response2'), 'context',
        panel=Panel(('individual_preference',), Sign('score', 0, 3.0)),
        marks=('context', 'response1', 'response2', 'individual_preference')),
    'hh-strength': Format(
        'fnlp/hh-rlhf-strength-cleaned', ('chosen', 'rejected'), '', Fixed('chosen'),
        strength='mean preference difference', each=_alternating,
        marks=('chosen', 'rejected', 'chosen score list', 'rejected score list')),
    'hh-strength:models': Format(
        'fnlp/hh-rlhf-strength-cleaned, by its ten reward models', ('chosen', 'rejected'), '',
        Ensemble('chosen score list', 'rejected score list'), each=_alternating,
        marks=('chosen', 'rejected', 'chosen score list', 'rejected score list')),
    'judgebench': Format(
        'ScalerLab/JudgeBench', ('response_A', 'response_B'), 'question',
        Values('label', {'A>B': 0, 'B>A': 1}), id='pair_id',
        marks=('question', 'response_A', 'response_B', 'label')),
    'kto': Format(
        'KTO labels, as of TRL', ('completion',), ratings=('label',),
        marks=('prompt', 'completion', 'label')),
    'kto-chats': Format(
        'KTO labels, as of LLaMA-Factory', ('messages',), 'prompt', ratings=('label',), each=_last,
        marks=('messages', 'label')),
    'llmbar': Format(
        'princeton-nlp/LLMBar', ('output_1', 'output_2'), 'input',
        Values('label', {1: 0, 2: 1}), marks=('input', 'output_1', 'output_2', 'label'),
        ask=_NUMBERS),
    'mt-bench': Format(
        'lmsys/mt_bench_human_judgments', ('conversation_a', 'conversation_b'), '',
        Values('winner', _AB | _UNSURE), annotator='judge', group='question_id', each=_turns,
        marks=('conversation_a', 'conversation_b', 'winner', 'judge', 'turn'),
        unless=('language',)),
    'multipref': Format(
        'allenai/multipref', ('completion_a', 'completion_b'), 'text',
        panel=Panel(('normal_worker_annotations', 'expert_worker_annotations'),
                    Values('overall_pref', _LEANS), 'evaluator'),
        id='comparison_id', group='prompt_id',
        marks=('text', 'completion_a', 'completion_b', 'normal_worker_annotations')),
    'nectar': Format(
        'berkeley-nest/Nectar', Items(('answers',), 'answer', rank='rank'),
        marks=('prompt', 'answers')),
    'oasst': Format(
        'OpenAssistant/oasst1, trees', Items(('answers',), 'text', rank='rank'), each=_siblings,
        group='group', id='id', marks=('message_tree_id', 'prompt')),
    'pandalm': Format(
        "PandaLM's test set", ('response1', 'response2'), _TASK,
        panel=Panel(('annotator1', 'annotator2', 'annotator3'),
                    Values('annotator', {1: 0, 2: 1, 0: TIE}), listed=False),
        id='idx', marks=('instruction', 'response1', 'response2', 'annotator1')),
    'pku-saferlhf:better': Format(
        'PKU-Alignment/PKU-SafeRLHF', ('response_0', 'response_1'),
        verdict=Values('better_response_id', {0: 0, 1: 1}),
        marks=('prompt', 'response_0', 'response_1', 'better_response_id'),
        ask='it has two preferences, for the better and for the safer response'),
    'pku-saferlhf:safer': Format(
        'PKU-Alignment/PKU-SafeRLHF', ('response_0', 'response_1'),
        verdict=Values('safer_response_id', {0: 0, 1: 1}),
        marks=('prompt', 'response_0', 'response_1', 'safer_response_id'),
        ask='it has two preferences, for the better and for the safer response'),
    'ppe-preference': Format(
        'lmarena-ai/PPE-Human-Preference-V1', ('response_1', 'response_2'),
        verdict=Values('winner', _AB | _TIES), id='question_id',
        marks=('prompt', 'response_1', 'response_2', 'winner')),
    'reward-bench-2': Format(
        'allenai/reward-bench-2, THU-KEG/RM-Bench', Items(('chosen', 'rejected'), ranked=True),
        id='id', each=_one_chosen, marks=('prompt', 'chosen', 'rejected')),
    'shp': Format(
        'stanfordnlp/SHP', ('human_ref_A', 'human_ref_B'), 'history',
        Values('labels', {1: 0, 0: 1}), strength='score_ratio', group='post_id',
        marks=('history', 'human_ref_A', 'human_ref_B', 'labels')),
    'summarize-axis': Format(
        'openai/summarize_from_feedback, axis', ('summary.text',),
        _REDDIT, ratings=('summary.axes.overall',), annotator='worker', group='info.id',
        attributes={name: f'summary.axes.{name}' for name in (
            'accuracy', 'coverage', 'coherence')},
        turns=False, marks=('info', 'summary.text', 'summary.axes')),
    'summarize-comparisons': Format(
        'openai/summarize_from_feedback, comparisons', Items(('summaries',), 'text'),
        _REDDIT, Values('choice', {0: 0, 1: 1}), annotator='worker', group='info.id',
        turns=False, marks=('info', 'summaries', 'choice')),
    'ultrafeedback-binarized': Format(
        'HuggingFaceH4/ultrafeedback_binarized', ('chosen', 'rejected'), '',
        ratings=('score_chosen', 'score_rejected'), id='prompt_id',
        marks=('chosen', 'rejected', 'score_chosen', 'score_rejected')),
    'ultrafeedback:fine-grained': Format(
        'openbmb/UltraFeedback, the mean of four aspects',
        Items(('completions',), 'response', rating='fine-grained_score', attributes=_ASPECTS),
        'instruction', marks=('instruction', 'completions'),
        ask='its overall scores were wrong in early revisions, and contradict the others'),
    'ultrafeedback:overall': Format(
        'openbmb/UltraFeedback, the overall score',
        Items(('completions',), 'response', rating='overall_score', attributes=_ASPECTS),
        'instruction', marks=('instruction', 'completions'),
        ask='its overall scores were wrong in early revisions, and contradict the others'),
    'webgpt': Format(
        'openai/webgpt_comparisons', ('answer_0', 'answer_1'), 'question.full_text',
        Sign('score_0', 1), group='question.id',
        marks=('question', 'answer_0', 'answer_1', 'score_0', 'score_1')),
}


def attributes(name: str) -> tuple[str, ...]:
    """Names of attributes that rows of a format rate; () of what is none."""
    known = FORMATS.get(name)
    if known is None:
        return ()
    items = known.responses
    return tuple(items.attributes if isinstance(items, Items) else known.attributes)


def describe(name: str) -> dict[str, str]:
    """What a format says and where, in words: topic -> place."""
    known = FORMATS[name]
    prompt, responses = known.prompt, known.responses
    said = {
        'home': known.home,
        'prompt': (f'`{prompt}`' if isinstance(prompt, str) and prompt else
                   ', '.join(f'`{key}`' for _, key in prompt.places if key) if prompt else
                   'what the responses have in common'),
        'responses': ', '.join(f'`{key}`' for key in (
            responses.lists if isinstance(responses, Items) else responses)),
        'preference': str(known.panel or known.verdict or ''),
    }
    if isinstance(responses, Items):
        said['responses'] = f'each in {said["responses"]}'
        said['preference'] = said['preference'] or (
            f'rank `{responses.rank}`, the lowest is best' if responses.rank else
            f'rating `{responses.rating}`' if responses.rating else
            'each of the first list over all of the second')
    elif known.ratings:
        said['preference'] = 'ratings ' + ', '.join(f'`{key}`' for key in known.ratings)
    elif known.attributes and not said['preference']:
        said['preference'] = 'ratings of attributes'
    more = {'strength': known.strength, 'annotator': known.annotator, 'group': known.group}
    if known.panel and known.panel.listed:
        more['annotator'] = known.panel.name
    said |= {topic: f'`{place}`' for topic, place in more.items() if place}
    if rated := attributes(name):
        said['attributes'] = ', '.join(rated)
    return said | ({'must be named': known.ask} if known.ask else {})


def list_at(place: Place, key: str) -> list[Any]:
    value = place.need(key, 'a list of responses')
    if not isinstance(value, list) or not value:
        place.fail(key, f'{shown(value)}, expected a list of responses')
    return value
