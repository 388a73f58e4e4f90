"""The one decoder and its state."""
