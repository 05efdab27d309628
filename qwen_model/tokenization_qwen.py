"""Qwen v1's tokenizer: byte-level BPE through tiktoken, special tokens after the ranks.

Unlike the original, it reads the text of special tokens in a string as plain text; ``allowed_special="all"`` restores
the original's behaviour, for comparison and for prompts written by hand. A rendered prompt knows its control tokens
(``prompts.py``). They are also recognised in every text if this class is the remote code of a folder with
``split_special_tokens: false``: servers pass the rendered prompt as one text.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

from chat.chatml import END_OF_TEXT, IM_END, IM_START
from errors import ConfigError
from qwen_model.normalization import normalize_nfc
from qwen_model.prompts import SPECIAL_TOKENS, Prompt, find_special, mark_special, unused_character

logger = logging.getLogger(__name__)

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken crashes at 999,999 blanks other than line ends.
_MOST_SPACES = 900_000
_SPACES = re.compile(r"[^\S\r\n]+")


def load_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Read a rank file; each line has a token in base64, a space and its rank.

    Raises:
        ConfigError: the file is missing or empty, a line is broken, or a token or rank occurs twice.
    """
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "Copy the file from the original checkpoint") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(
                f"{path}:{number}: {line[:40]!r} is not a base64 token and a rank", "Copy the file again"
            ) from error
        if rank in seen or token in ranks:
            duplicate = f"rank {rank}" if rank in seen else f"token {encoded.decode()}"
            raise ConfigError(f"{path}:{number}: {duplicate} occurs a second time", "Copy the file again")
        ranks[token] = rank
        seen[rank] = number
    if not ranks:
        raise ConfigError(f"{path}: the file is empty", "Copy the file from the original checkpoint")
    return ranks


