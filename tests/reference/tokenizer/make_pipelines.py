"""Generate ``pipelines.json`` here with Hugging Face ``tokenizers`` and transformers.

    python tests/reference/tokenizer/make_pipelines.py

Two small vocabularies, byte-level (``tokenizer.json``, from ``make.py``) and SentencePiece-style
(made here), each with the pipelines of well-known models around it:

"pipelines": keys that replace those of the vocabulary's file, and the ids of difficult texts
"decoded": texts decoded from arbitrary ids
"folders": the files of a folder, and the ids of texts by transformers' AutoTokenizer

The seed is fixed. The file records the versions.
"""

import json
import os
import random
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local
import tokenizers
import transformers
from make import ADDED, GPT2, TEMPLATE, TRAINING_TEXT, added_tokens, byte_level
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
VERSIONS = f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}"
SPACE = "\u2581"
END = "<|endoftext|>"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "a",
    " a",
    "a ",
    "  a  b ",
    "Hello world, it's 2024!",
    "\t\tx = y + 1;",
]
TEXTS += [
    "IT'S we'Ve they'RE I'LL 'Tis '\u017f o'clock",
    "12345 1,234.5 x1y22 \u00bd\u2168\u0663\u0664",
]
TEXTS += [
    "line\n\n  line\r\n\r\n\tend\n \n",
    "!!!\n...\r\n?!/\n// ,\n",
    "a\u00a0b\u2003\u2003c\u0085d\u2028e",
]
TEXTS += [
    "caf\u00e9 cafe\u0301 \u1ebf \u212b A\u030a\u0327 \ufb01 \uac00\u1100\u1161",
    "na\u00efve \u01c5 \u02b0 \u00aa \u00df\u0130",
]
TEXTS += [
    "\u0413\u0434\u0435 \u043c\u044f\u0447? \u4eca\u5929\u5929\u6c14 \u3042\u3044 "
    "\u0628\u0633\u0645 \u0939\u093f\u0928\u094d\u0926\u0940"
]
TEXTS += [
    "\U0001f642\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u20ac\u2026\u2014",
    "\x00\x1c\ufeff\u200b\ue000\U0010ffff",
]
TEXTS += [
    f"{END}a{END} b",
    "<s> a </s><unk>",
    f"{SPACE}a {SPACE}{SPACE} <0x41>",
    "the " * 40,
    "a" * 60,
    "word<s>word </s> word",
]
TEXTS += ["helloWorld HTMLParser ABc aBC McDonald's DON'T", "foo_bar/baz-qux (x) [y] {z} <|end"]


def regex_first(pattern, use_regex=False):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return sequence("pretokenizers", split | {"invert": False}, byte_level(use_regex=use_regex))


def sequence(members, *steps):
    return {"type": "Sequence", members: list(steps)}


def template(before=(), after=()):
    """A template whose special tokens have their ids from the pairs (token, id)."""
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in (*before, *after)]
    single = [
        *pieces[: len(before)],
        {"Sequence": {"id": "A", "type_id": 0}},
        *pieces[len(before) :],
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [id], "tokens": [t]} for t, id in (*before, *after)},
    }


def metaspace(scheme, split=False):
    return {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": scheme,
        "split": split,
    }


LLAMA2 = {
    "normalizer": sequence(
        "normalizers",
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ),
    "pre_tokenizer": None,
    "post_processor": template([("<s>", 1)]),
}
DIGITS = {"type": "Digits", "individual_digits": True}
REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}

