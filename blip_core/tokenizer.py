"""WordPiece tokenizer with [DEC] and [ENC] (BLIP, section 3.1).

The vocabulary is BERT's, from a folder or a name, or trained on the run's own texts. Every text becomes
[CLS] ... [SEP]; position 0 then says which role the text transformer plays: [CLS] text encoder, [ENC]
image-grounded encoder, [DEC] decoder.

Dimension key: B batch, L text tokens.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from blip_core.config import TextConfig, require
from blip_core.errors import CheckpointError, ConfigError
from blip_core.wordpiece import train_vocabulary

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DECODE_TOKEN = "[DEC]"
ENCODE_TOKEN = "[ENC]"

_DROPPED_CHARACTERS = re.compile(r'[.!"()*#:;~]')
_WHITESPACE = re.compile(r"\s+")


def clean_caption(text: str, max_words: int = 30) -> str:
    """Normalise a text as BLIP does: lower case, ten punctuation marks to spaces, at most `max_words` words.

    Commas, question marks, apostrophes, hyphens and digits survive.
    """
    text = _DROPPED_CHARACTERS.sub(" ", text.lower())
    words = _WHITESPACE.sub(" ", text).strip().split(" ")
    return " ".join(words[:max_words])


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Texts as ids, padded on the right to the longest of the batch."""

    input_ids: Tensor
    """(B, L) int64, [CLS] first."""
    attention_mask: Tensor
    """(B, L) int64, 1 = real token."""

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Return the batch on `device`."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device))


class MEDTokenizer:
    """BERT's normaliser and WordPiece, and the two role tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a `tokenizers.Tokenizer` that has BERT's special tokens; prefer the class methods."""
        absent = [token for token in SPECIAL_TOKENS[:4] if tokenizer.token_to_id(token) is None]
        if absent:
            raise ConfigError(
                f"the vocabulary lacks {', '.join(absent)}: it is not a BERT vocabulary"
            )
        for token in (
            DECODE_TOKEN,
            ENCODE_TOKEN,
        ):  # [DEC] first: ids 30522 and 30523 with BERT's own
            tokenizer.add_special_tokens([token])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" typed in a text is only characters
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "MEDTokenizer":
        """Train on `texts`; the same texts give the same vocabulary, of at most `vocab_size` pieces."""
        reserved = [*SPECIAL_TOKENS, DECODE_TOKEN, ENCODE_TOKEN]
        pieces = train_vocabulary(texts, vocab_size - len(reserved))
        return cls(_wordpiece({token: index for index, token in enumerate([*reserved, *pieces])}))

    @classmethod
    def from_pretrained(cls, folder_or_name: str | Path) -> "MEDTokenizer":
        """Read a folder with tokenizer.json or vocab.txt, or a model name of the Hugging Face hub."""
        folder = Path(folder_or_name)
        if (folder / "tokenizer.json").is_file():
            try:
                return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))
            except Exception as err:
                raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {err}") from err
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            return cls(_wordpiece({piece: index for index, piece in enumerate(lines)}))
        if folder.is_dir():
            raise ConfigError(f"{folder} has neither tokenizer.json nor vocab.txt")
        return cls(_from_hub(str(folder_or_name)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(folder) / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Number of ids, [DEC] and [ENC] included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def pad_id(self) -> int:
        """Id of [PAD]."""
        return self._id("[PAD]")

    @property
    def cls_id(self) -> int:
        """Id of [CLS], position 0 of the text encoder."""
        return self._id("[CLS]")

    @property
    def sep_id(self) -> int:
        """Id of [SEP], the end of every text."""
        return self._id("[SEP]")

    @property
    def dec_id(self) -> int:
        """Id of [DEC], position 0 of the decoder."""
        return self._id(DECODE_TOKEN)

    @property
    def enc_id(self) -> int:
        """Id of [ENC], position 0 of the image-grounded encoder."""
        return self._id(ENCODE_TOKEN)

    @property
    def special_ids(self) -> list[int]:
        """Ids of all special tokens that the vocabulary has."""
        tokens = (*SPECIAL_TOKENS, DECODE_TOKEN, ENCODE_TOKEN)
        ids = [self._tokenizer.token_to_id(token) for token in tokens]
        return [token_id for token_id in ids if token_id is not None]

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Return [CLS] ... [SEP], cut to `max_length` tokens ([SEP] kept), padded to the longest."""
        if max_length < 2:
            raise ConfigError(f"max_length must be at least 2 ([CLS] and [SEP]), got {max_length}")
        storable = [storable_text(text) for text in texts]
        encodings = self._tokenizer.encode_batch(storable, add_special_tokens=False)
        rows = [[self.cls_id, *e.ids[: max_length - 2], self.sep_id] for e in encodings]
        longest = max((len(row) for row in rows), default=2)
        input_ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
        return TokenBatch(input_ids, attention_mask)

    def encoder_ids(self, text_input_ids: Tensor) -> Tensor:
        """Return a copy of (B, L) ids with [ENC] at position 0, for the image-grounded encoder."""
        return _with_first(text_input_ids, self.enc_id)

    def decoder_ids(self, text_input_ids: Tensor) -> Tensor:
        """Return a copy of (B, L) ids with [DEC] at position 0, for the decoder."""
        return _with_first(text_input_ids, self.dec_id)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return [DEC] and the prompt's ids, without [SEP]: what a caption starts from."""
        return [
            self.dec_id,
            *self._tokenizer.encode(storable_text(prompt), add_special_tokens=False).ids,
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out, and so is the mark of a first piece that continues a word."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.removeprefix("##")

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        assert token_id is not None, token
        return int(token_id)


def storable_text(text: str) -> str:
    """A text that can be encoded: halves of surrogate pairs, which no tokenizer takes, are replaced."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def require_vocabulary(text: TextConfig, tokenizer: MEDTokenizer) -> None:
    """Raise ConfigError when a tokenizer has ids that a model's vocabulary lacks."""
    require(
        tokenizer.vocab_size <= text.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} ids, but the model's text.vocab_size is "
        f"{text.vocab_size}: use the tokenizer that the model was trained with",
    )


def _with_first(ids: Tensor, first: int) -> Tensor:
    ids = ids.clone()
    ids[:, 0] = first
    return ids


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    """Assemble a tokenizer that works as bert-base-uncased does."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    known = [
        token for token in (*SPECIAL_TOKENS, DECODE_TOKEN, ENCODE_TOKEN) if token in vocabulary
    ]
    tokenizer.add_special_tokens(known)
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        ends = [(token, vocabulary[token]) for token in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend: Tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"tokenizer {name!r} is neither a folder nor a model that the hub gives: {err}"
        ) from err
    return backend
