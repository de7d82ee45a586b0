"""Prompts and observations as text, through the chat template of a model folder."""

from __future__ import annotations

from typing import Any

from rollout.errors import InputError
from rollout.families import Family
from rollout.inputs.images import PromptError
from rollout.inputs.videos import IMAGE_MARK, VIDEO_MARK, marked_pieces, shown
from rollout.types import Prompt

_ANY_TURN = "any-turn-of-the-assistant"


class InputsError(InputError):
    """The model folder cannot turn prompts into inputs."""


class ChatTemplate:
    """Writes what a model reads, and refuses texts that would be read as something else.

    tokenizer: of the model folder, whose template it has. end_token: ends a turn of the assistant.
    vision_tokens: of the family, as far as the vocabulary has them.
    """

    def __init__(self, tokenizer: Any, family: Family, end_token: str, vision_tokens: list[str]) -> None:
        self._tokenizer, self._options, self._end_token = tokenizer, family.template_options, end_token
        turn_tokens = [*family.turn_tokens, end_token, tokenizer.eos_token, tokenizer.pad_token]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._forbidden_in_text = [token for token in [*vision_tokens, *turn_tokens] if token in special]

    def prompt(self, prompt: Prompt) -> str:
        """Return a prompt, ready for the response, with one placeholder per image or video.

        Raises:
            PromptError: `<image>` marks and images differ in number, or the text contains a control token.
        """
        asked = [*(message for message, _ in prompt.history), prompt.text]
        list(shown(prompt))  # marks differ
        has_videos = bool(prompt.videos)
        for text in asked:
            self.refuse_control_tokens(text, "the prompt text")
        self.refuse_control_tokens(prompt.system, "the system message")
        messages: list[dict[str, Any]] = []
        for text, (_, answer) in zip(asked, prompt.history, strict=False):
            self.refuse_control_tokens(answer, "an earlier answer")
            said = [{"type": "text", "text": answer}]
            messages += [{"role": "user", "content": _content(text, has_videos)}]
            messages += [{"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": _content(prompt.text, has_videos)})
        if prompt.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
        return self._apply(messages)

    def observation(self, text: str, num_images: int, *, has_ended: bool) -> str:
        """Return what a model reads between two of its turns: the end of the first one, a user message, a new turn.

        has_ended: the first turn ends with end-of-text, which is then left out here.

        Raises:
            PromptError: `<image>` marks and images differ in number, or the text contains a control token.
        """
        if text.count(IMAGE_MARK) != num_images:
            raise PromptError(f"the text has {text.count(IMAGE_MARK)} {IMAGE_MARK} marks for {num_images} images")
        self.refuse_control_tokens(text, "the observation")
        asked, answered = [{"type": "text", "text": "?"}], [{"type": "text", "text": _ANY_TURN}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
            {"role": "user", "content": _content(text)},
        ]
        _, found, behind = self._apply(messages).partition(_ANY_TURN)
        end = self._end_token
        if not found or not behind.startswith(end):
            raise InputsError(
                f"the chat template does not end a turn of the assistant by {end!r}: conversations of several turns "
                "cannot be sampled. Fix the template or the tokenizer's eos_token."
            )
        return behind.removeprefix(end) if has_ended else behind

    def as_plain_text(self, text: str) -> str:
        """Return a text without control tokens and image marks."""
        for token in [*self._forbidden_in_text, IMAGE_MARK, VIDEO_MARK]:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def refuse_control_tokens(self, text: str, where: str) -> None:
        """Raise PromptError if a text contains a token that only the template may write."""
        for token in self._forbidden_in_text:
            if token in text:
                raise PromptError(f"{where} contains the control token {token!r}. Remove it; <image> marks an image.")

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        options = self._options
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def _content(text: str, has_videos: bool = False) -> list[dict[str, str]]:
    """Return a message's content: pieces of text, and an image or a video for each mark between them."""
    kinds = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
    content: list[dict[str, str]] = []
    for index, piece in enumerate(marked_pieces(text, has_videos=has_videos)):
        if index % 2:
            content.append({"type": kinds[piece]})
        elif piece:
            content.append({"type": "text", "text": piece})
    return content
