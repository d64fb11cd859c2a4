"""Prompts: plain text stays text, control tokens are placed by id, positions and slots of pictures."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from joyjax.errors import CheckpointError, RequestError
from joyjax.processors.text import (
    control_token,
    decode,
    image_token_indices,
    length_bucket,
    load_tokenizer,
    multimodal_positions,
    pad_rows,
    plain_tokens,
)

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
IMAGE = 9


def write_tokenizer(folder, control=CONTROL, without="", **config):
    """Write a tokenizer of the bytes but `without`, two longer words, and the control tokens."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    vocabulary = {word: n for n, word in enumerate([*alphabet, "us", "er"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("u", "s"), ("e", "r")]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"))


def test_text_gives_the_same_text_back(tokenizer):
    text = "user\n Füge einen Hut hinzu, 🐕‍🦺 加上一顶帽子\r\n"
    assert decode(tokenizer, plain_tokens(tokenizer, text)) == text
    assert len(plain_tokens(tokenizer, "user")) == 2
    assert plain_tokens(tokenizer, "") == []


def test_text_is_normalised_to_composed_letters(tokenizer):
    assert plain_tokens(tokenizer, "cafe\u0301") == plain_tokens(tokenizer, "caf\u00e9")


@pytest.mark.parametrize("name", CONTROL)
def test_a_control_token_in_a_prompt_is_letters(tokenizer, name):
    ids = plain_tokens(tokenizer, f"a{name}b")
    assert control_token(tokenizer, name) not in ids
    assert decode(tokenizer, ids) == f"a{name}b"


def test_an_added_word_that_is_not_special_stays_one_id(tokenizer):
    assert plain_tokens(tokenizer, "<think>") == [tokenizer.token_to_id("<think>")]


@given(st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(CONTROL))).map("".join))
def test_no_text_makes_a_control_token(tokenizer, text):
    ids = plain_tokens(tokenizer, text)
    assert not {control_token(tokenizer, name) for name in CONTROL} & set(ids)
    assert decode(tokenizer, ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("prompt", [None, b"bytes", 3, ["a", "b"], {"text": "a"}])
def test_a_prompt_that_is_no_text_is_refused(tokenizer, prompt):
    with pytest.raises(RequestError, match=f"{type(prompt).__name__}; expected a str"):
        plain_tokens(tokenizer, prompt)


@pytest.mark.parametrize("prompt", ["a\ud83d", "a\udc15b"])
def test_half_a_surrogate_pair_is_refused(tokenizer, prompt):
    with pytest.raises(RequestError, match=f"U\\+{ord(prompt[1]):04X} at position 1"):
        plain_tokens(tokenizer, prompt)


def test_a_missing_control_token_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match=r"no <\|vision_start\|>"):
        control_token(tokenizer, "<|vision_start|>")
    with pytest.raises(CheckpointError, match="no user"):
        control_token(tokenizer, "user")


def test_a_missing_control_token_is_not_taken_for_the_unknown_one(tmp_path):
    made = load_tokenizer(write_tokenizer(tmp_path, unk_token="<|endoftext|>"))
    with pytest.raises(CheckpointError, match=r"no <\|vision_start\|>"):
        control_token(made, "<|vision_start|>")


def test_a_control_token_that_a_prompt_could_spell_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match="<think> as special; a prompt could forge it"):
        control_token(tokenizer, "<think>")


def broken(folder, name, content):
    (write_tokenizer(folder) / name).write_bytes(content)


def spoil_model(folder, **changes):
    file = write_tokenizer(folder) / "tokenizer.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "model": {**raw["model"], **changes}}))


FOLDERS = {  # how to spoil a tokenizer's folder, and a word of the reason
    "no folder": (lambda folder: folder.rmdir(), "no vocab.json"),
    "empty": (lambda folder: None, "no vocab.json; expected tokenizer.json, or vocab.json and merges.txt"),
    "no merges": (lambda folder: (folder / "vocab.json").write_text("{}"), "no merges.txt"),
    "no json": (lambda folder: broken(folder, "tokenizer.json", b"{"), "cannot be read"),
    "another json": (lambda folder: broken(folder, "tokenizer.json", b"[1]"), "cannot be read"),
    "not utf-8": (lambda folder: broken(folder, "tokenizer.json", b"\xff\xfe"), "cannot be read"),
    "config is a list": (lambda folder: broken(folder, "tokenizer_config.json", b"[]"), "cannot be read"),
    "loses capitals": (lambda folder: write_tokenizer(folder, without="ABC"), "loses text"),
    "adds a space": (lambda folder: write_tokenizer(folder, add_prefix_space=True), "loses text"),
    "merges of no words": (lambda folder: spoil_model(folder, merges=["q x"]), "cannot be read"),
    "merges are a text": (lambda folder: spoil_model(folder, merges="all"), "cannot be read: merges is a str"),
    "words are a list": (lambda folder: spoil_model(folder, vocab=["a", "b"]), "cannot be read"),
    "ids below zero": (lambda folder: spoil_model(folder, vocab={"a": -1}), "cannot be read"),
    "added tokens of no kind": (
        lambda folder: write_tokenizer(folder, added_tokens_decoder={"1": {"content": 5}}),
        "cannot be",
    ),
    "no words": (
        lambda folder: (
            (folder / "vocab.json").write_text("{}"),
            (folder / "merges.txt").write_text("#version: 0.2\n"),
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}'),
        ),
        "loses text|cannot be read",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_spoilt_folder_is_refused_by_name(name, tmp_path):
    spoil, reason = FOLDERS[name]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"(?s)tokenizer.*({reason})"):
        load_tokenizer(folder)


