"""Regular expressions as machines: their syntax, characters, and the text of tokenizers."""
