"""Read a byte-level BPE tokenizer from Hugging Face's ``tokenizer.json``.

Understood: model BPE (also with ``ignore_merges``), the ByteLevel pre-tokenizer (alone, or after a
Split by GPT-2's pattern), the ByteLevel decoder, no normalizer or NFC, a post-processor that adds
nothing or one token at the start, added tokens with all their flags. Whatever else could change ids
or text is refused by name.

The start and end tokens are named in ``tokenizer_config.json`` beside it. Without that file they
are the token that the post-processor puts first and "<|endoftext|>", each where there is one. Other
settings of that file are not read.

The ids are the reference's; decoding differs for one kind of token: an added token such as "café"
is decoded to its text here, where the reference takes its "é" for the byte 0xE9.
"""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.common import read_json, short
from minitx.checkpoints.fields import REQUIRED, Fields
from minitx.checkpoints.tokenizer_steps import TokenizerSteps, only
from minitx.errors import MinitxError

_END_OF_TEXT = "<|endoftext|>"
_ALL_BYTES = {bytes([byte]) for byte in range(256)}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in the file: a printable one for every byte.

    Bytes that are printable in Latin-1 stand for themselves, the others, in order, are U+0100 and
    what follows: a space is U+0120.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code_of = {byte: byte for byte in printable}
    code_of |= {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(code_of[byte]) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARACTERS)}


def read_tokenizer(path) -> ByteLevelBPE:
    """The tokenizer in `path`: a ``tokenizer.json`` or the folder that holds one."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    fields = read_json(file)
    known = "version truncation padding added_tokens normalizer pre_tokenizer post_processor"
    only(file, fields, f"{known} decoder model", "the file")
    for name in ("truncation", "padding"):
        if fields.get(name) is not None:
            Fields(file, fields).refuse(name, "changes the number of ids")

    steps = TokenizerSteps(file, fields)
    added = _added_tokens(file, fields)
    model = _Model(file, fields, {token.content: token.id for token in added})
    bos, eos = _bos_and_eos(file, added)
    try:
        return ByteLevelBPE(
            model.tokens,
            model.merges,
            added,
            bos=bos if steps.first_id is None else steps.first_id,
            eos=eos,
            adds_bos=steps.first_id is not None,
            add_prefix_space=steps.add_prefix_space,
            use_regex=steps.use_regex,
            nfc=steps.nfc,
            ignore_merges=model.ignore_merges,
        )
    except MinitxError as error:
        raise MinitxError(f"{file}: {error}") from None


def _added_tokens(file: Path, fields: dict) -> list[AddedToken]:
    return [_added_token(file, entry) for entry in _list(Fields(file, fields), "added_tokens", [])]


def _added_token(file: Path, fields) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    where = f"the added token {short(fields)}"
    if not isinstance(fields, dict):
        raise MinitxError(f"{file}: {where} is not an object; expected its id and content.")
    only(file, fields, " ".join(("id", "content", *flags)), where)
    entry = Fields(file, fields)
    content = entry.get("content", REQUIRED, _is_unicode, f"the text of {where}")
    id = entry.get("id", REQUIRED, lambda v: type(v) is int, f"the id of {where}")
    values = {flag: entry.flag(flag, False) for flag in flags}
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
                f"{config_file}: {name!r} is {short(token)}, which is not an added token of "
                f"{file.name}; name one that is."
            )
        found.append(ids.get(content))
    return found[0], found[1]


class _Model:
    """What the file says under "model": `tokens` (bytes by id), `merges` (pairs of ids)."""

    def __init__(self, file: Path, fields: dict, added: dict[str, int]):
        self.file = file
        model = Fields(file, fields).get("model", REQUIRED, _is_object, "an object")
        if model.get("type", "BPE") != "BPE":  # GPT-2's own file has no type
            raise MinitxError(
                f"{file}: the model is {short(model['type'])}; only BPE is read here."
            )
        known = "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk"
        only(file, model, f"{known} byte_fallback ignore_merges vocab merges", "the model")
        checked = Fields(file, model)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(name):  # null, 0, "" and false ask for nothing
                checked.refuse(name, "minitx does not do")
        self.ignore_merges = checked.flag("ignore_merges", False)

        ids = checked.get("vocab", REQUIRED, _is_object, "an object")
        self.tokens = [self._bytes(name, name in added) for name in self._in_order(ids)]
        for name, id in added.items():
            if ids.get(name, id) != id:
                both = f"{id} and, in the vocabulary, {ids[name]}"
                raise self._bad(f"the added token {short(name)} has the id {both}", "give it one")
        if model.get("unk_token") and _ALL_BYTES - set(self.tokens):
            checked.refuse("unk_token", "stands for bytes that have no token")
        self.merges = self._merges(_list(checked, "merges"), ids)

    def _in_order(self, ids: dict) -> list[str]:
        """The names in the vocabulary by id, which has neither holes nor ids that two share."""
        names: dict[int, str] = {}
        for name, id in ids.items():
            if type(id) is not int or id < 0:
                raise self._bad(f"the token {short(name)} has id {short(id)}", "ids count from 0")
            if names.setdefault(id, name) != name:
                both = f"{short(names[id])} and {short(name)}"
                raise self._bad(f"the tokens {both} have the same id {id}", "each needs its own")
        for id in range(len(names)):
            if id not in names:
                raise self._bad(f"none of the {len(names)} tokens has id {id}", "leave no hole")
        return [names[id] for id in range(len(names))]

    def _bytes(self, name: str, is_added: bool) -> bytes:
        """The bytes of the token that the file calls `name`."""
        spelled = bytes(_BYTES.get(char, 0) for char in name)
        is_spelled = name != "" and all(char in _BYTES for char in name)
        if not is_added:
            if is_spelled:
                return spelled
            raise self._bad(
                f"the token {short(name)} is empty or has characters that stand for no byte",
                "expected a byte-level vocabulary",
            )
        content = name.encode("utf-8")  # an added token stands for its own text
        if is_spelled and spelled != content:
            raise self._bad(
                f"the added token {short(name)} is also the spelling of {spelled!r}", "rename it"
            )
        return content

    def _merges(self, merges: list, ids: dict) -> list[tuple[int, int]]:
        pairs = []
        for rank, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(pair, list) and [type(name) for name in pair] == [str, str]):
                raise self._bad(f"merge {rank} is {short(merge)}", "a merge joins two tokens")
            for name in (*pair, "".join(pair)):
                if name not in ids:
                    raise self._bad(
                        f"merge {rank}, {short(' '.join(pair))}, needs the token {short(name)}",
                        "the vocabulary does not have it",
                    )
            pairs.append((ids[pair[0]], ids[pair[1]]))
        return pairs

    def _bad(self, found: str, needed: str) -> MinitxError:
        return MinitxError(f"{self.file}: {found}; {needed}.")


def _list(fields: Fields, name: str, default=REQUIRED) -> list:
    return fields.get(name, default, lambda v: isinstance(v, list), "an array")


def _is_object(value) -> bool:
    return isinstance(value, dict)


def _is_unicode(value) -> bool:
    """A text without a lone surrogate, which JSON can spell and UTF-8 cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
