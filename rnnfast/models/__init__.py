"""Networks built from the recurrent layers."""

from rnnfast.models.char_lstm import CharLSTM, CharLSTMConfig

__all__ = ["CharLSTM", "CharLSTMConfig"]
