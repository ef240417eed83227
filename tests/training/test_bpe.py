"""BPE training: equal to the literal version, worked examples, tokenizers for a list of words."""

import random
from collections import Counter

import pytest

from minitx.checkpoints.pre_tokenize import pre_tokenize
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError
from minitx.training.bpe import bpe_for_words, learn_bpe

WORDS = """a about after again all animal answer apple are ask at away back bag ball basket bear
bed began behind bell bench big bird blue boat book box boy bread bridge bright brother brown but
button buy by cake call called can candle carried carries carry castle cat catch chair cheese child
children circle city climb close closed cloth cloud coat cold come cook cool corn corner could cow
crow cup dark day did dig dinner dog doll door down dragon draw dream drink drop drum duck each ear
early east eat egg eight empty end evening every eye face fall family far farm fast father fell
fence few field find fire first fish five flag flew floor flower fly follow food for forest forgot
found four fox friend friends frog from fruit full funny game garden gate gave gentle get gift girl
give glad glass go goat gold gone good got grass gray great green ground had hair hall hand happy
has hat have he heard heart held help hen her here hid high hill him his hold hole home honey horse
hot house how hungry idea in inside into is it jar jump just keep kept key king kitchen kite knew
know lake lamp last laugh leaf left leg lemon let letter light like liked lion listen little live
lived long look looked lost loud love made magic make man many map market mat may meadow met milk
mine mirror money monkey moon more morning most mother mountain mouse much music must my name near
need nest never new next nice night nine no north nose not now of off old on once one only open
or orange other our out over owl paint pan paper park part party path pear pencil people pet
picture pie pig pillow pink place plate play played pocket pond pony pool pot pretty pull purple
put queen quick quiet rabbit rain ran read ready red rest ride right ring river road rock room rope
rose round run sad said sand sang sat saw say school sea secret see seed seven she sheep shell ship
shoe shop short show sing sister sit six sky sleep small smile snow so sock soft some song soon
sound south spoon star stay still stone stop story street strong sun sweet swim table tail take
talk tall tell ten than thank that the their them then there these they thing think this three
through time to today together told took tooth top town toy train tree truck turn two under until
up us very voice wait walk walked wall want wanted warm was wash water way we well went west wet
what wheel when where which white who why will wind window wish with woman wood word work world
would year yellow yes you young your""".split()
NAMES = "Tom Sam Eva Anna Ben Lily Max Mia Tim Lucy Jack Emma Once The She He They Then".split()
STORY_WORDS = [" " + word for word in WORDS] + NAMES + [".", ",", "?", "!", "\n\n", "'s"]


def literal_bpe(counts, size):
    """The literal version: count all pairs before every merge; encode words by the merges in
    order."""
    tokens, merges = [bytes([byte]) for byte in range(256)], []
    while len(tokens) < size:
        pairs = Counter()
        for word, count in counts.items():
            ids = list(word.encode())
            while ranks := [merges.index(p) for p in zip(ids, ids[1:]) if p in merges]:  # noqa: B905
                pair = merges[min(ranks)]
                at = next(k for k in range(len(ids)) if tuple(ids[k : k + 2]) == pair)
                ids[at : at + 2] = [tokens.index(tokens[pair[0]] + tokens[pair[1]])]
            for pair in zip(ids, ids[1:]):  # noqa: B905
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined = tokens[best[0]] + tokens[best[1]]
        if joined not in tokens:
            tokens.append(joined)
    return tokens, merges


def test_merges_of_the_worked_example():
    # (a, b) occurs 3 + 2 = 5 times: merge 256 = "ab". Then (ab, c) occurs 3 times: 257 = "abc".
    tokenizer = learn_bpe({"abc": 3, "ab": 2, "x": 9}, vocab_size=259)
    assert tokenizer.tokens[256:] == [b"ab", b"abc", b"<|endoftext|>"]
    assert tokenizer.merges == [(97, 98), (256, 99)]
    assert tokenizer.bos == tokenizer.eos == 258
    assert tokenizer.encode("abc<|endoftext|>") == [257, 258]


@pytest.mark.parametrize("seed", range(8))
def test_merges_equal_the_literal_version(seed):
    rng = random.Random(seed)
    # Few letters and short words: overlapping pairs, ties, and bytes that two merges could produce.
    words = {"".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(25)}
    counts = {word: rng.randrange(1, 6) for word in sorted(words)}
    tokens, merges = literal_bpe(counts, 300)
    learned = learn_bpe(counts, 300, special_tokens=())
    assert (learned.tokens, learned.merges) == (tokens, merges)


def test_merges_depend_only_on_the_counts():
    texts = ["the kite is in the park", "Tom's kite, the red kite"]
    first = learn_bpe(texts, 290)
    counts = Counter(word for text in texts for word in pre_tokenize(text))
    again = learn_bpe(dict(sorted(counts.items(), reverse=True)), 290)
    assert (first.tokens, first.merges) == (again.tokens, again.merges)


def test_vocabulary_is_filled_unless_every_word_is_one_token():
    texts = [" ".join(WORDS)] * 2
    assert len(learn_bpe(texts, 400)) == 400
    whole = learn_bpe(texts, 10_000)
    assert len(whole) < 10_000
    assert all(len(whole.encode(" " + word)) == 1 for word in WORDS)
    text = "any caf\u00e9 \U0001f642 text"
    assert whole.decode(whole.encode(text)) == text


def test_vocab_size_too_small_is_refused():
    assert len(learn_bpe(["aa"], 257)) == 257
    with pytest.raises(MinitxError, match="at least 257"):
        learn_bpe(["aa"], 256)
    with pytest.raises(MinitxError, match="surrogate"):
        learn_bpe(["\ud800"], 300)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_bpe_for_words_encodes_each_word_as_one_token(ignore_merges, tmp_path):
    tokenizer = bpe_for_words(STORY_WORDS, ignore_merges=ignore_merges)
    ids = [tokenizer.encode(word) for word in STORY_WORDS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(STORY_WORDS)
    longer = sum(len(word.encode()) > 1 for word in STORY_WORDS)
    if ignore_merges:
        assert len(tokenizer) == 256 + longer + 1
    else:
        assert 256 + longer + 1 < len(tokenizer) <= 1200
    write_tokenizer(tokenizer, tmp_path)
    text = "Once the red kite was in the box.<|endoftext|>Zebra caf\u00e9 \U0001f642"
    assert read_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("seed", range(5))
def test_bpe_for_words_encodes_random_words_as_one_token(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("ab\u00e9", k=rng.randrange(1, 12))) for _ in range(60)]
    tokenizer = bpe_for_words(words)
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    assert bpe_for_words(words + words).tokens == tokenizer.tokens


@pytest.mark.parametrize("word", ["", "two words", "it's", "x1", " \n"])
def test_bpe_for_words_refuses_what_is_not_one_word(word):
    if word == " \n":
        assert len(bpe_for_words([word]).encode(word)) == 1
    else:
        with pytest.raises(MinitxError, match="GPT-2's pattern"):
            bpe_for_words(["fine", word])
