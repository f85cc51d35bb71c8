"""The exceptions a caller may want to catch. A wrong *argument* is a ValueError; these are about files and requests."""

from typing import Any


class QwenMLXError(Exception):
    """Base of everything below: one clear sentence, ready to be shown to a person."""


class ModelNotFoundError(QwenMLXError):
    """The model is neither a folder here nor a repository that can be reached."""


class CheckpointError(QwenMLXError):
    """A model folder was found, but what is in it cannot be used: configuration, tensors or values."""


class ConversionError(QwenMLXError):
    """A conversion that cannot be made as asked for: the folder is taken, the forms do not fit, the result is bad."""


class UnverifiedError(ConversionError):
    """A conversion was written, and is farther from its source than it should be; `account` has the figures."""

    def __init__(self, message: str, account: dict[str, Any]) -> None:
        super().__init__(message)
        self.account = account


class TokenizerError(QwenMLXError):
    """The tokenizer's files are missing, broken, or would give wrong token ids."""


class PromptError(QwenMLXError):
    """The prompt cannot be answered: empty, not text, or refused by the chat template."""


class SchemaError(QwenMLXError):
    """An answer cannot be kept to a JSON schema: it is none, has what cannot be followed, or llguidance is missing."""


class PromptCacheError(QwenMLXError):
    """A prompt file cannot be written or read, is damaged, or belongs to another model, tokenizer or template."""


class MemoryLimitError(QwenMLXError):
    """A prompt and its answer would take more memory than the device allows; said before the first token is read."""


class UploadError(QwenMLXError):
    """A model cannot be published: it is not verified, or the hub cannot be reached or does not take it."""
