"""How an image becomes image tokens: one module per kind of layout, one interface for all."""
