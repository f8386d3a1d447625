"""The tokens, their ids, which of them are special, and the way from ids back to text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opt_core.tokenizer.decoding import (
    DecodeStream,
    TokenBytes,
    as_ids,
    as_lists,
    bytes_of,
    clean_up,
    decode,
)
from opt_core.tokenizer.files import require_tokens
from opt_core.tokenizer.settings import ID_LIMIT, SPECIAL_TOKENS, TokenizerError, TokenizerSettings

T = TypeVar("T")
_ADDITIONAL = "additional_special_tokens"


class Setting(Generic[T]):
    """A field of the settings as an attribute of the tokenizer; a value is checked when it is set.

    Settings are replaced, never written into: a call in another thread sees the old or the new.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> "Setting[T]": ...

    @overload
    def __get__(self, tokenizer: "Vocabulary", owner: type) -> T: ...

    def __get__(self, tokenizer: "Vocabulary | None", owner: type) -> "Setting[T] | T":
        if tokenizer is None:
            return self
        value: T = getattr(tokenizer.settings, self._name)
        return value

    def __set__(self, tokenizer: "Vocabulary", value: T) -> None:
        changed: dict[str, Any] = {self._name: value}
        tokenizer.configure(replace(tokenizer.settings, **changed))


class SpecialTokenId:
    """The id of a special token; setting it makes that id's token the special one."""

    def __init__(self, token: str) -> None:
        self._token = token

    @overload
    def __get__(self, tokenizer: None, owner: type) -> "SpecialTokenId": ...

    @overload
    def __get__(self, tokenizer: "Vocabulary", owner: type) -> int: ...

    def __get__(self, tokenizer: "Vocabulary | None", owner: type) -> "SpecialTokenId | int":
        if tokenizer is None:
            return self
        return tokenizer.id_of(getattr(tokenizer, self._token))

    def __set__(self, tokenizer: "Vocabulary", value: int) -> None:
        token = tokenizer.convert_ids_to_tokens(value)
        if token is None:
            raise TokenizerError(
                f"{self._token}_id={value} is not in the vocabulary of {len(tokenizer)} tokens"
            )
        setattr(tokenizer, self._token, token)


