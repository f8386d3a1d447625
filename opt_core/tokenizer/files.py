"""A tokenizer's files: read and checked, and written one whole file at a time."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opt_core.tokenizer.settings import (
    ID_LIMIT,
    KNOWN,
    SPECIAL_TOKENS,
    TokenizerError,
    TokenizerNotFound,
    TokenizerSettings,
)

PIPELINE = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
CONFIG = "tokenizer_config.json"
SPECIALS_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"  # of transformers before 4.34

_ADDED_TOKENS = "added_tokens_decoder"
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")  # transformers 4 and 5
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# Keys of the configuration that are said anew when it is written.
_REWRITTEN = frozenset({_ADDED_TOKENS, "tokenizer_class", *_ADDITIONAL})


def byte_level_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The byte-level BPE of GPT-2 and OPT over a vocabulary and its merges, best merge first."""
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def read(folder: Path) -> tuple[Tokenizer, TokenizerSettings]:
    """The tokenizer that a local folder holds.

    Raises:
        TokenizerNotFound: there is neither `tokenizer.json` nor `vocab.json` with `merges.txt`.
        TokenizerError: a file cannot be read or contradicts itself; the message names it.
    """
    if (folder / PIPELINE).is_file():
        source = folder / PIPELINE
        backend, stored = _read_pipeline(source)
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        source = folder / VOCABULARY
        backend, stored = _read_vocabulary(source, folder / MERGES), {}
        if (folder / ADDED).is_file():
            _add(backend, folder / ADDED, _object(folder / ADDED))
    else:
        raise TokenizerNotFound(
            f"no tokenizer files in '{folder}': expected {PIPELINE} or {VOCABULARY} and {MERGES}"
        )
    values = stored
    for path in (folder / SPECIALS_MAP, folder / CONFIG):
        said = _object(path) if path.is_file() else {}
        values |= {key: value for key, value in said.items() if value is not None}
    _add(backend, folder / CONFIG, values.get(_ADDED_TOKENS, {}))
    settings = _settings(values, folder / CONFIG)
    special = _special_tokens(values, folder / CONFIG)
    roles = {**settings.named, **{key: token.content for key, token in special.items()}}
    require_tokens(backend, roles, f"'{source}'")
    backend.add_special_tokens(list(special.values()))
    return backend, settings


def require_tokens(backend: Tokenizer, wanted: Mapping[str, str], where: str) -> None:
    """Checks that the vocabulary has the special tokens, given by role.

    Raises:
        TokenizerError: it lacks some; all are named.
    """
    lacking: dict[str, list[str]] = {}
    for role, token in wanted.items():
        if backend.token_to_id(token) is None:
            lacking.setdefault(token, []).append(role)
    if lacking:
        named = "; ".join(f"{token!r} ({', '.join(roles)})" for token, roles in lacking.items())
        raise TokenizerError(
            f"{where} lacks special tokens: {named}. Use the model's own vocabulary, or say in"
            f" {CONFIG} which tokens it has instead"
        )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TokenizerError(
            f"'{path}' should be UTF-8, but line {line} has the byte 0x{data[error.start]:02x}"
            f" at offset {error.start}: was the file damaged or saved in another encoding?"
        ) from None


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(
            f"'{path}' should be a JSON object: {error}. Was it copied whole?"
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"'{path}' should be a JSON object, not {type(value).__name__}")
    return value


def _read_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    vocab = _object(vocabulary)
    _check_vocabulary(vocab, vocabulary)
    lines = [line.rstrip("\r") for line in _read_text(merges).split("\n")]
    # Only a first line can be a comment: later ones may merge '#'.
    first = 2 if lines[0].startswith("#version") else 1
    pairs = [tuple(line.split(" ")) for line in lines[first - 1 :] if line]
    try:
        return byte_level_bpe(vocab, pairs)  # type: ignore[arg-type]  # the library looks
    except Exception as error:  # it raises nothing narrower
        numbered = enumerate(lines[first - 1 :], start=first)
        split = {f"line {number}": line.split(" ") for number, line in numbered if line}
        raise _merges_error(split, vocab, merges, error) from error


