"""Other people's files, in and out: model folders, 4-bit dialects, adapters, tokenizers, tables of text, the Hub."""
