"""The tokenizer that transformers makes of a folder, as the fields of one ``tokenizer.json``.

A folder may hold several tokenizer files, and ``AutoTokenizer`` (transformers 5) does not simply
read ``tokenizer.json``. It chooses a class, by "tokenizer_class" in ``tokenizer_config.json`` and
"model_type" in ``config.json``:

    PreTrainedTokenizerFast,   takes tokenizer.json as it is
    TokenizersBackend, none
    LlamaTokenizer, GPT2-,     take only the vocabulary, the merges and the post-processor of
    GPTNeoX-, Qwen2Tokenizer   tokenizer.json (or vocab.json and merges.txt), and have a normalizer,
                               a pre-tokenizer and a decoder of their own

Then it adds tokens: those of ``tokenizer.json``, then those of "added_tokens_decoder" in
``tokenizer_config.json`` or, without that key, of ``added_tokens.json``, then the special tokens
that ``tokenizer_config.json`` and ``special_tokens_map.json`` name. What the tokens are, which
flags they have and which ids the new ones get all follow from that order.

This module does the same, so that a reader of one format is enough (``tokenizer_json.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.bpe import read_vocab
from minitx.checkpoints.common import read, read_json
from minitx.checkpoints.json_object import REQUIRED, JsonObject
from minitx.checkpoints.split_patterns import QWEN2
from minitx.errors import MinitxError, abbreviate

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
OTHER_FORMATS = {  # file -> the format's name
    "tokenizer.model": "a SentencePiece model",
    "spiece.model": "a SentencePiece model",
    "spm.model": "a SentencePiece model",
    "tiktoken.model": "a tiktoken vocabulary",
    "tekken.json": "Mistral's tekken vocabulary",
    "vocab.txt": "a WordPiece vocabulary",
}
# The files by which a folder is known to have a tokenizer, in the order in which they count.
FILES = (TOKENIZER, VOCAB, *OTHER_FORMATS)

AS_IN_FILE = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "BloomTokenizer")
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Found:
    """The tokenizer of a folder.

    file: what messages name; fields: those of a ``tokenizer.json``; added: the added tokens in the
    order in which they are added, with their ids; named: the special tokens by their names
    ("eos_token"); splits_special: special tokens in a text are not matched.
    """

    file: Path
    fields: dict
    added: list[AddedToken]
    named: dict[str, str]
    splits_special: bool


def find_tokenizer(path) -> Found:
    """The tokenizer of the folder `path`, or of a file in it. Raises MinitxError."""
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if path.name in OTHER_FORMATS:
        raise _other_format(path)
    if path.name in FILES:
        return _in_folder(path.parent)
    return _made(path, read_json(path), {}, "TokenizersBackend")  # a file of another name


def _in_folder(folder: Path) -> Found:
    config = _optional_json(folder / CONFIG)
    has_file = (folder / TOKENIZER).exists()
    fields = read_json(folder / TOKENIZER) if has_file else {}
    name = _class_name(folder, config, fields)
    _refuse_settings(folder / CONFIG, config)
    if has_file:
        # transformers follows the post-processor of the file, not these two keys
        config = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
        return _made(folder / TOKENIZER, fields, config, name)
    _refuse_other_formats(folder, name)
    return _made(folder / VOCAB, _vocab_and_merges(folder), config, name)


def _optional_json(file: Path) -> dict:
    return read_json(file) if file.exists() else {}


# ------------------------------------------------------------------------------ which class it is


def _class_name(folder: Path, config: dict, fields: dict) -> str:
    """The class that AutoTokenizer chooses; "TokenizersBackend" is the one without ideas of its
    own."""
    model = _optional_json(folder / "config.json")
    model_type = model.get("model_type")
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) else named
    if model_type == "qwen2":  # many folders name a wrong class, so it overrides them
        return "Qwen2Tokenizer"
    if model_type == "mistral":
        return "TokenizersBackend"
    if name is None:
        by_type = {"gpt2": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}
        return by_type.get(model_type, "TokenizersBackend")
    if name == "LlamaTokenizer" and _mentions_byte_level(fields):  # Llama 3's
        return "TokenizersBackend"
    if name in AS_IN_FILE:
        return "TokenizersBackend"
    if name in CLASSES:
        return name
    raise MinitxError(
        f"{folder / CONFIG}: tokenizer_class {abbreviate(named)} is not supported; expected "
        f"PreTrainedTokenizerFast or one of {', '.join(CLASSES)}."
    )


def _mentions_byte_level(fields) -> bool:
    """Is the string "ByteLevel" anywhere in the file?"""
    if isinstance(fields, dict):
        return "ByteLevel" in fields or any(map(_mentions_byte_level, fields.values()))
    return fields == "ByteLevel" or (
        isinstance(fields, list) and any(map(_mentions_byte_level, fields))
    )


def _refuse_settings(file: Path, config: dict) -> None:
    """Settings that change what AutoTokenizer does, and that are not followed here."""
    checked = JsonObject(file, config)
    if isinstance(config.get("auto_map"), dict | list):
        remote = config["auto_map"]
        if isinstance(remote, list) or remote.get("AutoTokenizer") is not None:
            checked.reject("auto_map", "names Python code of the folder's own")
    if config.get("fix_mistral_regex"):
        checked.reject("fix_mistral_regex", "replaces the split pattern")
    if config.get("fast_tokenizer_files") not in (None, [], [TOKENIZER]):
        checked.reject("fast_tokenizer_files", "chooses another tokenizer file")
    cleans = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if config.get("clean_up_tokenization_spaces") and config.get(cleans):
        checked.reject(cleans, "removes spaces from decoded text")


def _refuse_other_formats(folder: Path, name: str) -> None:
    for other in OTHER_FORMATS:
        if (folder / other).exists():
            raise _other_format(folder / other)
    if not (folder / VOCAB).exists():
        raise MinitxError(f"{folder}: expected a {TOKENIZER}, or a {VOCAB} and a {MERGES}.")
    if name in ("TokenizersBackend", "LlamaTokenizer"):
        raise MinitxError(
            f"{folder}: has a {VOCAB} but no {TOKENIZER}, which a tokenizer of class {name} needs."
        )


def _other_format(file: Path) -> MinitxError:
    return MinitxError(
        f"{file} is {OTHER_FORMATS[file.name]}, which minitx cannot read; save the tokenizer with "
        f"transformers' save_pretrained, which writes a {TOKENIZER}."
    )


def _vocab_and_merges(folder: Path) -> dict:
    """The fields of a ``tokenizer.json`` with the contents of vocab.json and merges.txt."""
    return {"model": {"vocab": read_json(folder / VOCAB), "merges": _lines(folder / MERGES)}}


def _lines(file: Path) -> list[str]:
    try:
        text = read(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MinitxError(f"{file}: is not valid UTF-8 ({error}).") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines if not line.startswith("#version")]


# ---------------------------------------------------------------------------------- its pipeline


def _model(fields: dict, **changes) -> dict:
    model = fields["model"]
    kept = {name: model[name] for name in ("type", "vocab", "merges") if name in model}
    return kept | {"type": kept.get("type", "BPE")} | changes


def _byte_level(settings: JsonObject, use_regex: bool = True) -> dict:
    prefix = settings.boolean("add_prefix_space", False)
    flags = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel"} | flags


def _gpt2(fields: dict, settings: JsonObject) -> dict:
    return {
        "normalizer": None,
        "pre_tokenizer": _byte_level(settings),
        "decoder": _byte_level(settings),
        "model": _model(fields),
    }


def _gpt_neox(fields: dict, settings: JsonObject) -> dict:
    return _gpt2(fields, settings) | {"normalizer": {"type": "NFC"}}


def _qwen2(fields: dict, settings: JsonObject) -> dict:
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}
    split["invert"] = False
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, _byte_level(settings, use_regex=False)],
        },
        "decoder": _byte_level(settings),
        "model": _model(fields),
    }


def _llama(fields: dict, settings: JsonObject) -> dict:
    scheme = "always" if settings.boolean("legacy", False) else "first"
    prefix = settings.boolean("add_prefix_space", True)
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(fields, fuse_unk=True, byte_fallback=True),
    }


@dataclass(frozen=True)
class TokenizerClass:
    """pipeline: what the class makes of the file's fields; named: its default special tokens."""

    pipeline: object
    named: dict[str, str]
    resets_flags: bool = False  # of its special tokens
    pads_as_file: bool = False  # the pad_token of a left-over "padding" becomes a special token
    keeps_post_processor: bool = True


CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        _llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, pads_as_file=True
    ),
    "GPT2Tokenizer": TokenizerClass(
        _gpt2, {"unk_token": _END, "bos_token": _END, "eos_token": _END}
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        _gpt_neox,
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
        keeps_post_processor=False,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2, {"unk_token": _END, "eos_token": _END, "pad_token": _END}, resets_flags=True
    ),
}
_AS_IN_FILE = TokenizerClass(lambda fields, settings: {}, {}, pads_as_file=True)


def _made(file: Path, fields: dict, config: dict, name: str) -> Found:
    """The tokenizer of class `name` for the fields of `file`."""
    made = CLASSES.get(name, _AS_IN_FILE)
    settings = JsonObject(file.with_name(CONFIG), config)
    added = _AddedVocabulary(file, read_vocab(file, fields))
    in_file = [_with_id(file, token) for token in _list(JsonObject(file, fields), "added_tokens")]
    named, padding = made.named, fields.get("padding")
    if made.pads_as_file and isinstance(padding, dict):
        named = named | {"pad_token": padding.get("pad_token")}
    special = _SpecialTokens.read(file.parent, config, in_file, named)

    if name == "TokenizersBackend":
        added.add(in_file)
    added.add(special.to_add(added))
    if made.resets_flags:
        contents = dict.fromkeys(map(_content, [*special.named.values(), *special.extra]))
        added.add([AddedToken(content, None) for content in contents])

    fields = fields | made.pipeline(fields, settings)
    named = {key: _content(token) for key, token in special.named.items()}
    if not made.keeps_post_processor or fields.get("post_processor") is None:
        fields["post_processor"] = _bos_and_eos_template(settings, named, added)
    fields["added_tokens"] = [vars(token) for token in added.history]
    return Found(
        file, fields, added.history, named, settings.boolean("split_special_tokens", False)
    )


