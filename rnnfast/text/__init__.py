"""Text as training data: a character vocabulary, corpora, batches, and a bigram baseline."""

from rnnfast.text.bigram import bigram_bits_per_char
from rnnfast.text.corpus import batches, default_text, load_text, split, streams
from rnnfast.text.errors import TextError
from rnnfast.text.vocabulary import CharVocabulary

__all__ = [
    "CharVocabulary",
    "TextError",
    "batches",
    "bigram_bits_per_char",
    "default_text",
    "load_text",
    "split",
    "streams",
]
