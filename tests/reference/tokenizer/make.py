"""Generate ``tokenizer.json`` and ``reference.json`` here with Hugging Face ``tokenizers``.

    python tests/reference/tokenizer/make.py

``tokenizer.json`` is a small byte-level BPE tokenizer, trained on the text below.
``reference.json`` has, for texts from all of Unicode: the word lengths after GPT-2's
pre-tokenization; their ids from that tokenizer and from variants of it (a variant is the same file
with some keys replaced); texts decoded from arbitrary ids; and which code points are letters,
numbers and whitespace. The seed is fixed. The file records the version of ``tokenizers``.
"""

import itertools
import json
import random
import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
VOCAB_SIZE = 420
IN_VOCABULARY = {"re": 262}  # added tokens that are also in the trained vocabulary
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TRAINING_TEXT = """Once upon a time there was a small red kite. It was Mia's. "Where's the kite?"
said Tom. The kite's in the box, and the box is in the park! They'll go to the park, won't they?
Sam carries 12 apples and 345 pears, and he's got 6 more at home; that makes 363. Sam went to the
river with the basket, and Mia went home. The café in the städtchen was closed. Где мяч?
Мяч в саду. 今天天气很好。
We're happy, I'm glad, you've seen it, she'd know, don't you think so? 🙂🙂 x = y + 1;
"""

# Added tokens with their flags; flags that are not given are False.
ADDED = [("<|endoftext|>", {"special": True})]
FLAGGED = ADDED + [
    ("<l>", {"special": True, "lstrip": True}),
    ("<r>", {"special": False, "rstrip": True}),
    ("<lr>", {"special": True, "lstrip": True, "rstrip": True}),
    ("word", {"single_word": True}),
    ("<l><l>", {}),
    ("caf\u00e9", {"normalized": True}),
    ("  ", {"normalized": True}),
    ("re", {"normalized": True, "single_word": True}),
    ("y + 1", {"normalized": True, "lstrip": True}),
]


def byte_level(add_prefix_space=False, use_regex=True):
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def added_tokens(tokens):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    free = itertools.count(VOCAB_SIZE - 1)
    return [
        {"id": IN_VOCABULARY.get(content) or next(free), "content": content, **flags, **own}
        for content, own in tokens
    ]


def split_first(**how):
    steps = [{"type": "Split", "pattern": {"Regex": GPT2}, **how}, byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {
        "<|endoftext|>": {
            "id": "<|endoftext|>",
            "ids": [VOCAB_SIZE - 1],
            "tokens": ["<|endoftext|>"],
        }
    },
}
# Each variant replaces some keys of the file; "model" is merged into the keys of the model.
VARIANTS = {
    "plain": {},
    "prefix space": {"pre_tokenizer": byte_level(add_prefix_space=True)},
    "no regex": {"pre_tokenizer": byte_level(use_regex=False)},
    "split first": {"pre_tokenizer": split_first(behavior="Isolated", invert=False)},
    "split by removing": {"pre_tokenizer": split_first(behavior="Removed", invert=True)},
    "starts with bos": {"post_processor": TEMPLATE},
    "sequence of processors": {
        "post_processor": {"type": "Sequence", "processors": [byte_level(), TEMPLATE]}
    },
    "ignore merges": {"model": {"ignore_merges": True, "merges": []}},
    "flags": {"added_tokens": added_tokens(FLAGGED)},
    "flags, prefix space, NFC": {
        "added_tokens": added_tokens(FLAGGED),
        "pre_tokenizer": byte_level(add_prefix_space=True),
        "normalizer": {"type": "NFC"},
    },
}
ALL_TEXTS = {"plain", "flags", "flags, prefix space, NFC"}  # other variants use every sixth text