def _check_vocabulary(vocab: object, path: Path) -> None:
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"'{path}' should map tokens to ids, and has no token")
    owners: dict[int, str] = {}
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < ID_LIMIT:
            raise TokenizerError(
                f"'{path}': the id of token {token!r} should be a whole number from 0, not"
                f" {token_id!r}"
            )
        if owners.setdefault(token_id, token) is not token:
            raise TokenizerError(
                f"'{path}': the tokens {owners[token_id]!r} and {token!r} have the same id"
                f" {token_id}; each needs its own"
            )


def _merges_error(
    merges: Mapping[str, Any], vocab: Mapping[str, int], path: Path, error: Exception
) -> TokenizerError:
    """Names the first merge that the library has to refuse, given by their places in the file."""
    for place, parts in merges.items():
        if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            return TokenizerError(
                f"'{path}', {place}: expected two tokens with one space between them, found"
                f" {' '.join(map(str, parts))!r}"
            )
        for token in (*parts, parts[0] + parts[1]):
            if token not in vocab:
                return TokenizerError(
                    f"'{path}', {place}: {token!r} is not in the vocabulary. Do the merges belong"
                    " to it?"
                )
    return TokenizerError(f"'{path}' cannot be opened by tokenizers: {error}")


def _read_pipeline(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a `tokenizer.json`, and the settings that it shows."""
    state = _object(path)
    model = state.get("model")
    decoder = state.get("decoder")
    kinds = [part.get("type") if isinstance(part, dict) else None for part in (model, decoder)]
    if kinds != ["BPE", "ByteLevel"] or not isinstance(model, dict):
        raise TokenizerError(
            f"'{path}' should hold a BPE model with a ByteLevel decoder, as OPT's tokenizers are;"
            f" found {kinds[0]} with {kinds[1]}"
        )
    vocab, merges = model.get("vocab"), model.get("merges")
    _check_vocabulary(vocab, path)
    if not isinstance(merges, list) or not isinstance(vocab, dict):
        raise TokenizerError(f"'{path}' should list the merges of its model")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        # Written as "a b" before tokenizers 0.20, as ["a", "b"] since.
        parts = (m if isinstance(m, list) else str(m).split(" ") for m in merges)
        numbered = {f"merge {number}": merge for number, merge in enumerate(parts)}
        raise _merges_error(numbered, vocab, path, error) from error
    return backend, _stored_settings(state, path)


def _stored_settings(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a `tokenizer.json` says where `tokenizer_config.json` is silent."""
    before = state.get("pre_tokenizer") or {}
    processor = state.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    stored = {"add_bos_token": False, "add_prefix_space": bool(before.get("add_prefix_space"))}
    for step in steps:
        kind = step.get("type", "ByteLevel")
        pieces = step.get("single", []) if kind == "TemplateProcessing" else []
        tokens = [piece.get("SpecialToken", {}).get("id") for piece in pieces]  # None is the text
        if kind not in ("ByteLevel", "TemplateProcessing") or any(tokens[1:]):
            raise TokenizerError(
                f"'{path}' adds special tokens as OPT does not ({kind}): expected nothing, or a"
                " TemplateProcessing with one token before the text"
            )
        if any(tokens):
            stored |= {"add_bos_token": True, "bos_token": tokens[0]}
    return stored


def _add(backend: Tokenizer, path: Path, entries: object) -> None:
    """Adds tokens to the vocabulary, and checks that they get the ids that the file gives them."""
    # Either {id: token with its flags} or {token: id}.
    pairs = [
        (int(key), value) if key.isdecimal() and type(value) is not int else (value, key)
        for key, value in (entries.items() if isinstance(entries, dict) else [("", entries)])
    ]
    if not isinstance(entries, dict) or not all(type(token_id) is int for token_id, _ in pairs):
        raise TokenizerError(f"'{path}' should give each added token its id, not {entries!r:.200}")
    for token_id, entry in sorted(pairs, key=itemgetter(0)):
        token = _added_token(entry, path)
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise TokenizerError(
                f"'{path}' gives the token {token.content!r} the id {token_id}, but its place in"
                f" the vocabulary is {found}: do the files belong together?"
            )


def _added_token(token: Any, path: Path) -> AddedToken:
    """A token that a file writes as a string or with its flags."""
    entry = token if isinstance(token, dict) else {"content": token}
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"'{path}' should name a token, not {token!r}")
    return AddedToken(content, **{flag: bool(entry.get(flag)) for flag in _FLAGS})