def _bos_and_eos_template(
    settings: JsonObject, named: dict[str, str], added: _AddedVocabulary
) -> dict | None:
    """The post-processor for add_bos_token and add_eos_token, where a class follows them."""
    single: list[dict] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for key, at in (("bos_token", 0), ("eos_token", len(single) + 1)):
        content = named.get(key)
        if settings.boolean(f"add_{key}", False) and content is not None:
            single.insert(at, {"SpecialToken": {"id": content, "type_id": 0}})
            special[content] = {"id": content, "ids": [added.ids[content]], "tokens": [content]}
    if not special:
        return None
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]  # required, though not used here
    template = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return template | {"special_tokens": special}


# ----------------------------------------------------------------------------- its added tokens


Special = str | AddedToken  # a special token as a file names it: without or with flags


@dataclass
class _AddedVocabulary:
    """Added tokens, with ids given in the order in which they come, as the reference does: that of
    the vocabulary if the token is there, else the next free one."""

    file: Path
    vocab: dict
    history: list[AddedToken] = field(default_factory=list)
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def add(self, tokens: list[AddedToken]) -> None:
        """Adds tokens; one that is there already only changes its flags. A token's own id, if it
        has one, must be the one that it gets."""
        size = len(self.vocab)
        next_id = max([size, *(id + 1 for id in self.by_id)])
        for token in tokens:
            id = self.ids.get(token.content, self.vocab.get(token.content))
            if id is None:
                id, next_id = next_id, next_id + 1
            if token.id not in (None, id):
                raise MinitxError(
                    f"{self.file}: the added token {abbreviate(token.content)} must have id {id}, "
                    f"{'its id in the vocabulary' if id < size else 'the next free id'}, "
                    f"got {token.id}."
                )
            token = replace(token, id=id)
            if self.by_id.get(id) != token:
                self.history.append(token)
            self.ids[token.content], self.by_id[id] = id, token