def texts(rng):
    """Handwritten texts, texts of every Unicode category, and random mixtures."""
    found = ["", " ", "  ", "\n", " \n", "\n\n x", "a", " a", "  a", "a  ", "   a   b   ", "\t\ta"]
    found += [
        "\u00a0a",
        " \u00a0 a",
        "a\u3000\u3000b",
        "\x00",
        "a\x00b",
        "\x1c\x1d x\x1e\x1f",
        "\ufffd",
    ]
    found += ["it's we're I'm you've he'll she'd 'tis don't O'Neil's 'S 'RE ''s '", "can\u2019t"]
    found += ["x1y2 345 \u00b2\u00bd\u2168\u0663 3.14 1,000", "<|endoftext|>", "a <|endoftext|> b"]
    found += [
        "<|endoftext|><|endoftext|>",
        "<|endoftext",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    ]
    found += [
        "e\u0301 cafe\u0301 caf\u00e9 \u1ebf",
        "\u0915\u094d\u0937\u093f",
        "\ufeffbom",
        "\U0001f1eb\U0001f1f7",
    ]
    found += [
        "\U0010ffff\U000f0000\ue000",
        "A\u030a\u0327 \u212b",
        "a\u0085b\u2028c\u2029d\u180ee\u200bf",
    ]
    found += [
        " <l> x <l>",
        "x <r>  y",
        "x  <lr>  y",
        "word words sword word. word_ word\u0301 word\u00b2",
    ]
    found += [
        "<l><l> <l>",
        "re re: pre 're re\u203f \u24b6re re\u200d",
        "a   b    c",
        "y + 1 y + 1 cafe\u0301",
    ]
    found += [
        "<r>  <r>  ",
        "<lr> <lr>",
        "<l>word",
        "word<l> word",
        "  y + 1",
        "<r>  word  <l>",
        "<r>\u2003\u2003x",
    ]
    by_category = {}
    for code in range(0x110000):
        by_category.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del by_category["Cs"]  # surrogates are not valid text
    for _, chars in sorted(by_category.items()):
        for separator in ("", " ", "a"):
            found.append(separator.join(rng.choices(chars, k=6)) + " " + rng.choice(chars))
    pieces = [
        "'s",
        "'ll",
        "'",
        " ",
        "  ",
        "\n",
        "\u00a0",
        "\u2003",
        "a",
        "B",
        "7",
        "!",
        "<l>",
        "<r>",
    ]
    pieces += [
        "<lr>",
        "word",
        "caf\u00e9",
        "e\u0301",
        "re",
        "\u0301",
        "\U0001f642",
        "<|endoftext|>",
        "the",
        "_",
    ]
    for n in range(120):
        if n % 2:
            parts = rng.choices(pieces, k=14)
        else:
            parts = [rng.choice(by_category[rng.choice(sorted(by_category))]) for _ in range(12)]
        found.append("".join(parts))
    found += [line for line in TRAINING_TEXT.splitlines()]
    return found


def train():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    fields = json.loads(tokenizer.to_str())
    assert len(fields["model"]["vocab"]) == VOCAB_SIZE - 1
    assert {name: fields["model"]["vocab"][name] for name in IN_VOCABULARY} == IN_VOCABULARY
    fields["added_tokens"] = added_tokens(ADDED)
    return fields


def with_variant(fields, variant):
    """`fields` with the keys of `variant` replaced (as in tests/tokenizer_files.py)."""
    model = fields["model"] | variant.get("model", {})
    return fields | variant | {"model": model}


def code_points(pattern):
    """The code points that `pattern` matches, as ranges "first-last" in hexadecimal."""
    step = pre_tokenizers.Split(Regex(pattern), "isolated")
    matched = []
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        if len(step.pre_tokenize_str("\x01" + chr(code))) == 2:
            matched.append(code)
    ranges = []
    for code in matched:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return " ".join(f"{first:x}-{last:x}" for first, last in ranges)


def main():
    rng = random.Random(20240607)
    fields = train()
    all_texts = texts(rng)
    gpt2_split = pre_tokenizers.Split(Regex(GPT2), "isolated")
    variants = {}
    for name, variant in VARIANTS.items():
        tokenizer = Tokenizer.from_str(json.dumps(with_variant(fields, variant)))
        step = 1 if name in ALL_TEXTS else 6
        encoded = [tokenizer.encode(text).ids for text in all_texts[::step]]
        variants[name] = {"replaced": variant, "step": step, "ids": encoded}
    plain = Tokenizer.from_str(json.dumps(fields))
    lists = [rng.choices(range(VOCAB_SIZE), k=rng.randrange(1, 12)) for _ in range(60)]
    decoded = [
        [ids, plain.decode(ids, skip_special_tokens=False), plain.decode(ids)] for ids in lists
    ]
    reference = {
        "made with": f"tokenizers {tokenizers.__version__}",
        "texts": all_texts,
        "word lengths": [
            [len(word) for word, _ in gpt2_split.pre_tokenize_str(text)] for text in all_texts
        ],
        "variants": variants,
        "decoded": decoded,
        "letters": code_points(r"\p{L}"),
        "numbers": code_points(r"\p{N}"),
        "white space": code_points(r"\s"),
    }
    for name, content in (("tokenizer.json", fields), ("reference.json", reference)):
        text = json.dumps(content, separators=(",", ":"))
        (HERE / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