PIPELINES = {  # name: (vocabulary, the keys that are replaced)
    "GPT-NeoX": ("bytes", {"normalizer": {"type": "NFC"}, "post_processor": template()}),
    "SmolLM": (
        "bytes",
        {"pre_tokenizer": sequence("pretokenizers", DIGITS, byte_level())},
    ),
    "numbers apart": (
        "bytes",
        {
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "Digits", "individual_digits": False}, byte_level()
            )
        },
    ),
    "Llama 3": (
        "bytes",
        {
            "pre_tokenizer": regex_first(LLAMA3),
            "post_processor": sequence("processors", byte_level(), TEMPLATE),
            "model": {"ignore_merges": True},
        },
    ),
    "Qwen2": ("bytes", {"normalizer": {"type": "NFC"}, "pre_tokenizer": regex_first(QWEN2)}),
    "GPT-4": ("bytes", {"pre_tokenizer": regex_first(GPT4)}),
    "GPT-4o": ("bytes", {"pre_tokenizer": regex_first(GPT4O)}),
    "nested and empty sequences": (
        "bytes",
        {
            "normalizer": sequence("normalizers"),
            "pre_tokenizer": sequence(
                "pretokenizers", sequence("pretokenizers", byte_level(add_prefix_space=True))
            ),
            "post_processor": sequence("processors", sequence("processors"), template()),
            "decoder": sequence("decoders", byte_level()),
        },
    ),
    "two tokens before, one after": (
        "bytes",
        {"post_processor": template([("a", 64), (END, 419)], [(END, 419)])},
    ),
    "BertProcessing": (
        "bytes",
        {"post_processor": {"type": "BertProcessing", "cls": ["a", 64], "sep": [END, 419]}},
    ),
    "split at a text": (
        "bytes",
        {
            "normalizer": sequence(
                "normalizers",
                {"type": "NFKC"},
                {"type": "Lowercase"},
                {"type": "Strip", "strip_left": True, "strip_right": False},
            ),
            "pre_tokenizer": sequence(
                "pretokenizers",
                {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                    "invert": False,
                },
                byte_level(use_regex=False),
            ),
        },
    ),
    "Llama 2": ("sentencepiece", LLAMA2),
    "Mistral": (
        "sentencepiece",
        {"pre_tokenizer": metaspace("first"), "post_processor": template([("<s>", 1)])},
    ),
    "Metaspace, always, split": (
        "sentencepiece",
        {"pre_tokenizer": metaspace("always", split=True), "decoder": metaspace("always")},
    ),
    "Metaspace, never": (
        "sentencepiece",
        {
            "pre_tokenizer": metaspace("never"),
            "decoder": sequence("decoders", {"type": "ByteFallback"}, {"type": "Fuse"}, REPLACE),
        },
    ),
    "unknown characters": ("sentencepiece", LLAMA2 | {"model": {"byte_fallback": False}}),
    "unknown characters, fused": (
        "sentencepiece",
        LLAMA2 | {"model": {"byte_fallback": False, "fuse_unk": True}},
    ),
}

# What a folder's other files change. "tokenizer.json" is a vocabulary and the keys replaced.
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
FOLDERS = {
    "tokenizer.json alone": {"tokenizer.json": ["bytes", {}]},
    "left-over truncation and padding": {
        "tokenizer.json": [
            "bytes",
            {
                "truncation": {
                    "direction": "Right",
                    "max_length": 3,
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
                "padding": {
                    "strategy": {"Fixed": 30},
                    "direction": "Left",
                    "pad_to_multiple_of": None,
                    "pad_id": 1,
                    "pad_type_id": 0,
                    "pad_token": "the",
                },
            },
        ],
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "add_bos_token is not followed": {
        "tokenizer.json": ["bytes", {}],
        "tokenizer_config.json": {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": END,
            "eos_token": END,
            "add_bos_token": True,
            "add_eos_token": True,
        },
    },
    "named special tokens are added": {
        "tokenizer.json": ["bytes", {}],
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", **FLAGS, "content": "the", "lstrip": True},
            "extra_special_tokens": ["</s>"],
            "image_token": "word",
        },
    },
    "added_tokens_decoder changes flags": {
        "tokenizer.json": ["bytes", {}],
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "419": {**FLAGS, "content": END, "lstrip": True, "rstrip": True, "special": True},
                "420": {**FLAGS, "content": "word", "single_word": True},
            }
        },
    },
    "older files": {
        "tokenizer.json": ["bytes", {"normalizer": {"type": "NFC"}}],
        "added_tokens.json": {"word": 420, "<s>": 421},
        "special_tokens_map.json": {
            "bos_token": {"content": "<s>", "lstrip": False, "rstrip": True, "normalized": False},
            "additional_special_tokens": ["</s>"],
        },
    },
    "special tokens in a text are split": {
        "tokenizer.json": ["bytes", {}],
        "tokenizer_config.json": {"split_special_tokens": True},
    },
    "GPT2Tokenizer ignores the pre-tokenizer": {
        "tokenizer.json": ["bytes", {"pre_tokenizer": regex_first(LLAMA3)}],
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        "config.json": {"model_type": "gpt2"},
    },
    "GPT-2's by model type, from vocab.json and merges.txt": {
        "vocab.json": "bytes",
        "tokenizer_config.json": {"add_bos_token": True},
        "config.json": {"model_type": "gpt2"},
    },
    "GPTNeoXTokenizer ignores the post-processor": {
        "tokenizer.json": ["bytes", {"post_processor": TEMPLATE}],
        "config.json": {"model_type": "gpt_neox"},
    },
    "Qwen2's whatever class is named": {
        "tokenizer.json": ["bytes", {}],
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "config.json": {"model_type": "qwen2"},
    },
    "LlamaTokenizer ignores the normalizer": {
        "tokenizer.json": ["sentencepiece", LLAMA2],
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
        "config.json": {"model_type": "llama"},
    },
    "LlamaTokenizer, legacy": {
        "tokenizer.json": ["sentencepiece", LLAMA2],
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
        "config.json": {"model_type": "llama"},
    },
    "LlamaTokenizer of a byte-level file": {
        "tokenizer.json": ["bytes", {"pre_tokenizer": regex_first(LLAMA3)}],
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"},
        "config.json": {"model_type": "llama"},
    },
    "LlamaTokenizer of a mistral model": {
        "tokenizer.json": ["sentencepiece", LLAMA2],
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
        "config.json": {"model_type": "mistral"},
    },
}
FOLDER_TEXTS = TEXTS[7:12] + TEXTS[-8:]


