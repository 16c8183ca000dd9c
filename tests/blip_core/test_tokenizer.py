import subprocess
import sys
from pathlib import Path

import pytest

from blip_core import CheckpointError, ConfigError, MEDTokenizer, clean_caption


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Dog.  (Barking!)", "a dog barking"),
        ("it's 5, isn't it?\n", "it's 5, isn't it?"),
        ('a#b:c;d~e*f"g', "a b c d e f g"),
        ("well-known   \t thing", "well-known thing"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_caption_does_what_blip_does(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_clean_caption_keeps_max_words() -> None:
    assert clean_caption("one two three four", max_words=3) == "one two three"


def test_train_gives_the_same_vocabulary_in_another_process() -> None:
    program = (
        "import random, hashlib\n"
        "from blip_core import MEDTokenizer\n"
        "rng = random.Random(0)\n"
        "words = [''.join(rng.choices('abcdefgh', k=5)) for _ in range(300)]\n"
        "tokenizer = MEDTokenizer.train([' '.join(words)], 120)\n"
        "print(hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest())\n"
    )
    run = [sys.executable, "-c", program]
    seen = {subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in "ab"}
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 64


def test_train_learns_whole_words_and_stays_within_vocab_size(texts: list[str]) -> None:
    tokenizer = MEDTokenizer.train(texts, vocab_size=110)
    ids = tokenizer.encode(["a red circle on the left"], 20).input_ids[0].tolist()
    assert len(ids) == 8, "six words and two special tokens"
    assert tokenizer.vocab_size <= 110


def test_train_refuses_a_vocabulary_smaller_than_the_alphabet(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="choose a larger vocab_size"):
        MEDTokenizer.train(texts, vocab_size=12)


def test_train_refuses_texts_without_words() -> None:
    with pytest.raises(ConfigError, match="no words"):
        MEDTokenizer.train(["", "  "], vocab_size=100)


def test_encode_pads_to_the_longest_and_cuts_before_sep(tokenizer: MEDTokenizer) -> None:
    batch = tokenizer.encode(["red", "a red circle on the left"], max_length=5)
    assert batch.input_ids.tolist()[0][3:] == [tokenizer.pad_id] * 2
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.input_ids[:, 0].tolist() == [tokenizer.cls_id] * 2
    assert batch.input_ids[1, -1] == tokenizer.sep_id


def test_encode_takes_an_empty_text_and_an_empty_batch(tokenizer: MEDTokenizer) -> None:
    assert tokenizer.encode([""], 10).input_ids.tolist() == [[tokenizer.cls_id, tokenizer.sep_id]]
    assert tokenizer.encode([], 10).input_ids.shape == (0, 2)


def test_encode_reads_special_tokens_typed_in_a_text_as_characters(
    tokenizer: MEDTokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, MEDTokenizer.from_pretrained(tmp_path)):
        ids = each.encode(["red [SEP] [ENC] [DEC] red"], 40).input_ids[0].tolist()
        assert ids.count(each.sep_id) == 1
        assert each.enc_id not in ids
        assert each.dec_id not in ids


def test_role_ids_replace_position_0_of_a_copy(tokenizer: MEDTokenizer) -> None:
    ids = tokenizer.encode(["a red ring"], 10).input_ids
    assert tokenizer.encoder_ids(ids)[0, 0] == tokenizer.enc_id
    assert tokenizer.decoder_ids(ids)[0, 0] == tokenizer.dec_id
    assert ids[0, 0] == tokenizer.cls_id
    assert (tokenizer.encoder_ids(ids)[:, 1:] == ids[:, 1:]).all()


def test_decode_returns_the_text_without_special_tokens(tokenizer: MEDTokenizer) -> None:
    ids = tokenizer.encode(["a red square on the left"], 20).input_ids[0].tolist()
    assert tokenizer.decode(ids) == "a red square on the left"


def test_prompt_of_the_paper_is_four_tokens(tokenizer: MEDTokenizer) -> None:
    ids = tokenizer.prompt_ids("a picture of ")
    assert len(ids) == 4
    assert ids[0] == tokenizer.dec_id


def test_save_and_load_keep_every_id(tokenizer: MEDTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = MEDTokenizer.from_pretrained(tmp_path)
    text = ["a red cross on the unknown left \u00e9"]
    assert (
        loaded.encode(text, 30).input_ids.tolist() == tokenizer.encode(text, 30).input_ids.tolist()
    )
    assert (loaded.vocab_size, loaded.enc_id) == (tokenizer.vocab_size, tokenizer.enc_id)


def test_from_pretrained_adds_dec_then_enc_to_a_bert_vocabulary(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = MEDTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.dec_id, tokenizer.enc_id, tokenizer.vocab_size) == (8, 9, 10)
    assert tokenizer.encode(["A dogs cat"], 10).input_ids.tolist() == [[2, 5, 6, 7, 1, 3]]


def test_from_pretrained_names_a_folder_without_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer.json nor vocab.txt"):
        MEDTokenizer.from_pretrained(tmp_path)


def test_from_pretrained_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        MEDTokenizer.from_pretrained(tmp_path)


def test_from_pretrained_refuses_a_vocabulary_that_is_not_bert(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\na\ndog\n")
    with pytest.raises(ConfigError, match=r"lacks \[PAD\], \[CLS\], \[SEP\]"):
        MEDTokenizer.from_pretrained(tmp_path)
