"""evomerge: evolutionary, black-box search for the best merge of your models."""

__version__ = "0.1.0"