class Vocabulary:
    """A byte-level BPE vocabulary with its special tokens."""

    bos_token: Setting[str] = Setting()
    eos_token: Setting[str] = Setting()
    unk_token: Setting[str] = Setting()
    pad_token: Setting[str] = Setting()
    bos_token_id = SpecialTokenId("bos_token")
    eos_token_id = SpecialTokenId("eos_token")
    unk_token_id = SpecialTokenId("unk_token")
    pad_token_id = SpecialTokenId("pad_token")
    add_bos_token: Setting[bool] = Setting()
    add_prefix_space: Setting[bool] = Setting()
    clean_up_tokenization_spaces: Setting[bool] = Setting()
    model_max_length: Setting[int] = Setting()
    padding_side: Setting[str] = Setting()
    truncation_side: Setting[str] = Setting()

    settings: TokenizerSettings

    def __init__(self, backend: Tokenizer, settings: TokenizerSettings | None = None) -> None:
        """Takes `backend` over: from here on it belongs to this object.

        Raises:
            TokenizerError: it is no byte-level BPE, or lacks a special token of the settings.
        """
        parts = (backend.model, backend.decoder)
        if not isinstance(parts[0], models.BPE) or not isinstance(parts[1], decoders.ByteLevel):
            found = " with ".join(type(part).__name__ for part in parts)
            raise TokenizerError(f"expected a BPE model with a ByteLevel decoder, found {found}")
        # Special tokens, padding, truncation and the first space are this side's business: the
        # library's rules for them differ from the slow tokenizer's.
        backend.post_processor = None
        backend.no_padding()
        backend.no_truncation()
        if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            backend.pre_tokenizer.add_prefix_space = False
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=False)
        self.configure(settings or TokenizerSettings())

    def configure(self, settings: TokenizerSettings) -> None:
        """Takes other settings.

        Raises:
            TokenizerError: the vocabulary lacks one of the special tokens.
        """
        require_tokens(self._backend, settings.named, "the vocabulary")
        known = self._backend.get_added_tokens_decoder().values()
        special = {token.content for token in known if token.special}
        self._backend.add_special_tokens(sorted(set(settings.named.values()) - special))
        # A byte that the vocabulary lacks becomes this token, as in the slow tokenizer.
        self._backend.model.unk_token = settings.unk_token
        self.settings = settings
        self._note_added()

    def _note_added(self) -> None:
        """Looks at the added tokens anew."""
        added = self._backend.get_added_tokens_decoder()
        named = {self.id_of(token) for token in self.settings.named.values()}
        self._added_end = 1 + max(added)
        self._special = frozenset(i for i, token in added.items() if token.special)
        # The slow tokenizer puts spaces around the tokens that were added to the model's own.
        self._apart = frozenset(
            i
            for i, token in added.items()
            if not token.special or (i >= self.vocab_size and i not in named)
        )
        self._table = TokenBytes(self._backend)

    def __len__(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._model_end, self._added_end)

    @cached_property
    def _model_end(self) -> int:
        """One more than the largest id of the model's own vocabulary."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=False).values())

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocab

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens: of the four with names, then of the others."""
        named = [self.id_of(token) for token in self.settings.named.values()]
        return list(dict.fromkeys([*named, *sorted(self._special)]))

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids in `all_special_ids`."""
        return [str(self._backend.id_to_token(i)) for i in self.all_special_ids]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name."""
        named = self.settings.named.values()
        return [token for token in self.all_special_tokens if token not in named]

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The special tokens by name."""
        more = self.additional_special_tokens
        return {**self.settings.named, **({_ADDITIONAL: more} if more else {})}

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Adds tokens that are recognised anywhere in a text; says how many are new.

        Raises:
            TokenizerError: the ids of the vocabulary have gaps, so that new ones would not be new.
        """
        listed = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        if self._model_end != self.vocab_size:
            raise TokenizerError(
                f"the vocabulary has {self.vocab_size} tokens with ids up to {self._model_end - 1}:"
                " while ids are missing, no token can be added"
            )
        before = self._backend.get_vocab_size()
        add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
        add(listed)
        self._note_added()
        return self._backend.get_vocab_size() - before

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Adds special tokens by name, such as `{"pad_token": "[PAD]"}`; says how many are new.

        Raises:
            TokenizerError: a name is not one of a special token.
        """
        known = (*SPECIAL_TOKENS, _ADDITIONAL)
        for name in special_tokens_dict:
            if name not in known:
                raise TokenizerError(
                    f"{name!r} is no special token of OPT: expected {', '.join(known)}"
                )
        named = {n: t for n, t in special_tokens_dict.items() if n != _ADDITIONAL}
        more = special_tokens_dict.get(_ADDITIONAL, ())
        count = self.add_tokens([*named.values(), *more], special_tokens=True)
        changed: dict[str, Any] = {name: str(token) for name, token in named.items()}
        self.configure(replace(self.settings, **changed))
        return count

    def id_of(self, token: str) -> int:
        """The id of a token, or that of `unk_token` where there is none such."""
        found = self._backend.token_to_id(token)
        if found is None:
            found = self._backend.token_to_id(self.settings.unk_token)
        assert found is not None  # `configure` asked for it
        return found

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The ids of tokens as the vocabulary writes them; unknown ones become `unk_token_id`."""
        return self.id_of(tokens) if isinstance(tokens, str) else [self.id_of(t) for t in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str | None: ...

    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = ...
    ) -> list[str | None]: ...

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The tokens as the vocabulary writes them; None for an id that it does not have.

        Raises:
            ValueError: an id is negative.
        """
        skip = self._special if skip_special_tokens else frozenset()
        tokens = [
            self._backend.id_to_token(i) if i < ID_LIMIT else None
            for i in as_ids(ids)
            if i not in skip
        ]
        is_one = not isinstance(as_lists(ids), list)
        return tokens[0] if is_one and tokens else tokens

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text that tokens, as the vocabulary writes them, stand for."""
        return b"".join(map(bytes_of, tokens)).decode("utf-8", self.settings.errors)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for every special token: those in the ids, or those that will be put around them.

        Raises:
            ValueError: a second list comes with ids that have their special tokens already.
        """
        texts = [as_ids(ids) for ids in (token_ids_0, token_ids_1) if ids is not None]
        if not already_has_special_tokens:
            around = [1] * self.add_bos_token
            return [bit for ids in texts for bit in around + [0] * len(ids)]
        if len(texts) == 2:
            raise ValueError(
                "ids that have their special tokens already are one list: leave out token_ids_1"
            )
        return [int(i in self._special) for i in texts[0]]

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """`[T] int -> str`; an id outside the vocabulary stands for nothing.

        Tokens that were added to the model's own get spaces around them, as from the slow
        tokenizer, unless `spaces_between_special_tokens` is False.

        Raises:
            ValueError: there are several sequences, or a negative id.
        """
        table, skip = self._table, self._special if skip_special_tokens else frozenset()
        text = decode(
            (i for i in as_ids(token_ids) if i not in skip and table[i]),
            table,
            apart=self._apart,
            separator=" " if spaces_between_special_tokens else "",
            errors=self.settings.errors,
        )
        tidy = clean_up_tokenization_spaces
        if tidy is None:
            tidy = self.clean_up_tokenization_spaces
        return clean_up(text) if tidy else text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """`[B, T] int -> B texts`, each as from `decode`; the rows may differ in length."""
        return [
            self.decode(
                ids,
                skip_special_tokens,
                clean_up_tokenization_spaces,
                spaces_between_special_tokens,
            )
            for ids in sequences
        ]

    def decode_stream(
        self, skip_special_tokens: bool = False, spaces_between_special_tokens: bool = True
    ) -> DecodeStream:
        """A decoder for ids that come one by one; its pieces are not cleaned up."""
        return DecodeStream(
            self._table,
            skip=self._special if skip_special_tokens else frozenset(),
            apart=self._apart,
            separator=" " if spaces_between_special_tokens else "",
            errors=self.settings.errors,
        )
