"""Read a byte-level BPE tokenizer from Hugging Face's ``tokenizer.json``.

Supported: BPE models (also with ``ignore_merges``), the ByteLevel pre-tokenizer (alone, or after a
Split by GPT-2's pattern), the ByteLevel decoder, no normalizer or NFC, a post-processor that adds
nothing or prepends one token, and added tokens with all their flags. Any other setting that could
change ids or text raises an error that names it.

bos and eos are named in ``tokenizer_config.json`` next to the file; its other settings are ignored.
Without it both are "<|endoftext|>", if that token exists. A token that the post-processor prepends
takes precedence as bos.

The ids equal those of Hugging Face ``tokenizers``. Decoding differs for one kind of token: an added
token such as "café" decodes to its own text here, whereas ``tokenizers`` decodes "é" as byte 0xE9.
"""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.common import abbreviate, read_json
from minitx.checkpoints.json_object import REQUIRED, JsonObject
from minitx.checkpoints.tokenizer_pipeline import Pipeline, reject_unknown_keys
from minitx.errors import MinitxError

_END_OF_TEXT = "<|endoftext|>"
_ALL_BYTES = {bytes([byte]) for byte in range(256)}


def _byte_characters() -> list[str]:
    """The printable character that represents each byte in the file (GPT-2's byte encoder).

    Bytes that are printable in Latin-1 represent themselves; the others map, in order, to U+0100
    and up: a space is U+0120.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code_of = {byte: byte for byte in printable}
    code_of |= {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(code_of[byte]) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARACTERS)}


def read_tokenizer(path) -> ByteLevelBPE:
    """The tokenizer in `path`: a ``tokenizer.json``, or a folder with one."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    fields = read_json(file)
    known = "version truncation padding added_tokens normalizer pre_tokenizer post_processor"
    reject_unknown_keys(file, fields, f"{known} decoder model", "the file")
    for name in ("truncation", "padding"):
        if fields.get(name) is not None:
            JsonObject(file, fields).reject(name, "changes the number of ids")

    pipeline = Pipeline(file, fields)
    added = _added_tokens(file, fields)
    model = _BpeModel(file, fields, {token.content: token.id for token in added})
    bos, eos = _bos_and_eos(file, added)
    try:
        return ByteLevelBPE(
            model.tokens,
            model.merges,
            added,
            bos=bos if pipeline.prefix_id is None else pipeline.prefix_id,
            eos=eos,
            adds_bos=pipeline.prefix_id is not None,
            add_prefix_space=pipeline.add_prefix_space,
            use_regex=pipeline.use_regex,
            nfc=pipeline.nfc,
            ignore_merges=model.ignore_merges,
        )
    except MinitxError as error:
        raise MinitxError(f"{file}: {error}") from None


def _added_tokens(file: Path, fields: dict) -> list[AddedToken]:
    return [
        _added_token(file, entry) for entry in _list(JsonObject(file, fields), "added_tokens", [])
    ]


def _added_token(file: Path, fields) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    where = f"the added token {abbreviate(fields)}"
    if not isinstance(fields, dict):
        raise MinitxError(f"{file}: {where} must be an object with id and content.")
    reject_unknown_keys(file, fields, " ".join(("id", "content", *flags)), where)
    entry = JsonObject(file, fields)
    content = entry.get("content", REQUIRED, _is_valid_unicode, f"the text of {where}")
    id = entry.get("id", REQUIRED, lambda v: type(v) is int, f"the id of {where}")
    values = {flag: entry.boolean(flag, False) for flag in flags}
    return AddedToken(content, id, **values)


def _bos_and_eos(file: Path, added: list[AddedToken]) -> tuple[int | None, int | None]:
    ids = {token.content: token.id for token in added}
    config_file = file.with_name("tokenizer_config.json")
    if not config_file.exists():
        return ids.get(_END_OF_TEXT), ids.get(_END_OF_TEXT)
    config = read_json(config_file)
    found = []
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and not (isinstance(content, str) and content in ids):
            raise MinitxError(
                f"{config_file}: {name!r} must be an added token of {file.name}, "
                f"got {abbreviate(token)}."
            )
        found.append(ids.get(content))
    return found[0], found[1]


