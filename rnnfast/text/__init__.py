"""Text as training data: vocabularies, word vectors, corpora, batches, a bigram baseline."""

from rnnfast.text.bigram import bigram_bits_per_char
from rnnfast.text.characters import CharVocabulary
from rnnfast.text.corpus import batches, default_text, load_text, split, streams
from rnnfast.text.errors import TextError
from rnnfast.text.hashing import hash_features, hash_tokens
from rnnfast.text.svd import reduce_svd
from rnnfast.text.vectors import cooccurrence, one_hot
from rnnfast.text.vocabulary import Vocabulary
from rnnfast.text.words import WordVocabulary, split_words

__all__ = [
    "CharVocabulary",
    "TextError",
    "Vocabulary",
    "WordVocabulary",
    "batches",
    "bigram_bits_per_char",
    "cooccurrence",
    "default_text",
    "hash_features",
    "hash_tokens",
    "load_text",
    "one_hot",
    "reduce_svd",
    "split",
    "split_words",
    "streams",
]
