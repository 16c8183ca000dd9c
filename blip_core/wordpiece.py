"""A WordPiece vocabulary that depends on the texts only.

`tokenizers.WordPieceTrainer` walks a hash map with a random seed, so that equal counts are merged in another
order in every process, and two runs on the same texts end with different vocabularies. Its BPE trainer sorts
its alphabet and is deterministic; so a word's continuing characters are written as characters of their own,
BPE is trained on that, and its tokens are written back as pieces ("##" where a word continues).
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from blip_core.errors import ConfigError

_SHIFT = 0xF0000  # to the private planes; reaches every character below 0x20000
_MAX_CHARACTER = 0x1FFFF


def train_vocabulary(texts: Iterable[str], num_pieces: int) -> list[str]:
    """Return at most `num_pieces` pieces: single characters first, then merges by frequency."""
    counts = _word_counts(texts)
    if not counts:
        raise ConfigError("a vocabulary cannot be trained on no words: the texts are empty")
    alphabet = {_shifted(word)[index] for word in counts for index in range(len(word))}
    if len(alphabet) > num_pieces:
        raise ConfigError(
            f"vocab_size leaves room for {num_pieces} pieces, but the texts use {len(alphabet)} "
            "characters (first and continuing counted apart): choose a larger vocab_size"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=num_pieces, show_progress=False)
    tokenizer.train_from_iterator(_repeated(counts), trainer)
    ids = tokenizer.get_vocab()
    return [_piece(token) for token in sorted(ids, key=ids.__getitem__)]


def _word_counts(texts: Iterable[str]) -> Counter[str]:
    """Count words as BERT splits them: lower case, accents stripped, punctuation alone."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words if ord(max(word)) <= _MAX_CHARACTER)
    return counts


def _repeated(counts: Counter[str], line_words: int = 64) -> Iterator[str]:
    """Yield every word as often as it occurs, in lines, in sorted order."""
    for word in sorted(counts):
        shifted, left = _shifted(word), counts[word]
        while left > 0:
            yield " ".join([shifted] * min(left, line_words))
            left -= line_words


def _shifted(word: str) -> str:
    return word[0] + "".join(chr(ord(character) + _SHIFT) for character in word[1:])


def _piece(token: str) -> str:
    plain = "".join(chr(ord(c) - _SHIFT) if ord(c) >= _SHIFT else c for c in token)
    return f"##{plain}" if ord(token[0]) >= _SHIFT else plain
