"""Networks built from the recurrent layers."""

from rnnfast.models.beam import Decoded
from rnnfast.models.char_lstm import CharLSTM, CharLSTMConfig
from rnnfast.models.elman import ElmanRNN
from rnnfast.models.jordan import JordanRNN
from rnnfast.models.seq2seq import Seq2SeqConfig, Seq2SeqLSTM
from rnnfast.models.sequence import SequenceClassifier, SequenceGenerator, SequenceTagger
from rnnfast.models.simple_rnn import SimpleRNN
from rnnfast.models.stacked import BidirectionalRNN, MultiLayerRNN, RNNModel

__all__ = [
    "BidirectionalRNN",
    "CharLSTM",
    "CharLSTMConfig",
    "Decoded",
    "ElmanRNN",
    "JordanRNN",
    "MultiLayerRNN",
    "RNNModel",
    "Seq2SeqConfig",
    "Seq2SeqLSTM",
    "SequenceClassifier",
    "SequenceGenerator",
    "SequenceTagger",
    "SimpleRNN",
]
