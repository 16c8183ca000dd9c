"""Texts that the web has and no training set should: a scorer gives each of them a number."""

ODD = {
    "empty": "",
    "blank": " \t\n\u00a0 ",
    "long": "a red circle " * 3334,
    "one long word": "x" * 50_000,
    "emoji": "\U0001f389\U0001f40d\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "control": "\x00\x07a\x1b[31m red\x7f\u200b\ufeff",
    "right to left": "\u05e2\u05d9\u05d2\u05d5\u05dc \u05d0\u05d3\u05d5\u05dd \u202e red",
    "unknown": "zxqv jkvwq \u6f22\u5b57",
    "half a surrogate pair": "a red \ud83c circle",
    "special tokens": "[SEP] [PAD] [DEC] a red circle [ENC]",
}