class QWenTokenizer(PreTrainedTokenizer):
    """Tokenizer of Qwen v1.

    Args:
        vocab_file: ``qwen.tiktoken``.
        errors: how ``decode`` treats bytes that are not UTF-8 (``replace``, ``ignore``, ``strict``).
        extra_vocab_file: more ranks in the same format, numbered from after the special tokens.
    """

    vocab_files_names = {
        "vocab_file": "qwen.tiktoken",
        "extra_vocab_file": "qwen_extra.tiktoken",
    }
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        errors: str = "replace",
        extra_vocab_file: str | None = None,
        pad_token: str | AddedToken = END_OF_TEXT,
        eos_token: str | AddedToken = END_OF_TEXT,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ConfigError(
                f"{kwargs.get('name_or_path') or 'the tokenizer'}: qwen.tiktoken is missing",
                "Copy the file from the original checkpoint",
            )
        # Published folders name their remote code here; this class needs none and saves none.
        kwargs.pop("auto_map", None)
        kwargs.pop("resume_download", None)  # downloads always resume
        # A folder's false applies only if this class is its remote code: servers pass the rendered prompt as one text.
        split_special_tokens = self._auto_class is None or kwargs.get("split_special_tokens", True)
        self.vocab_file = vocab_file
        self.extra_vocab_file = extra_vocab_file
        self.errors = errors
        self.mergeable_ranks = load_ranks(vocab_file)
        first = len(self.mergeable_ranks)
        if sorted(self.mergeable_ranks.values()) != list(range(first)):
            raise ConfigError(f"{vocab_file}: the ranks are not 0 to {first - 1}", "Copy the file again")
        self.special_tokens = {token: first + offset for offset, token in enumerate(SPECIAL_TOKENS)}
        if extra_vocab_file is not None:
            self._add_extra_ranks(extra_vocab_file)
        self.tokenizer = self._build_encoding()
        self.decoder: dict[int, bytes | str] = {rank: token for token, rank in self.mergeable_ranks.items()}
        self.decoder |= {id_: token for token, id_ in self.special_tokens.items()}
        self._special_ids = frozenset(self.special_tokens.values())
        self.eod_id = self.special_tokens[END_OF_TEXT]
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]
        self._warned: set[bool] = set()
        super().__init__(errors=errors, pad_token=pad_token, eos_token=eos_token, **kwargs)
        self.split_special_tokens = split_special_tokens  # the parent's default is false

    def _add_extra_ranks(self, path: str) -> None:
        """Add the ranks after the special tokens, which tiktoken applies after all others."""
        next_id = len(self.mergeable_ranks) + len(SPECIAL_TOKENS)
        extra = load_ranks(path)
        if sorted(extra.values()) != list(range(next_id, next_id + len(extra))):
            raise ConfigError(
                f"{path}: the ranks are not {next_id} to {next_id + len(extra) - 1}",
                "Number them without gaps from after the last special token",
            )
        known = next((token for token in extra if token in self.mergeable_ranks), None)
        if known is not None:
            raise ConfigError(f"{path}: the vocabulary already has the token {known!r}", "Remove its line")
        self.mergeable_ranks |= extra

    def _build_encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "Qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer = self._build_encoding()

    def __len__(self) -> int:
        return int(self.tokenizer.n_vocab)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.n_vocab)

    def get_vocab(self) -> dict[bytes, int]:  # type: ignore[override]
        """Return the ordinary tokens as bytes, with their ids; special tokens are in ``special_tokens``."""
        return self.mergeable_ranks

    @staticmethod
    def check_text(text: str) -> None:
        """Check that a text can be tokenised: a million blanks in a row crash the process inside tiktoken.

        Raises:
            ValueError: too many blanks in a row.
        """
        # Each run is read once: a search for the number itself would start anew at every space of a shorter run.
        if len(text) >= _MOST_SPACES and any(run.end() - run.start() >= _MOST_SPACES for run in _SPACES.finditer(text)):
            raise ValueError(f"{_MOST_SPACES:,} or more spaces in a row, which cannot be tokenised")

    def encode_plain(self, text: str) -> list[int]:
        """Tokenise a text in which no special token is recognised.

        Raises:
            ValueError: see ``check_text``.
        """
        self.check_text(text)
        return self.tokenizer.encode_ordinary(normalize_nfc(text))

    def tokenize(  # type: ignore[override]
        self,
        text: str,
        allowed_special: Literal["all"] | AbstractSet[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
        split_special_tokens: bool | None = None,
        mark: str = "",
        **kwargs: Any,
    ) -> list[bytes | str]:
        """Split ``text`` into tokens: bytes, or strings for special tokens. A ``Prompt`` knows its special tokens.

        Args:
            allowed_special: special tokens that are recognised in the text; "all" is the original's behaviour.
            disallowed_special: special tokens that raise a ``ValueError`` if the text contains them.
            split_special_tokens: without ``allowed_special``: true reads everything as plain text, false reads a
                rendered conversation; ``None``: the tokenizer's attribute.
            mark: see ``Prompt.parse``.
        """
        if allowed_special is None and not isinstance(text, Prompt):
            if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
                self._warn_of_special(text)
                allowed_special = frozenset()
            else:
                text = Prompt.parse(text, mark)
        if isinstance(text, Prompt):
            ids = self.encode_prompt(text)
        else:
            self.check_text(text)
            assert allowed_special is not None
            ids = self.tokenizer.encode(
                normalize_nfc(text), allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        return [self.decoder[id_] for id_ in ids]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of a rendered prompt."""
        ids: list[int] = []
        for text, is_control in prompt.segments:
            ids += [self.special_tokens[text]] if is_control else self.encode_plain(text)
        return ids

    def _warn_of_special(self, text: str) -> None:
        """Warn once that the text of a special token was read as plain text, and once for one that stands alone."""
        token = find_special(text)
        if token is None or (is_alone := text == token) in self._warned:
            return
        self._warned.add(is_alone)
        if is_alone:
            logger.warning(
                "%s was tokenised as plain text. Its id is tokenizer.special_tokens[%r]; allowed_special='all' makes "
                "encode() return it",
                token,
                token,
            )
        else:
            logger.warning(
                "A text with %s was tokenised as plain text, in which no control token is recognised. Build prompts "
                "with make_context() or apply_chat_template(), or pass allowed_special='all' for a prompt written by "
                "hand, if no part of it comes from others",
                token,
            )

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        *args: Any,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Call transformers' method. Control tokens that the template writes become their ids, those in texts do not.

        Args:
            sanitize_control_tokens: newer releases of transformers have this; here it is always on.
        """
        mark = unused_character(conversation, tools, documents)
        parent: Any = super()
        rendered = parent.apply_chat_template(
            mark_special(conversation, mark),
            mark_special(tools, mark),
            mark_special(documents, mark),
            *args,
            tokenizer_kwargs={"split_special_tokens": False, "mark": mark, **(tokenizer_kwargs or {})},
            **kwargs,
        )
        if isinstance(rendered, str):
            return Prompt.parse(rendered, mark)
        if isinstance(rendered, list) and all(isinstance(text, str) for text in rendered):
            return [Prompt.parse(text, mark) for text in rendered]
        return rendered

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Convert a token (bytes, or the string of a special token) or a list of them; ``None`` for unknown tokens."""
        if isinstance(tokens, str):
            return self.special_tokens.get(tokens)
        if isinstance(tokens, bytes):
            return self.mergeable_ranks.get(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Convert an id or a list of them.

        Raises:
            ValueError: an id without a token.
        """
        if isinstance(ids, int):
            if ids not in self.decoder:
                raise ValueError(f"no token has the id {ids}")
            return self.decoder[ids]
        return [
            self.convert_ids_to_tokens(int(id_))
            for id_ in ids
            if not (skip_special_tokens and int(id_) in self._special_ids)
        ]

    def convert_tokens_to_string(self, tokens: Iterable[bytes | str]) -> str:
        """Join tokens to text; ``errors`` decides how bytes that are not UTF-8 are treated."""
        pieces = (token.encode() if isinstance(token, str) else token for token in tokens)
        return b"".join(pieces).decode("utf-8", errors=self.errors)

    def _decode(  # type: ignore[override]
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(id_) for id_ in token_ids]
        if skip_special_tokens:
            # As in the original, this also drops ids of model rows without a token.
            ids = [id_ for id_ in ids if id_ in self.decoder and id_ not in self._special_ids]
        unknown = next((id_ for id_ in ids if id_ not in self.decoder), None)
        if unknown is not None:
            raise ValueError(f"no token has the id {unknown}")
        return self.tokenizer.decode(ids, errors=errors or self.errors)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        if new_tokens and not special_tokens:
            raise ValueError("Qwen v1 cannot take new tokens; put ranks into an extra_vocab_file instead")
        unknown = [str(token) for token in new_tokens or () if str(token) not in self.special_tokens]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a special token of Qwen v1; <|extra_0|> to <|extra_204|> are free")
        return 0

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the rank files, under the names that ``from_pretrained`` expects."""
        written = []
        for attribute, name in self.vocab_files_names.items():
            source = getattr(self, attribute)
            if source is None:
                continue
            target = os.path.join(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
            if not (os.path.exists(target) and os.path.samefile(source, target)):
                shutil.copyfile(source, target)
            written.append(target)
        return tuple(written)
