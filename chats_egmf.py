"""Chats as inputs of EGMF's processor: messages with text, sound and video."""

from collections.abc import Mapping
from typing import Any


class ChatsMixin:
    """`apply_chat_template` for EGMF's processor."""

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Converts conversations with text, sound and video to the model's input, as chat models do.

        The last message is the utterance that the task asks about, and the messages before it are its context. The
        sequence is EGMF's own and always ends with the cue of the answer; there is no system message.

        Args:
            conversation: A list of messages `{"role", "content"}`, or a list of such lists. The content is a text or a
                list of `{"type": "text", "text"}`, `{"type": "audio", "audio"}`, and `{"type": "video", "video"}` or
                `{"type": "image", "image"}`; `path` or `url` may replace the last key. `name` is the speaker's name.
                Only the last message may have media.
            chat_template: None; EGMF has its own sequence.
            tokenize: Whether to return token ids instead of the text of the sequence.
            return_dict: Whether to return all model inputs, with `tokenize`.
            processor_kwargs, kwargs: Arguments of `__call__`, such as `task`. `add_generation_prompt=True` changes
                nothing.

        Raises:
            ValueError: If a message has another form.
        """
        if chat_template is not None:
            raise ValueError(f"chat_template: got {chat_template!r}, wanted None: EGMF has its own sequence")
        kwargs.pop("add_generation_prompt", None)
        # Other chats' options, as long as they are off.
        off = {"continue_final_message", "return_assistant_tokens_mask", "tools", "documents"}
        kwargs = {name: value for name, value in kwargs.items() if name not in off or value} | (processor_kwargs or {})
        is_list = isinstance(conversation, list | tuple) and bool(conversation)
        several = is_list and isinstance(conversation[0], list | tuple)
        columns: dict[str, list] = {"text": [], "speaker": [], "context": [], "audio": [], "video": []}
        for messages in conversation if several else [conversation]:
            for name, value in read_conversation(messages).items():
                columns[name].append(value)
        if tokenize and not return_dict and any(part is not None for part in columns["audio"] + columns["video"]):
            raise ValueError("return_dict: got False for a chat with sound or pictures, wanted True")
        inputs = self(**columns, **kwargs)
        if tokenize and return_dict:
            return inputs
        if tokenize:
            return inputs["input_ids"]
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        texts = [self._decode([int(i) for i, kept in zip(*row, strict=True) if kept]) for row in rows]
        return texts if several else texts[0]


def read_conversation(messages: Any) -> dict[str, Any]:
    """Converts the messages of a chat to one sample: `text`, `speaker`, `context`, `audio` and `video`.

    Raises:
        ValueError: If a message has another form than [`EGMFProcessor.apply_chat_template`] describes.
    """
    wanted = "a list of messages with a role and a content"
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"conversation: got {messages!r}, wanted {wanted}")
    read = [_read_message(f"conversation[{place}]", message) for place, message in enumerate(messages)]
    for place, message in enumerate(read[:-1]):
        if media := [kind for kind in ("audio", "video") if message[kind] is not None]:
            raise ValueError(f"conversation[{place}]: got {media[0]}, wanted media only in the last message")
    context = [{"speaker": message["speaker"], "text": message["text"]} for message in read[:-1]]
    return {**read[-1], "context": context}


def _read_message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{name}: got {message!r}, wanted a dict with a role and a content")
    if message["role"] not in ("user", "assistant"):
        raise ValueError(f"{name}: got the role {message['role']!r}, wanted user or assistant")
    content, found, texts = message["content"], {"audio": None, "video": None}, []
    for part in content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        given = [part[key] for key in (kind, "path", "url") if part.get(key) is not None] if kind else []
        medium = "video" if kind == "image" else kind
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif medium in found and found[medium] is None and len(given) == 1:
            found[medium] = given[0]
        else:
            raise ValueError(
                f"{name}: got the content {part!r}, wanted text, and at most one audio and one video or image"
            )
    return {"text": " ".join(texts), "speaker": message.get("name"), **found}
