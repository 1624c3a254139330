"""``llavactl.Chat``: a conversation for Python programs, which checks its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import Unpack

from llavactl.chat.assistant import Assistant
from llavactl.chat.conversation import AnswerStream, Conversation
from llavactl.chat.explain import Explanation, explain_last
from llavactl.chat.inputs import user_content
from llavactl.chat.sampling import MAX_SEED, SamplingOptions, changed
from llavactl.chat.transcript import load_turns, save_turns
from llavactl.core.errors import unexpected
from llavactl.core.progress import Progress, reporting_to
from llavactl.images.references import image_from_bytes, image_in_memory

if TYPE_CHECKING:
    import PIL.Image

    from llavactl.core.schema import ImageRef, Turn
    from llavactl.model.generate import Sampling

    Image: TypeAlias = "str | Path | bytes | PIL.Image.Image"


class Chat:
    """A conversation with a model about images; the key/value cache of earlier turns is reused.

    A ``Chat`` is not thread-safe. Several may share a model, each in its own thread.
    """

    def __init__(self, model: Assistant, *, system: str | None = None, turns: Sequence[Turn] = ()) -> None:
        """``model`` is returned by ``load_model``; ``system`` replaces the template's system prompt.

        ``turns`` continues an earlier conversation (``Chat.turns``).
        """
        if not isinstance(model, Assistant):
            raise unexpected("model", "the return value of load_model", model)
        self._conversation = Conversation(model, system, turns)
        self._seed = 0

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns so far, including the system prompt."""
        return tuple(self._conversation.turns)

    def ask(
        self,
        prompt: str,
        image: Image | Sequence[Image] | None = None,
        *,
        images: Image | Sequence[Image] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AnswerStream:
        """The answer to ``prompt``, an iterator of pieces of text; ``str()`` or ``.text`` is the complete answer.

        It is generated while it is iterated over. ``image`` or ``images`` are a file, its bytes, a URL, a base64 string
        or a PIL image, or several of them, and precede the prompt unless it contains ``<image>`` tags. ``sampling`` is
        any of ``max_new_tokens`` (default: 512), ``temperature`` (0: greedy decoding), ``top_p`` and ``seed`` (default:
        0). ``temperature`` and ``top_p`` default to the model's generation config.

        If generation fails, the turn is removed. If the iterator is closed, the partial answer is kept.

        Raises:
            DataError: an image can't be read.
            RecipeError: an argument has an invalid type or value.
        """
        if not isinstance(prompt, str):
            raise unexpected("prompt", "a string", prompt)
        options = self._sampling(sampling)
        opened = [self._open(each) for given in (image, images) for each in _each_image(given)]
        return self._conversation.ask(*user_content(prompt, opened), sampling=options)

    def retry(self, **sampling: Unpack[SamplingOptions]) -> AnswerStream:
        """Answers the last question again, as ``ask`` does; greedy decoding gives the same answer.

        Unless ``seed`` is given, it is that of the last answer plus 1, so that sampling gives another answer.

        Raises:
            LlavactlError: there is no question.
        """
        options: SamplingOptions = {"seed": (self._seed + 1) % (MAX_SEED + 1), **sampling}
        return self._conversation.retry(self._sampling(options))

    def undo(self) -> bool:
        """Removes the last question and its answer; False if there was none."""
        return bool(self._conversation.undo())

    def explain(self, *, progress: Callable[[Progress], object] | None = None) -> Explanation:
        """The maps of the last answer: which parts of the images its words depend on.

        ``progress`` is called after each forward pass; what it raises ends the explanation.

        Raises:
            DataError: there is no image, or no answer.
        """
        with reporting_to(progress):
            return explain_last(self._conversation)

    def save(self, file: str | Path) -> None:
        """Writes the turns to ``file`` as JSON, for ``Chat.load`` and the command ``/load``."""
        save_turns(Path(file), self.turns, self._conversation.assistant.name)

    @classmethod
    def load(cls, model: Assistant, file: str | Path) -> Chat:
        """The conversation in ``file``, continued with ``model``.

        Raises:
            DataError: ``file`` isn't a conversation, or one of its images can't be read.
        """
        return cls(model, turns=load_turns(Path(file)))

    def _open(self, image: Image) -> ImageRef:
        if isinstance(image, bytes):
            return self._conversation.open_image(image_from_bytes(image, "image"))
        return self._conversation.open_image(image if isinstance(image, str | Path) else image_in_memory(image))

    def _sampling(self, options: SamplingOptions) -> Sampling:
        chosen = changed(self._conversation.assistant.sampling, options)
        self._seed = chosen.seed
        return chosen


def _each_image(images: Any) -> Sequence[Any]:
    if images is None:
        return ()
    return images if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
