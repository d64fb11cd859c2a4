"""Token ids: the `tokenizers` library with a checkpoint's files, against Transformers' own tokenizer."""

import json
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyjax.convert.source.model import DEMO
from joyjax.processors.text import decode, load_tokenizer, plain_tokens

pytestmark = pytest.mark.parity

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
)
TEXTS = {
    "empty": "",
    "plain": "Make the sky red, and add 2 small dogs. It's the dog's, they'll SEE; I'D say 1234567.",
    "languages": "把天空变成红色，加一顶帽子。空を赤く ガガ 하늘을 빨갛게 أضف قبعة حمراء "
    "הוסף כובע आसमान लाल Добавь Ünïcödé İıſß ไทย ქართული",
    "decomposed": unicodedata.normalize("NFD", "un café à la crème, Ångström, ガ, 한국, Việt"),
    "emoji": "🐕‍🦺 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☺️☺ 🤷🏿‍♀️",
    "control tokens": "".join(CONTROL) + " <|im_start|>user <|im_end <|im_end|>> <| im_end|> <tool_call></think>",
    "white": "a  b   c\t\td \t e\r\n\r\n f\n\n\n  g\u00a0h\u2003i\u3000j\x0bk\x0cl\x85m\u2028n  \n",
    "only white": " \n \t  ",
    "odd": "\0 \x01\x1b[0m \ufeff \u200b\u200d\u200e\u202e \ufffd \ufffe \U0010ffff \ue000 \U000e0001 Z\u0351\u036b",
    "normalized": "ﬁ Å Ω ² ½ ﷺ 豈 \u2126\u212b\u1e9b\u0323 q\u0307\u0323",
    "marks": "''s 'S'T'RE 'll'LL --- __init__ <<<>>> https://a.b/c?d=e&f#g @#$%^&*()[]{}\\\\ \\n {0}",
    "numbers": "0123456789 ٣٤٥ ⅷ ④ 1,000.50 1e-9",
    "long": "The quick brown fox, 猫 and déjà vu. " * 3000,
    "long word": "a" * 20_000,
}


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check(ours, reference, text):
    expected = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = plain_tokens(ours, text)
    assert ids == expected
    assert decode(ours, ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=["demo", "tiny", "qwen", "published", "published as one file"])
def both(request, tmp_path_factory):
    """A folder's tokenizer in joyjax and in Transformers."""
    if request.param == "demo":
        folder = DEMO / "tokenizer"
    elif request.param == "tiny":
        folder = request.getfixturevalue("checkpoint") / "tokenizer"
    elif request.param == "qwen":
        folder = request.getfixturevalue("qwen_folder") / "tokenizer"
    else:
        folder = request.getfixturevalue("reference_files") / "processor"
        if "file" in request.param:
            folder = tmp_path_factory.mktemp("whole")
            theirs(request.getfixturevalue("reference_files") / "processor").save_pretrained(folder)
            assert (folder / "tokenizer.json").exists()
    return load_tokenizer(folder), theirs(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_transformers(name, both):
    check(*both, TEXTS[name])


@given(st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(CONTROL))).map("".join))
def test_ids_of_any_text_equal_transformers(both, text):
    check(*both, text)


def test_the_vocabularies_are_equal(both):
    ours, reference = both
    assert ours.get_vocab() == reference.get_vocab()
    special = {token.content for token in ours.get_added_tokens_decoder().values() if token.special}
    assert special == set(reference.all_special_tokens)


def settings(**changes):
    def apply(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def inside(*path, **changes):
    """Change an object in tokenizer.json."""

    def apply(folder):
        file = folder / "tokenizer.json"
        raw = json.loads(file.read_text())
        at = raw
        for key in path:
            at = at[key]
        at |= changes
        file.write_text(json.dumps(raw))

    return apply


def legacy(folder):
    """Added tokens in files of their own, the vocabulary in two, as older releases of Transformers wrote them."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    last = max(added.values())
    (folder / "added_tokens.json").write_text(json.dumps({**added, "<think>": last + 1, "a b": last + 2}))
    names = [name for name in added if name != "<|endoftext|>"]
    mapped = {"eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False}}
    mapped["additional_special_tokens"] = names
    (folder / "special_tokens_map.json").write_text(json.dumps(mapped))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


def without_settings(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


FORMS = {
    "as it is": lambda folder: None,
    "the older name of the class": settings(tokenizer_class="Qwen2TokenizerFast"),
    "another normalizer is not read": inside(normalizer=None),
    "options of the byte level are not read": inside(
        "pre_tokenizer", "pretokenizers", 1, add_prefix_space=True, use_regex=True
    ),
    "nor those of the model": inside("model", dropout=0.5, ignore_merges=True, byte_fallback=True, fuse_unk=True),
    "truncation and padding are not read": inside(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            **{"strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0},
            **{"pad_type_id": 0, "pad_token": "<|endoftext|>"},
        },
    ),
    "special tokens in the settings alone": inside(added_tokens=[]),
    "special tokens under another key": settings(
        extra_special_tokens=None, additional_special_tokens=["<|im_start|>", "<|new|>"]
    ),
    "named special tokens": settings(image_token="<|image_pad|>", extra_special_tokens={"hat_token": "<|hat|>"}),
    "a special token as an object": settings(
        sep_token={"__type": "AddedToken", "content": "<|sep|>", "lstrip": True, "rstrip": False}
    ),
    "a table of added tokens": settings(
        added_tokens_decoder={
            "640": {"content": "<think>", "special": False, "normalized": False},
            "700": {"content": "<|im_start|>", "special": True, "normalized": False},
            "650": {"content": "red hat", "special": False, "normalized": True, "lstrip": True, "rstrip": True},
            "660": {"content": "<|im_end|>", "special": False, "normalized": False, "single_word": True},
        }
    ),
    "no end of text": settings(unk_token=None, eos_token=None, pad_token=None),
    "files of older releases": legacy,
    "no settings": without_settings,
}


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_many_forms_are_read_as_transformers_reads_them(form, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(DEMO / "tokenizer", folder)
    FORMS[form](folder)
    ours, reference = load_tokenizer(folder), theirs(folder)
    assert ours.get_vocab() == reference.get_vocab()
    assert {n: token.content for n, token in ours.get_added_tokens_decoder().items() if token.special} == {
        n: token.content for n, token in reference.added_tokens_decoder.items() if token.special
    }
    for text in (*TEXTS.values(), "a red hat b", "blue <|hat|> <|sep|> x", "<|new|> a b c", " <|im_end|>x<|im_end|>"):
        check(ours, reference, text)