def sentencepiece_vocabulary():
    """A small BPE with "<unk>", "<s>", "</s>", the 256 bytes and merges of words that start with
    a "▁"."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=430, special_tokens=special, show_progress=False)
    trained.train_from_iterator([TRAINING_TEXT], trainer)
    fields = json.loads(trained.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields["added_tokens"] = [
        {"id": id, "content": special[id], **flags, "special": True} for id in range(3)
    ]
    fields["model"] |= {"unk_token": "<unk>", "byte_fallback": True}
    fields["pre_tokenizer"] = None
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    fields["decoder"] = sequence(
        "decoders", REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, strip
    )
    return fields


def with_variant(fields, variant):
    """`fields` with the keys of `variant` replaced (as in tests/tokenizer_files.py)."""
    return fields | variant | {"model": fields["model"] | variant.get("model", {})}


def write_folder(folder, files, vocabularies):
    """The files of a folder (as in tests/tokenizer_files.py)."""
    for name, content in files.items():
        if name == "tokenizer.json":
            content = with_variant(vocabularies[content[0]], content[1])
        if name == "vocab.json":
            model = vocabularies[content]["model"]
            merges = (
                " ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]
            )
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            content = model["vocab"]
        (folder / name).write_text(json.dumps(content))


def main():
    rng = random.Random(20240608)
    fields = json.loads((HERE / "tokenizer.json").read_text(encoding="utf-8"))
    vocabularies = {"bytes": fields, "sentencepiece": sentencepiece_vocabulary()}
    assert GPT2 and added_tokens(ADDED) == fields["added_tokens"]
    pipelines, decoded, folders = {}, {}, {}
    for name, (vocabulary, replaced) in PIPELINES.items():
        built = Tokenizer.from_str(json.dumps(with_variant(vocabularies[vocabulary], replaced)))
        ids = [built.encode(text).ids for text in TEXTS]
        pipelines[name] = {"vocabulary": vocabulary, "replaced": replaced, "ids": ids}
        if vocabulary == "sentencepiece":
            size = built.get_vocab_size()
            lists = [rng.choices(range(size + 4), k=rng.randrange(1, 9)) for _ in range(15)]
            lists += [[3 + byte for byte in "\u00e9\U0001f642".encode()[:n]] for n in range(1, 7)]
            decoded[name] = [
                [ids, built.decode(ids, skip_special_tokens=False), built.decode(ids)]
                for ids in lists
                if ids[0] != 1  # minitx omits a leading bos
            ]
    for name, files in FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), files, vocabularies)
            auto = AutoTokenizer.from_pretrained(folder)
            ids = [auto(text)["input_ids"] for text in FOLDER_TEXTS]
            named = [auto.bos_token_id, auto.eos_token_id]
        folders[name] = {"files": files, "ids": ids, "bos and eos": named}
    reference = {
        "made with": VERSIONS,
        "sentencepiece": vocabularies["sentencepiece"],
        "texts": TEXTS,
        "pipelines": pipelines,
        "decoded": decoded,
        "folder texts": FOLDER_TEXTS,
        "folders": folders,
    }
    text = json.dumps(reference, separators=(",", ":"))
    (HERE / "pipelines.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
