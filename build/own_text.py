"""Text that a model is looked at over while it is compiled: what it writes itself, or the user's."""

from collections.abc import Callable, Sequence

from blockzoo.build.calibration import own_texts
from blockzoo.build.equivalence import probe_sequences
from blockzoo.build.progress import Progress
from blockzoo.build.sources import Source
from blockzoo.build.verify import encode_prompts, encode_texts
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.store import Zoo

_HELD_OUT = 8  # of a model's own texts: what it is judged by was not looked at before
MakerOf = Callable[[Precision | None], EngineMaker]


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

    def prompts(self) -> list[list[int]]:
        """The built-in prompts as token ids."""
        return _prompts(self._source, self._record)

    def calibration(self) -> list[list[int]]:
        """What matrices are looked at over, as token ids; none where no text is to be written."""
        own = self._written()
        return own[self._num_held_out :] if self._num_texts else []

    def probe(self) -> list[list[int]]:
        """What the model is judged by, as token ids. Raises ZooError for a probe that predicts nothing."""
        texts = self._probe or self._written()[: self._num_held_out]
        texts = [tokens for tokens in texts if len(tokens) > 1]  # a single one predicts none
        if not texts:
            raise ZooError(
                f"--probe {self._probe_name}: no paragraph has two tokens of {self._source.name}; give "
                "more text"
            )
        return probe_sequences(texts, self._record.config.max_length, self._record.config.vocab_size)

    @property
    def _num_held_out(self) -> int:
        count = len(self._written())
        return min(_HELD_OUT, count // 4) if self._num_texts else count

    def _written(self) -> list[list[int]]:
        if not self._own:
            zoo = self._zoo
            blocks = [zoo.read_block(key) for key in self._record.chain]
            adapters = {i: zoo.read_adapter(key) for i, key in self._record.adapters.items()}
            what = f"sampling {self._source.name}"
            self._own = own_texts(
                self._maker(None),
                blocks,
                self._record.config,
                adapters,
                starts(self._source, self._record),
                self._num_texts,
                lambda done, total: self._progress(what, done, total),
            )
        return self._own


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
