"""What a run has read, by which it is recognised in other files: digests, not texts."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qrm.data.comparisons import Comparison, DataReport
from qrm.data.records import DIGEST, Comparisons, sortable


@dataclasses.dataclass(frozen=True)
class Seen:
    """The comparisons that a run was trained on.

    Attributes:
      source: digest of all that the run's source says, see `sources.Source`.
      texts: digests of the training comparisons, see `Comparison.text_digest`, each once, sorted,
        one after the other.
      openings: digests of their opening questions, likewise.
    """

    source: str
    texts: bytes
    openings: bytes

    @classmethod
    def of(cls, source: str, comparisons: Sequence[Comparison]) -> 'Seen':
        """What is kept of a source's training comparisons."""
        texts, openings, has_opening = _digests(Comparisons.of(comparisons))
        return cls(source, np.unique(texts).tobytes(), np.unique(openings[has_opening]).tobytes())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Seen':
        """What `arrays` gave.

        Raises:
          KeyError, ValueError: something else.
        """
        source, = arrays['source'].tolist()
        texts, openings = (
            np.unique(sortable(np.asarray(arrays[name], np.uint8).reshape(-1, DIGEST.itemsize)))
            for name in ('texts', 'openings'))
        return cls(source, texts.tobytes(), openings.tobytes())

    def arrays(self) -> dict[str, np.ndarray]:
        """The same as arrays of bytes."""
        return {'source': np.array([self.source])} | {
            name: np.frombuffer(found, np.uint8).reshape(-1, DIGEST.itemsize)
            for name, found in (('texts', self.texts), ('openings', self.openings))}

    def opens(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """Of each comparison whether its opening question is one of these, bool."""
        _, openings, has_opening = _digests(Comparisons.of(comparisons))
        return has_opening & _among(openings, self.openings)

    def note(self, comparisons: Sequence[Comparison], report: DataReport) -> None:
        """Notes how many comparisons the run has been trained on, and how many questions."""
        texts, *_ = _digests(Comparisons.of(comparisons))
        found = {
            'row this run was trained on': _among(texts, self.texts),
            'opening question this run was trained on': self.opens(comparisons)}
        report.notes.update({note: int(hits.sum()) for note, hits in found.items() if hits.any()})


def _digests(comparisons: Comparisons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of texts and of opening questions, and whether there is a question."""
    return (*(sortable(comparisons.numbers(name)) for name in ('texts', 'opening')),
            comparisons.numbers('has_opening'))


def _among(digests: np.ndarray, known: bytes) -> np.ndarray:
    return np.isin(digests, np.frombuffer(known, DIGEST))
