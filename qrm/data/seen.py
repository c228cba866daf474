"""What a run has read, by which it is recognised in other files: digests, not texts."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qrm.data.comparisons import Comparison, DataReport, digest


@dataclasses.dataclass(frozen=True)
class Seen:
    """The comparisons that a run was trained on.

    Attributes:
      source: digest of all that the run's source says, see `sources.Source`.
      texts: digests of the training comparisons, see `Comparison.text_digest`.
      openings: digests of their opening questions.
    """

    source: str
    texts: frozenset[bytes]
    openings: frozenset[bytes]

    @classmethod
    def of(cls, source: str, comparisons: Sequence[Comparison]) -> 'Seen':
        """What is kept of a source's training comparisons."""
        return cls(source, frozenset(c.text_digest() for c in comparisons),
                   frozenset(digest(c.group) for c in comparisons if c.has_opening))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Seen':
        """What `arrays` gave.

        Raises:
          KeyError, ValueError: something else.
        """
        source, = arrays['source'].tolist()
        texts, openings = (
            frozenset(map(bytes, np.asarray(arrays[name], np.uint8).reshape(-1, len(digest('')))))
            for name in ('texts', 'openings'))
        return cls(source, texts, openings)

    def arrays(self) -> dict[str, np.ndarray]:
        """The same as arrays of bytes, in an order of their own."""
        return {'source': np.array([self.source])} | {
            name: np.frombuffer(b''.join(sorted(found)), np.uint8).reshape(-1, len(digest('')))
            for name, found in (('texts', self.texts), ('openings', self.openings))}

    def note(self, comparisons: Sequence[Comparison], report: DataReport) -> None:
        """Notes how many comparisons the run has been trained on, and how many questions."""
        found = {
            'row this run was trained on': [c.text_digest() in self.texts for c in comparisons],
            'opening question this run was trained on': [
                c.has_opening and digest(c.group) in self.openings for c in comparisons]}
        report.notes.update({note: sum(hits) for note, hits in found.items() if any(hits)})
