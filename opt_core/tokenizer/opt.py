"""`OPTTokenizer`: text to model inputs, and the tokenizer to files and back."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from opt_core.tokenizer import files
from opt_core.tokenizer.encoding import BatchEncoding, to_arrays
from opt_core.tokenizer.padding import Padding, read_columns
from opt_core.tokenizer.rows import STRATEGIES, Row, Span, Truncation, columns
from opt_core.tokenizer.settings import LONGEST, TokenizerNotFound
from opt_core.tokenizer.texts import Pair, Text, read_texts, surrogate_error
from opt_core.tokenizer.vocabulary import Vocabulary


class OPTTokenizer(Vocabulary):
    """OPT's tokenizer: byte-level BPE, `</s>` before every text.

    Where transformers' two GPT-2 tokenizers differ, pairs, added tokens and lists of words follow
    the slow one, and offsets, overflowing windows and errors of truncation the fast one.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._backend, self.settings)

    def __repr__(self) -> str:
        return f"OPTTokenizer({len(self)} tokens, {self.settings})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        add_bos_token: bool | None = None,
        add_prefix_space: bool | None = None,
    ) -> "OPTTokenizer":
        """Opens a folder, or a repository of the hub; of a file, the folder that it lies in.

        A setting that is given here replaces that of the files.

        Raises:
            TokenizerNotFound: there are no tokenizer files.
            TokenizerError: a file is damaged or contradicts itself, or a setting is not possible.
            HubError: the repository cannot be reached.
        """
        from opt_core import hub

        try:
            found = hub.resolve(
                path_or_repo,
                one_of=((files.PIPELINE,), (files.VOCABULARY, files.MERGES)),
                optional=(files.CONFIG, files.SPECIALS_MAP, files.ADDED),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                subfolder=subfolder,
            )
        except hub.FileMissing as error:
            raise TokenizerNotFound(
                f"no tokenizer files in '{os.fspath(path_or_repo)}': expected {files.PIPELINE} or"
                f" {files.VOCABULARY} and {files.MERGES}"
            ) from error
        backend, settings = files.read(found if found.is_dir() else found.parent)
        asked = {
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "model_max_length": model_max_length,
            "add_bos_token": add_bos_token,
            "add_prefix_space": add_prefix_space,
        }
        given: dict[str, Any] = {name: v for name, v in asked.items() if v is not None}
        return cls(backend, replace(settings, **given))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the files that transformers and `from_pretrained` open; returns their paths.

        Raises:
            OSError: the folder cannot be made or written.
        """
        return files.write(Path(save_directory), self._backend, self.settings)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens of a text as the vocabulary writes them: a space is `Ġ`."""
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens)
        return [str(token) for token in self.convert_ids_to_tokens(ids)]

    def encode(
        self,
        text: Text,
        text_pair: Text | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        *,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """The `input_ids` of a call: a list, or `[1, T]` with `return_tensors`."""
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            is_split_into_words=is_split_into_words,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )["input_ids"]

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool = False,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Turns a text, a pair, or a batch of either into model inputs.

        A batch is a list of texts (`text_pair` a list as long) or of pairs; with
        `is_split_into_words` a text is a list of words. One text gives flat lists, a batch lists of
        rows, `return_tensors` ("np", "pt", "tf", "jax") arrays `[B, T]`. `max_length` alone means
        truncation, as in transformers.

        Raises:
            ValueError: an argument is not possible, or a row cannot be cut to `max_length`.
            ImportError: the framework of `return_tensors` is not installed.
        """
        pairs, is_batch = read_texts(text, text_pair, is_split_into_words)
        cutting = self._truncation(truncation, padding, max_length, stride)
        filling = self._padding(padding, max_length, pad_to_multiple_of, padding_side, cutting)
        bos = self.bos_token_id if add_special_tokens and self.add_bos_token else None
        rows = self._rows(pairs, bos)
        origins = list(range(len(rows)))
        if cutting is not None:
            rows, origins = cutting.rows(rows, windows=return_overflowing_tokens)
        if filling is not None:
            rows = filling.rows(rows)
        asked = {
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask is not False,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        values: dict[str, Any] = columns(rows, asked, self.pad_token_id)
        if not (is_batch or return_overflowing_tokens or return_tensors):
            values = {name: column[0] for name, column in values.items()}
        if return_overflowing_tokens:
            values["overflow_to_sample_mapping"] = origins
        if return_length:
            values["length"] = [len(row) for row in rows]
        return BatchEncoding(to_arrays(values, return_tensors) if return_tensors else values, rows)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Brings rows that are tokenized already to one length, as data collators ask for it.

        Takes a dictionary of one row or of many, or a list of dictionaries. Ids, masks, type ids
        and offsets are padded, other values passed on; a missing mask is made.

        Raises:
            ValueError: there are no ids, rows have different keys, or an argument is not possible.
            ImportError: the framework of `return_tensors` is not installed.
        """
        values, is_batch = read_columns(encoded_inputs)
        if return_attention_mask is not False and "attention_mask" not in values:
            values["attention_mask"] = [[1] * len(row) for row in values["input_ids"]]
        filling = self._padding(padding, max_length, pad_to_multiple_of, padding_side, None)
        if filling is not None:
            values = filling.columns(values, self.pad_token_id)
        if not is_batch:
            values = {name: column[0] for name, column in values.items()}
        return BatchEncoding(to_arrays(values, return_tensors) if return_tensors else values)

    def _rows(self, pairs: Sequence[Pair], bos: int | None) -> list[Row]:
        """Tokenizes all texts in one go, without cutting any."""
        texts = [text for pair in pairs for text in pair if text is not None]
        shift = 0
        if self.add_prefix_space or any(not isinstance(text, str) for text in texts):
            # The slow tokenizer puts the space before every text or word, whatever it begins with;
            # the library's own setting looks at the first character.
            shift = 1
            texts = [
                f" {text}" if isinstance(text, str) else [f" {word}" for word in text]
                for text in texts
            ]
        split = bool(texts) and not isinstance(texts[0], str)
        try:
            encodings = iter(
                self._backend.encode_batch(texts, split, add_special_tokens=False)
                if len(texts) > 1
                else [self._backend.encode(t, None, split, False) for t in texts]
            )
        except TypeError:
            raise surrogate_error(texts) from None
        rows = []
        for pair in pairs:
            both = [next(encodings) for text in pair if text is not None]
            rows.append(Row(tuple(Span(e, 0, len(e), shift) for e in both), bos))
        return rows

    def _truncation(
        self,
        truncation: bool | str | None,
        padding: bool | str,
        max_length: int | None,
        stride: int,
    ) -> Truncation | None:
        """The caller's wish, or None where nothing is to be cut."""
        if truncation is None:
            truncation = max_length is not None and padding is False
        if truncation is False or truncation == "do_not_truncate":
            return None
        strategy = "longest_first" if truncation is True else truncation
        if strategy not in STRATEGIES:
            raise ValueError(
                f"truncation should be True, False, 'do_not_truncate' or one of"
                f" {', '.join(map(repr, STRATEGIES))}, not {truncation!r}"
            )
        limit = self._limit(max_length, f"truncation={truncation!r}")
        return None if limit is None else Truncation(strategy, limit, stride, self.truncation_side)

    def _padding(
        self,
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
        cutting: Truncation | None,
    ) -> Padding | None:
        """The caller's wish, or None where nothing is to be padded."""
        if padding is False or padding == "do_not_pad":
            if multiple is not None:
                warnings.warn(
                    f"pad_to_multiple_of={multiple} does nothing with padding={padding!r}: pass"
                    " padding=True",
                    stacklevel=3,
                )
            return None
        if cutting is not None and multiple and cutting.max_length % multiple:
            raise ValueError(
                f"rows are cut to max_length={cutting.max_length}, which is not a multiple of"
                f" pad_to_multiple_of={multiple}: a row cannot be both"
            )
        length = None
        if padding == "max_length":
            length = self._limit(max_length, "padding='max_length'")
            if length is None:
                return None
        elif max_length is not None and cutting is None:
            warnings.warn(
                f"max_length={max_length} does nothing with padding={padding!r} and no truncation:"
                " pass padding='max_length' to pad to it, truncation=True to cut at it",
                stacklevel=3,
            )
        return Padding(padding, length, multiple, self.padding_side if side is None else side)

    def _limit(self, max_length: int | None, wish: str) -> int | None:
        """The length that padding or truncation goes to."""
        if max_length is None and self.model_max_length <= LONGEST:
            return self.model_max_length
        if max_length is None:
            warnings.warn(
                f"{wish} does nothing: there is no max_length, and the tokenizer has no"
                " model_max_length",
                stacklevel=4,
            )
        elif not isinstance(max_length, int | np.integer) or max_length < 1:
            raise ValueError(f"max_length should be a whole number from 1, not {max_length!r}")
        return max_length