def _special_tokens(values: Mapping[str, Any], path: Path) -> dict[str, AddedToken]:
    """The special tokens that the files name, by role or, beside the four roles, by themselves."""
    found = {n: _added_token(values[n], path) for n in SPECIAL_TOKENS if n in values}
    for key in _ADDITIONAL:
        listed = values.get(key, [])
        if isinstance(listed, dict):
            listed = list(listed.values())
        for token in listed if isinstance(listed, list) else [listed]:
            added = _added_token(token, path)
            found[f"{key}: {added.content}"] = added
    return found


def _settings(values: Mapping[str, Any], path: Path) -> TokenizerSettings:
    given = {key: value for key, value in values.items() if key in KNOWN}
    for name in SPECIAL_TOKENS:
        if isinstance(given.get(name), dict):
            given[name] = given[name].get("content")
    limit = given.get("model_max_length")
    if isinstance(limit, float) and limit.is_integer():
        given["model_max_length"] = int(limit)
    other = {k: v for k, v in values.items() if k not in KNOWN and k not in _REWRITTEN}
    try:
        return TokenizerSettings(**given, other=other)
    except TokenizerError as error:
        raise TokenizerError(f"'{path}': {error}") from None


def write(folder: Path, backend: Tokenizer, settings: TokenizerSettings) -> tuple[str, ...]:
    """Writes the five files that transformers and `read` open, and returns their paths.

    Each file is replaced whole or not at all.

    Raises:
        OSError: the folder cannot be made or written.
    """
    state = json.loads(backend.to_str())
    plain = (state["pre_tokenizer"] or {}).get("type") == "ByteLevel"
    if plain:
        state["pre_tokenizer"]["add_prefix_space"] = settings.add_prefix_space
    state["post_processor"] = _template(settings, backend)
    vocab = sorted(state["model"]["vocab"].items(), key=itemgetter(1))
    merges = "".join(f"{a} {b}\n" for a, b in state["model"]["merges"])
    contents = {
        PIPELINE: json.dumps(state, ensure_ascii=False),
        VOCABULARY: json.dumps(dict(vocab), ensure_ascii=False),
        MERGES: f"#version: 0.2\n{merges}",
        SPECIALS_MAP: _pretty(settings.named),
        # transformers rebuilds a GPT2Tokenizer from its vocabulary alone.
        CONFIG: _pretty(
            _config(settings, state, "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast")
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        _replace(folder / name, content)
    return tuple(str(folder / name) for name in contents)


def _template(settings: TokenizerSettings, backend: Tokenizer) -> dict[str, Any]:
    """The post-processor that puts the first token where `add_bos_token` wants it."""
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    bos = settings.bos_token
    special = {"id": bos, "ids": [backend.token_to_id(bos)], "tokens": [bos]}
    pair = [
        piece
        for i, text in enumerate(texts)
        for piece in ({"SpecialToken": {"id": bos, "type_id": i}}, text)
        if piece is text or settings.add_bos_token
    ]
    return {
        "type": "TemplateProcessing",
        "single": pair[: len(pair) // 2],
        "pair": pair,
        "special_tokens": {bos: special} if settings.add_bos_token else {},
    }


def _config(
    settings: TokenizerSettings, state: Mapping[str, Any], tokenizer_class: str
) -> dict[str, Any]:
    added = {str(token["id"]): token for token in state["added_tokens"]}
    named = set(settings.named.values())
    return {
        **settings.other,
        **{name: getattr(settings, name) for name in sorted(KNOWN)},
        _ADDED_TOKENS: {i: {k: v for k, v in t.items() if k != "id"} for i, t in added.items()},
        _ADDITIONAL[0]: [
            token["content"]
            for token in added.values()
            if token["special"] and token["content"] not in named
        ],
        "tokenizer_class": tokenizer_class,
    }


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _replace(path: Path, content: str) -> None:
    """Writes beside the file and moves over it: a killed save leaves the old file whole."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(beside, "x", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