class _BpeModel:
    """The "model" of the file: `tokens` (bytes by id), `merges` (pairs of ids)."""

    def __init__(self, file: Path, fields: dict, added: dict[str, int]):
        self.file = file
        model = JsonObject(file, fields).get("model", REQUIRED, _is_object, "an object")
        if model.get("type", "BPE") != "BPE":  # OpenAI's file for GPT-2 has no type
            raise MinitxError(
                f"{file}: the model type must be BPE, got {abbreviate(model['type'])}."
            )
        known = "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk"
        reject_unknown_keys(
            file, model, f"{known} byte_fallback ignore_merges vocab merges", "the model"
        )
        checked = JsonObject(file, model)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(name):  # null, 0, "" and false have no effect
                checked.reject(name, "minitx does not support")
        self.ignore_merges = checked.boolean("ignore_merges", False)

        ids = checked.get("vocab", REQUIRED, _is_object, "an object")
        self.tokens = [self._bytes(name, name in added) for name in self._names_by_id(ids)]
        for name, id in added.items():
            if ids.get(name, id) != id:
                both = f"{id} and, in the vocabulary, {ids[name]}"
                raise self._error(
                    f"the added token {abbreviate(name)} has the id {both}", "expected one id"
                )
        if model.get("unk_token") and _ALL_BYTES - set(self.tokens):
            checked.reject("unk_token", "replaces bytes without a token")
        self.merges = self._merges(_list(checked, "merges"), ids)

    def _names_by_id(self, ids: dict) -> list[str]:
        """The token names by id; ids must be unique and without gaps."""
        names: dict[int, str] = {}
        for name, id in ids.items():
            if type(id) is not int or id < 0:
                raise self._error(
                    f"the token {abbreviate(name)} has id {abbreviate(id)}",
                    "expected an integer >= 0",
                )
            if names.setdefault(id, name) != name:
                both = f"{abbreviate(names[id])} and {abbreviate(name)}"
                raise self._error(f"the tokens {both} have the same id {id}", "expected unique ids")
        for id in range(len(names)):
            if id not in names:
                raise self._error(
                    f"none of the {len(names)} tokens has id {id}", "expected ids without gaps"
                )
        return [names[id] for id in range(len(names))]

    def _bytes(self, name: str, is_added: bool) -> bytes:
        """The bytes of the token named `name` in the file."""
        decoded = bytes(_BYTES.get(char, 0) for char in name)
        is_byte_level = name != "" and all(char in _BYTES for char in name)
        if not is_added:
            if is_byte_level:
                return decoded
            raise self._error(
                f"the token {abbreviate(name)} is empty or has characters that represent no byte",
                "expected a byte-level vocabulary",
            )
        content = name.encode("utf-8")  # the name of an added token is its text
        if is_byte_level and decoded != content:
            raise self._error(
                f"the added token {abbreviate(name)} also represents the bytes {decoded!r}",
                "rename it",
            )
        return content

    def _merges(self, merges: list, ids: dict) -> list[tuple[int, int]]:
        pairs = []
        for rank, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(pair, list) and [type(name) for name in pair] == [str, str]):
                raise self._error(f"merge {rank} is {abbreviate(merge)}", "expected two tokens")
            for name in (*pair, "".join(pair)):
                if name not in ids:
                    raise self._error(
                        f"merge {rank}, {abbreviate(' '.join(pair))}, needs the token "
                        f"{abbreviate(name)}",
                        "add it to the vocabulary",
                    )
            pairs.append((ids[pair[0]], ids[pair[1]]))
        return pairs

    def _error(self, found: str, advice: str) -> MinitxError:
        return MinitxError(f"{self.file}: {found}; {advice}.")


def _list(fields: JsonObject, name: str, default=REQUIRED) -> list:
    return fields.get(name, default, lambda v: isinstance(v, list), "an array")


def _is_object(value) -> bool:
    return isinstance(value, dict)


def _is_valid_unicode(value) -> bool:
    """A string without lone surrogates, which JSON allows but UTF-8 cannot encode."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