@dataclass
class _SpecialTokens:
    """What the files beside ``tokenizer.json`` say about added and special tokens.

    listed: tokens with ids and flags; named: by name; extra: without a name.
    """

    listed: list[AddedToken]
    named: dict[str, Special]
    extra: list[Special]

    @classmethod
    def read(cls, folder: Path, config: dict, in_file: list[AddedToken], defaults: dict):
        file = folder / CONFIG
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        more, extra = (extra, None) if isinstance(extra, dict) else ({}, extra)  # named, unnamed
        by_id: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in config:
            decoder = JsonObject(file, config).object("added_tokens_decoder").fields
            by_id = {_index(file, id): _added_token(file, token) for id, token in decoder.items()}
        else:  # older files
            config = config | _special_tokens_map(folder)
            new = config.get("extra_special_tokens")
            if isinstance(new, list):
                extra = [*(extra or []), *(token for token in new if token not in (extra or []))]
            special = [*(config.get(key) for key in NAMED), *(extra or [])]
            by_id = _legacy_added_tokens(folder, special) | {token.id: token for token in in_file}
            if extra is None:
                extra = config.get("additional_special_tokens")
        if not isinstance(extra, list | None):
            raise MinitxError(f"{file}: extra_special_tokens {abbreviate(extra)} must be a list.")

        named: dict[str, Special | None] = dict.fromkeys(NAMED) | defaults
        named |= {key: value for key, value in config.items() if _is_named(key, value)} | more
        by_content = {token.content: token for token in by_id.values()}
        for key, value in named.items():
            token = _special(file, key, value)
            known = by_content.get(_content(token)) if key in NAMED and token is not None else None
            named[key] = known or token
        named = {key: token for key, token in named.items() if token is not None}
        listed = [replace(by_id[id], id=id) for id in sorted(by_id)]
        return cls(listed, named, [_special(file, "extra_special_tokens", t) for t in extra or []])

    def to_add(self, there: _AddedVocabulary) -> list[AddedToken]:
        """The tokens to add, in order: all that are listed, then the others that are not there."""
        names = {_content(token) for token in self.named.values()}
        known = set(there.ids) | {token.content for token in self.listed}
        others = [
            token
            for token in dict.fromkeys([*self.named.values(), *self.extra])  # each once
            if _content(token) not in known
        ]
        found = [
            replace(token, special=True) if token.content in names else token
            for token in (*self.listed, *map(_with_flags, others))
        ]
        return [token for token in found if token.content]


def _special_tokens_map(folder: Path) -> dict:
    """The settings in special_tokens_map.json, which take precedence over the others."""
    file = folder / "special_tokens_map.json"
    return {
        key: _added_token(file, value | {"special": True}) if _has_content(value) else value
        for key, value in _optional_json(file).items()
    }


def _legacy_added_tokens(folder: Path, special: list) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json (text -> id), some of which are special."""
    file = folder / "added_tokens.json"
    contents = {_content(token) for token in special if isinstance(token, Special)}
    return {
        _index(file, id): AddedToken(
            content, None, special=content in contents, normalized=content not in contents
        )
        for content, id in _optional_json(file).items()
    }


def _special(file: Path, key: str, value) -> Special | None:
    """A special token: its text, or an object with its text and flags."""
    if value is None or isinstance(value, AddedToken):
        return value
    if isinstance(value, str) and _is_valid_unicode(value):
        return value
    if _has_content(value):
        return _added_token(file, value)
    raise MinitxError(
        f"{file}: {key!r} is {abbreviate(value)}; expected the text of a token or an object."
    )


def _has_content(value) -> bool:
    return isinstance(value, dict) and "content" in value


def _is_named(key: str, value) -> bool:
    """Does the setting name a special token? Any "image_token" does, too."""
    if key in NAMED or isinstance(value, Special):
        return key.endswith("_token")
    return key.endswith("_token") and _has_content(value) and value.get("__type") == "AddedToken"


def _content(token: Special) -> str:
    return token if isinstance(token, str) else token.content


def _with_flags(token: Special) -> AddedToken:
    return AddedToken(token, None) if isinstance(token, str) else token


def _index(file: Path, value) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 11:
        return int(value)
    if type(value) is int and 0 <= value < 2**32:
        return value
    raise MinitxError(
        f"{file}: an added token has the id {abbreviate(value)}; expected an integer."
    )


def _with_id(file: Path, fields) -> AddedToken:
    """A token of "added_tokens" in a ``tokenizer.json``."""
    token = _added_token(file, fields)
    where = f"the id of the added token {abbreviate(token.content)}"
    id = JsonObject(file, fields).get("id", REQUIRED, lambda v: type(v) is int, where)
    return replace(token, id=id)


def _added_token(file: Path, fields) -> AddedToken:
    where = f"the added token {abbreviate(fields)}"
    if not isinstance(fields, dict):
        raise MinitxError(f"{file}: {where} must be an object with its content.")
    entry = JsonObject(file, fields)
    content = entry.get("content", REQUIRED, _is_valid_unicode, f"the text of {where}")
    special = entry.boolean("special", False)
    normalized = entry.boolean("normalized", not special)
    flags = {name: entry.boolean(name, False) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, None, special=special, normalized=normalized, **flags)


def _list(fields: JsonObject, name: str) -> list:
    return fields.get(name, [], lambda v: isinstance(v, list), "an array")


def _is_valid_unicode(value) -> bool:
    """A string without lone surrogates, which JSON allows but UTF-8 cannot encode."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
