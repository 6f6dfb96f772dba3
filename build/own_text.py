"""Text that a model is looked at over while it is compiled: what it writes itself, or the user's.

A model with a chat template is judged by how it goes on with greedy answers to built-in questions, which is
what it is asked for; text that it samples freely is easier to keep near to.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

from blockzoo.build import calibration
from blockzoo.build.chats.questions import CALIBRATION, JUDGED, chats
from blockzoo.build.equivalence import probe_sequences
from blockzoo.build.likeness import Text
from blockzoo.build.progress import Progress
from blockzoo.build.sources import Source
from blockzoo.build.verify import encode_prompts, encode_texts
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.store import Zoo

MakerOf = Callable[[Precision | None], EngineMaker]

_HELD_OUT = 8  # of a model's own texts: what it is judged by was not looked at before
_ANSWER_TOKENS = 48
_CHAT_TEMPERATURE = 0.6


class OwnText:
    """The texts of one model, written when they are first needed.

    Args:
        source, record: the model, and its blocks in `zoo`.
        num_texts: that it writes; 0: a few, to be judged by alone.
        probe_name, probe: text to judge by instead, as token ids; none: its own.
        maker: gives engines of a precision; None: the one used for serving.
    """

    def __init__(
        self,
        source: Source,
        record: ModelRecord,
        zoo: Zoo,
        num_texts: int,
        probe_name: str,
        probe: Sequence[Sequence[int]],
        maker: MakerOf,
        progress: Progress,
    ) -> None:
        self._source, self._record, self._zoo = source, record, zoo
        self._num_texts, self._probe_name, self._probe = num_texts, probe_name, probe
        self._maker, self._progress = maker, progress
        self._own: list[list[int]] = []
        self._answered: list[Text] = []

    def prompts(self) -> list[list[int]]:
        """The built-in prompts as token ids."""
        return _prompts(self._source, self._record)

    def calibration(self) -> list[list[int]]:
        """What matrices are looked at over, as token ids; none where no text is to be written."""
        own = self._written()
        return own[self._num_held_out :] if self._num_texts else []

    def probe(self) -> list[list[int]]:
        """The user's text, or the model's own that is not for calibration, as token ids.

        Raises ZooError for a probe that predicts nothing.
        """
        texts = self._probe or self._written()[: self._num_held_out]
        texts = [tokens for tokens in texts if len(tokens) > 1]  # a single one predicts none
        if not texts:
            raise ZooError(
                f"--probe {self._probe_name}: no paragraph has two tokens of {self._source.name}; give "
                "more text"
            )
        return probe_sequences(texts, self._record.config.max_length, self._record.config.vocab_size)

    def judged(self) -> list[Text]:
        """What the model is judged by: answers to chats if it gives any and no text is given; or `probe`."""
        if not self._answered:
            asked = [] if self._probe else self._chats(JUDGED)
            self._answered = self._answers(asked) if asked else [Text(tokens, 0) for tokens in self.probe()]
        return self._answered

    @property
    def _num_held_out(self) -> int:
        count = len(self._written())
        return min(_HELD_OUT, count // 4) if self._num_texts else count

    def _written(self) -> list[list[int]]:
        if not self._own:
            count = max(self._num_texts, calibration.FEWEST_TEXTS)
            length = min(calibration.NUM_TOKENS, self._record.config.max_length)
            freely, asked = starts(self._source, self._record), self._chats(CALIBRATION)
            begun = list(islice(cycle(freely), count))
            temperatures = [1.0] * count
            if asked:
                begun[1::2] = islice(cycle(asked), count // 2)
                temperatures[1::2] = [_CHAT_TEMPERATURE] * (count // 2)
            self._own = self._write(begun, temperatures, length)
        return self._own

    def _chats(self, questions: Sequence[str]) -> list[list[int]]:
        config = self._record.config
        asked = chats(self._source.tokenizer, questions, config.vocab_size)
        fit = all(len(prompt) + _ANSWER_TOKENS <= config.max_length for prompt in asked)
        return asked if fit else []

    def _answers(self, asked: Sequence[Sequence[int]]) -> list[Text]:
        """Greedy ones, to their ends."""
        length = max(map(len, asked)) + _ANSWER_TOKENS
        found = []
        for prompt, text in zip(asked, self._write(asked, [0.0] * len(asked), length), strict=False):
            whole = text[: len(prompt) + _ANSWER_TOKENS]
            ends = (at for at in range(len(prompt), len(whole)) if whole[at] in self._source.end_ids)
            found.append(Text(whole[: next(ends, len(whole) - 1)], len(prompt) - 1))
        return found

    def _write(
        self, starts: Sequence[Sequence[int]], temperatures: Sequence[float], length: int
    ) -> list[list[int]]:
        zoo, what = self._zoo, f"sampling {self._source.name}"
        return calibration.own_texts(
            self._maker(None),
            [zoo.read_block(key) for key in self._record.chain],
            self._record.config,
            {i: zoo.read_adapter(key) for i, key in self._record.adapters.items()},
            starts,
            temperatures,
            length,
            lambda done, total: self._progress(what, done, total),
        )


def starts(source: Source, record: ModelRecord) -> list[list[int]]:
    """What a model's own texts begin with: built-in prompts, and as often the token that begins a text alone:
    behind it models that are tuned for chats write chats (arXiv 2406.08464)."""
    prompts, begin = _prompts(source, record), source.tokenizer.special_tokens.get("bos_token")
    if not begin:
        return prompts
    token = encode_texts(source, [begin])[0][:1]
    return [start for prompt in prompts for start in (prompt, token)]


def _prompts(source: Source, record: ModelRecord) -> list[list[int]]:
    return [prompt[: record.config.max_length // 2] for prompt in encode_prompts(source)]