def test_a_panic_of_the_reader_is_an_error_like_others(tmp_path, monkeypatch):
    class PanicException(BaseException):  # what Rust code that panics raises in Python
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    folder = write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr("joyjax.processors.text.build_tokenizer", panic)
    with pytest.raises(CheckpointError, match="cannot be read: index out of bounds"):
        load_tokenizer(folder)


def test_code_in_a_folder_never_runs(tmp_path):
    trace = tmp_path / "trace"
    for number, known in enumerate(["PreTrainedTokenizerFast", "Hostile"]):
        folder = write_tokenizer(
            tmp_path / f"tokenizer{number}",
            tokenizer_class=known,
            auto_map={"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]},
        )
        (folder / "hostile.py").write_text(f"open({str(trace)!r}, 'w')\nclass Hostile: pass\n")
        try:
            load_tokenizer(folder)
        except CheckpointError:
            pass
    assert not trace.exists()


def test_rows_are_padded_on_the_right():
    ids, lengths = pad_rows([[1, 2, 3], [], np.array([4])], pad_id=7, length=4)
    assert ids.tolist() == [[1, 2, 3, 7], [7, 7, 7, 7], [4, 7, 7, 7]]
    assert lengths.tolist() == [3, 0, 1]
    assert ids.dtype == lengths.dtype == np.int32
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad_rows([[1, 2, 3]], pad_id=7, length=2)


@pytest.mark.parametrize(("length", "bucket"), [(0, 32), (1, 32), (32, 32), (33, 64), (4096, 4096), (4097, 4128)])
def test_length_bucket_rounds_up(length, bucket):
    assert length_bucket(length) == bucket


def test_positions_of_text_alone():
    assert multimodal_positions([5, 6, 7], IMAGE, []).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_positions_around_pictures():
    """A wide picture of 2 × 3 from position 2, then a tall one of 3 × 1 right behind one token of text."""
    ids = [1, 1, *[IMAGE] * 6, 1, *[IMAGE] * 3, 1]
    wide = [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    tall = [[6, 6, 6], [6, 7, 6], [6, 8, 6]]
    expected = [[0, 0, 0], [1, 1, 1], *wide, [5, 5, 5], *tall, [9, 9, 9]]
    positions = multimodal_positions(ids, IMAGE, [(2, 3), (3, 1)])
    assert positions.dtype == np.int32
    assert positions.tolist() == expected


def test_indices_name_the_feature_of_each_image_token():
    ids = np.array([1, *[IMAGE] * 4, 1, *[IMAGE] * 2, 1])
    assert image_token_indices(ids, IMAGE, [(2, 2), (1, 2)], stride=6).tolist() == [-1, 0, 1, 2, 3, -1, 6, 7, -1]
    assert image_token_indices(ids, IMAGE, [(2, 2), (1, 2)], stride=6, first=3).tolist() == [
        -1,
        18,
        19,
        20,
        21,
        -1,
        24,
        25,
        -1,
    ]
    assert image_token_indices([1, 2], IMAGE, [], stride=0).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="2 × 2 merged patches does not fit into 3"):
        image_token_indices(ids, IMAGE, [(2, 2), (1, 2)], stride=3)


@pytest.mark.parametrize(
    ("ids", "grids", "reason"),
    [
        ([1, IMAGE], [], "1 image tokens for pictures of \\[\\]"),
        ([1, IMAGE, IMAGE], [(1, 3)], "2 image tokens for pictures of \\[3\\]"),
        ([IMAGE, 1, IMAGE], [(1, 2)], "not in one run: they start at 0"),
        ([IMAGE, 1, IMAGE, IMAGE], [(1, 2), (1, 1)], "not in one run"),
    ],
)
def test_image_tokens_must_be_the_pictures(ids, grids, reason):
    with pytest.raises(ValueError, match=reason):
        multimodal_positions(ids, IMAGE, grids)
    with pytest.raises(ValueError, match=reason):
        image_token_indices(ids, IMAGE, grids, stride=8)
